"""The networks as the families' records describe them: plain modules, one tensor per input and output.

Each wrapper turns a diffusers or transformers module into a function of tensors whose arguments have the
names of its family's record (`sdrt.runtime.bundle.families`); arguments and results stand in its order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch
from diffusers.models.embeddings import get_timestep_embedding
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.fields import LatentScaling
from sdrt.export.checkpoint.weights import load_module
from sdrt.runtime.bundle.families import components as tensors
from sdrt.runtime.bundle.families.record import TensorSpec
from sdrt.runtime.bundle.families.stable_unclip import IMAGE_ENCODER
from sdrt.runtime.bundle.families.told import usual_row
from sdrt.runtime.samplers.guidance import guidance_embedding
from sdrt.runtime.samplers.schedule import NoiseSchedule

# Of the random inputs of text encoders: how many tokens have an embedding of their own, and the standard
# deviation of CLIP's embeddings as they are initialised, which training leaves as it is (1.x: 0.014).
CUSTOM_SHARE: Final = 0.1
EMBEDDING_DEVIATION: Final = 0.02


class TextEncoder(nn.Module):
    """Token ids → last (normalised) and penultimate hidden state, counted from where `clip_skip` stops.

    Shapes: ``input_ids`` int64 [batch, tokens], −1 where ``custom_embeddings`` [batch, tokens, text_width]
    stands for the token; ``clip_skip`` int64 [1], 0 … layers − 1; both results [batch, tokens, text_width].
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, custom_embeddings: Tensor, clip_skip: Tensor
    ) -> tuple[Tensor, Tensor]:
        states = hidden_states(self.model, input_ids, custom_embeddings)
        return self.model.final_layer_norm(_state(states, clip_skip)), _state(states, clip_skip + 1)


class TextEncoder2(nn.Module):
    """Token ids → penultimate hidden state and the pooled, projected embedding (SDXL's second encoder).

    Shapes: as for `TextEncoder` with text_width_2; [batch, tokens, text_width_2], [batch, projection_width].
    The pooled embedding is that of the last layer whatever ``clip_skip`` is, as in diffusers.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, custom_embeddings: Tensor, clip_skip: Tensor
    ) -> tuple[Tensor, Tensor]:
        text = self.model.text_model
        states = hidden_states(text, input_ids, custom_embeddings)
        last = text.final_layer_norm(states[-1])
        end = _end_of_text(input_ids, text.eos_token_id)
        pooled = last[torch.arange(last.shape[0], device=last.device), end]
        return _state(states, clip_skip + 1), self.model.text_projection(pooled)


def hidden_states(text: Any, input_ids: Tensor, custom_embeddings: Tensor) -> list[Tensor]:
    """The embeddings and what each layer of a CLIPTextModel gives, each [batch, tokens, width].

    ``CLIPTextModel.forward`` itself, but for the tokens that have an embedding of their own.
    """
    known = text.embeddings.token_embedding(input_ids.clamp(min=0))
    tokens = torch.where(input_ids[..., None] < 0, custom_embeddings, known)
    state = text.embeddings(inputs_embeds=tokens)
    mask = create_causal_mask(
        config=text.config, inputs_embeds=state, attention_mask=None, past_key_values=None
    )
    states = [state]
    for layer in text.encoder.layers:
        state = layer(state, mask, is_causal=True)
        states.append(state)
    return states


def _state(states: list[Tensor], before_last: Tensor) -> Tensor:
    """The state that lies ``before_last`` (int64 [1]) layers before the last one."""
    return torch.stack(states).index_select(0, len(states) - 1 - before_last)[0]


def _end_of_text(input_ids: Tensor, eos: int) -> Tensor:
    """Where each text's first end-of-text token stands, as CLIPTextModel finds it: int64 [batch]."""
    if eos == 2:  # of configurations written before the id was right: the token with the highest id
        return input_ids.to(torch.int).argmax(dim=-1)
    return (input_ids == eos).to(torch.int).argmax(dim=-1)


