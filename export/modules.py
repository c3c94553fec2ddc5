"""The networks as the components table describes them: plain modules, one tensor per input and output.

Each wrapper turns a diffusers or transformers module into a function of tensors whose arguments and
results stand in the order of `sdrt.runtime.components.COMPONENTS`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdrt.export.checkpoint import Checkpoint


class TextEncoder(nn.Module):
    """Token ids → last (normalised) and penultimate hidden state.

    Shapes: ``input_ids`` int64 [batch, tokens]; both results [batch, tokens, text_width].
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(input_ids=input_ids, output_hidden_states=True)
        return output.last_hidden_state, output.hidden_states[-2]


class UNet(nn.Module):
    """Noisy latents, timestep and text embeddings → noise prediction.

    Shapes: ``sample`` [rows, channels, h, w]; ``timestep`` float32 [1], one for all rows;
    ``encoder_hidden_states`` [rows, tokens, cross_width]; result like ``sample``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        noise_pred: Tensor = self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return noise_pred


class VaeDecoder(nn.Module):
    """Latents in the sampler's scale → image in [-1, 1].

    The division by ``scaling_factor`` lives in the graph, so that no backend needs a kernel for it.
    Shapes: [batch, latent_channels, h, w] → [batch, 3, factor·h, factor·w].
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.scale = float(model.config.scaling_factor)
        self.shift = float(model.config.shift_factor or 0.0)

    def forward(self, latents: Tensor) -> Tensor:
        image: Tensor = self.model.decode(latents / self.scale + self.shift, return_dict=False)[0]
        return image


class VaeEncoder(nn.Module):
    """Image in [-1, 1] → mean and standard deviation of the posterior, in the sampler's scale.

    Shapes: [batch, 3, height, width] → twice [batch, latent_channels, h, w].
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.scale = float(model.config.scaling_factor)
        self.shift = float(model.config.shift_factor or 0.0)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.model.encode(image, return_dict=False)[0]
        return (posterior.mean - self.shift) * self.scale, posterior.std * self.scale


# Component → the subfolder it is loaded from and the wrapper around it.
WRAPPERS: dict[str, tuple[str, type[nn.Module]]] = {
    "text_encoder": ("text_encoder", TextEncoder),
    "unet": ("unet", UNet),
    "vae_decoder": ("vae", VaeDecoder),
    "vae_encoder": ("vae", VaeEncoder),
}


def example_inputs(
    checkpoint: Checkpoint, component: str, axes: dict[str, int], generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Random float32 (or int64) inputs of the given sizes, in the distribution of real use.

    Args:
        checkpoint: Gives the sizes that are not dynamic.
        component: A name in the components table.
        axes: A size for each dynamic axis.
        generator: The source of randomness, on the CPU.
    """
    from sdrt.runtime.components import COMPONENTS

    spec = COMPONENTS[component].resolve(checkpoint.sizes(), "fp32")
    vocabulary = int(checkpoint.configs["text_encoder"]["vocab_size"])
    tensors = []
    for entry in spec.inputs:
        shape = entry.concrete(axes)
        if entry.name == "input_ids":
            tensors.append(torch.randint(0, vocabulary, shape, generator=generator))
        elif entry.name == "timestep":
            tensors.append(torch.rand(shape, generator=generator) * 999)
        elif entry.name == "image":
            tensors.append(torch.rand(shape, generator=generator) * 2 - 1)
        else:
            tensors.append(torch.randn(shape, generator=generator))
    return tuple(tensors)