class ImageEncoder(nn.Module):
    """A picture as the image processor makes it → its pooled and projected embedding, as a text of one token.

    Shapes: ``pixel_values`` [batch, 3, size, size] → [batch, 1, cross_width].
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        image_embeds: Tensor = self.model(pixel_values=pixel_values).image_embeds
        return image_embeds[:, None]


class LabelEncoder(nn.Module):
    """A picture and a noise level → what a Stable unCLIP's class_labels may be: mean + std · noise.

    diffusers normalises the embedding e, lays noise over it and undoes the former: (√ᾱ (e − m) / s +
    √(1 − ᾱ) · noise) · s + m; what tells the U-Net the level stands behind it.
    Shapes: ``pixel_values`` [batch, 3, size, size], ``noise_level`` int64 [batch] → twice [batch, 2 · width].
    """

    def __init__(self, model: Any, normalizer: Any, alphas_cumprod: NDArray[np.float32]) -> None:
        super().__init__()
        self.model = model
        # Constants of the graph: no network of a component has them.
        self.mean, self.std = normalizer.mean.detach().float(), normalizer.std.detach().float()
        self.signal = torch.from_numpy(alphas_cumprod**0.5)
        self.noise = torch.from_numpy((1 - alphas_cumprod) ** 0.5)

    def forward(self, pixel_values: Tensor, noise_level: Tensor) -> tuple[Tensor, Tensor]:
        embeds = self.model(pixel_values=pixel_values).image_embeds
        mean, std = self.mean.to(embeds), self.std.to(embeds)
        signal = self.signal[noise_level][:, None].to(embeds)
        noise = self.noise[noise_level][:, None].to(embeds)
        level = get_timestep_embedding(
            noise_level, embeds.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0
        ).to(embeds)
        clean = (embeds - mean) / std * signal * std + mean
        deviation = noise * std
        return torch.cat([clean, level], dim=1), torch.cat([deviation, torch.zeros_like(level)], dim=1)


class _TimeIdEmbedding(nn.Module):
    """Sinusoidal embeddings in the precision of the numbers.

    diffusers leaves them in float32 and concatenates them with fp16 ``text_embeds``; PyTorch widens those and
    rounds the whole, an ONNX Concat has one type. Rounded before or after, the numbers are the same.
    """

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, time_ids: Tensor) -> Tensor:
        embedding: Tensor = self.projection(time_ids).to(time_ids.dtype)
        return embedding


class UNet(nn.Module):
    """Noisy latents, timestep and embeddings → noise prediction.

    The arguments have the names of the record. Those that may be None are of some families
    (``text_embeds`` and ``time_ids`` of sdxl and sdxl-refiner) or kinds of checkpoints.
    Shapes: ``sample`` [rows, channels, h, w]; ``timestep`` float32 [rows];
    ``encoder_hidden_states`` [rows, context, cross_width]; ``text_embeds`` [rows, projection_width];
    ``time_ids`` [rows, 6], of the refiner [rows, 5]; ``image_latents`` like ``sample``; ``class_labels``
    [rows, label_width]; ``low_res`` [rows, 3, h, w]; ``noise_level`` int64 [rows]; ``timestep_cond``
    [rows, guidance_width]; ``inpainting`` [rows, channels + 1, h, w];
    ``depth`` [rows, 1, h, w]; result like ``sample``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        if hasattr(model, "add_time_proj"):
            model.add_time_proj = _TimeIdEmbedding(model.add_time_proj)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        image_latents: Tensor | None = None,
        class_labels: Tensor | None = None,
        low_res: Tensor | None = None,
        noise_level: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        inpainting: Tensor | None = None,
        depth: Tensor | None = None,
    ) -> Tensor:
        for more in (inpainting, image_latents, low_res, depth):  # inpainting: mask, masked picture's latents
            if more is not None:
                sample = torch.cat([sample, more], dim=1)
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        noise_pred: Tensor = self.model(
            sample,
            timestep,
            encoder_hidden_states,
            class_labels=noise_level if class_labels is None else class_labels,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return noise_pred


class VaeDecoder(nn.Module):
    """Latents in the sampler's scale → image in [-1, 1].

    What `LatentScaling` says lives in the graph, so that no backend needs a kernel for it.
    Shapes: [batch, latent_channels, h, w] → [batch, 3, factor·h, factor·w].
    """

    def __init__(self, model: Any, scaling: LatentScaling) -> None:
        super().__init__()
        self.model = model
        self.factor = scaling.factor
        self.mean, self.std = _per_channel(scaling.mean), _per_channel(scaling.std)

    def forward(self, latents: Tensor) -> Tensor:
        if self.mean is None or self.std is None:
            latents = latents / self.factor
        else:
            latents = latents * self.std.to(latents) / self.factor + self.mean.to(latents)
        image: Tensor = self.model.decode(latents, return_dict=False)[0]
        return image


class VaeEncoder(nn.Module):
    """Image in [-1, 1] → mean and standard deviation of the posterior, in the sampler's scale.

    Shapes: [batch, 3, height, width] → twice [batch, latent_channels, h, w].
    """

    def __init__(self, model: Any, scaling: LatentScaling) -> None:
        super().__init__()
        self.model = model
        self.factor = scaling.factor
        self.mean, self.std = _per_channel(scaling.mean), _per_channel(scaling.std)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.model.encode(image, return_dict=False)[0]
        if self.mean is None or self.std is None:
            return posterior.mean * self.factor, posterior.std * self.factor
        mean, std = self.mean.to(image), self.std.to(image)
        return (posterior.mean - mean) * self.factor / std, posterior.std * self.factor / std


def _per_channel(numbers: tuple[float, ...] | None) -> Tensor | None:
    """One number for each channel of [batch, channels, h, w]; a constant of the graph, no weight."""
    return None if numbers is None else torch.tensor(numbers).view(1, -1, 1, 1)


def wrapped(checkpoint: Checkpoint, component: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load the network of one component and wrap it.

    Raises:
        CheckpointError: As for `sdrt.export.checkpoint.weights.load_module`.
    """
    folder = checkpoint.kind.network_of(component).folder
    return wrap(checkpoint, component, load_module(checkpoint, folder, dtype))


def wrap(checkpoint: Checkpoint, component: str, model: nn.Module) -> nn.Module:
    """Wrap a network of a component that is loaded already."""
    wrapper: Callable[..., nn.Module] = checkpoint.kind.network_of(component).load_wrapper(component)
    return wrapper(model, *_beside(checkpoint, component)).eval()


def _beside(checkpoint: Checkpoint, component: str) -> tuple[Any, ...]:
    """What the wrapper of a component has beside its network."""
    if component == IMAGE_ENCODER.name and checkpoint.noising is not None:
        alphas = checkpoint.noising.schedule.alphas_cumprod.astype(np.float32)
        return load_module(checkpoint, "image_normalizer"), alphas
    scaling = {"vae_decoder": checkpoint.decoded, "vae_encoder": checkpoint.encoded}
    return (scaling[component],) if component in scaling else ()


def example_inputs(
    checkpoint: Checkpoint, component: str, axes: Mapping[str, int], generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Random float32 (or int64) inputs of the given sizes, in the distribution of real use.

    Args:
        checkpoint: Gives the sizes that are not dynamic.
        component: A name of the family's.
        axes: A size for each dynamic axis.
        generator: The source of randomness, on the CPU.
    """
    spec = checkpoint.record.components[component].resolve(checkpoint.sizes(), "fp32")
    return tuple(_example(checkpoint, component, entry, axes, generator) for entry in spec.inputs)


def _timestep_range(schedule: NoiseSchedule) -> tuple[float, float]:
    """The lowest and the highest timestep that a U-Net is told; an EDM model is told ln(sigma) / 4."""
    if schedule.edm is None:
        return 0.0, 999.0
    first, last = schedule.edm.timesteps(np.array([schedule.edm.sigma_min, schedule.edm.sigma_max]))
    return float(first), float(last)


def _example(
    checkpoint: Checkpoint,
    component: str,
    entry: TensorSpec,
    axes: Mapping[str, int],
    generator: torch.Generator,
) -> Tensor:
    shape = entry.concrete(axes)
    if (options := checkpoint.record.told.get(entry.name)) is not None:  # a whole picture, not cropped
        side = checkpoint.native_size
        row = usual_row(options, (side, side), unconditional=False)
        return torch.tensor([row], dtype=torch.float32).repeat(shape[0], 1)
    match entry.name:
        case tensors.INPUT_IDS:
            vocabulary = int(checkpoint.configs[component]["vocab_size"])
            ids = torch.randint(0, vocabulary, shape, generator=generator)
            own = torch.rand(shape, generator=generator) < CUSTOM_SHARE
            return torch.where(own, -1, ids)
        case tensors.CUSTOM_EMBEDDINGS:
            return torch.randn(shape, generator=generator) * EMBEDDING_DEVIATION
        case tensors.CLIP_SKIP:
            return torch.randint(0, checkpoint.text_layers(component), shape, generator=generator)
        case tensors.TIMESTEP:
            first, last = _timestep_range(checkpoint.schedule)
            return first + torch.rand(shape, generator=generator) * (last - first)
        case tensors.NOISE_LEVEL:
            assert checkpoint.noising is not None  # of its family
            return torch.randint(0, checkpoint.noising.max_level + 1, shape, generator=generator)
        case tensors.IMAGE | tensors.DEPTH:
            return torch.rand(shape, generator=generator) * 2 - 1
        case tensors.TIMESTEP_COND:  # of guidance scales from 1 to 15
            scales = 14 * torch.rand(shape[0], generator=generator).numpy()
            rows = [guidance_embedding(scale, shape[1]) for scale in scales]
            return torch.from_numpy(np.stack(rows))
        case tensors.INPAINTING:
            mask = torch.rand((shape[0], 1, *shape[2:]), generator=generator).round()
            latents = torch.randn((shape[0], shape[1] - 1, *shape[2:]), generator=generator)
            return torch.cat([mask, latents], dim=1)
        case _:
            return torch.randn(shape, generator=generator)
