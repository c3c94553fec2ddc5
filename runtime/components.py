"""The components of a bundle as one table per family: what each takes, what it gives, which axes are dynamic.

The exporter names graph inputs and outputs after this table, the manifest records it with the sizes of
one checkpoint filled in, and the runtime allocates its buffers from the manifest. Nothing else in the
project spells a tensor's name or order of axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: Final[tuple[Precision, ...]] = ("fp32", "fp16", "bf16")

FLOAT: Final = "float"  # stands for the component's precision; resolved by `TensorSpec.resolve`

# Axes that stay symbolic in the graph. Every other name in the table is a size of the checkpoint.
DYNAMIC_AXES: Final = frozenset({"batch", "rows", "height", "width", "latent_height", "latent_width"})


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One graph input or output.

    Attributes:
        name: The graph's name of the tensor.
        dtype: ``int64``, ``float32``, ``float16``, ``bfloat16``, or ``FLOAT`` before `resolve`.
        shape: One entry per axis: a size, or the name of an axis.
        about: Units and meaning, for people.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    about: str = ""

    def resolve(self, sizes: Mapping[str, int], precision: Precision) -> TensorSpec:
        """Fill in the checkpoint's sizes and the precision; dynamic axes keep their names.

        Raises:
            KeyError: An axis is neither dynamic nor in ``sizes``.
        """
        shape = tuple(
            axis if isinstance(axis, int) or axis in DYNAMIC_AXES else sizes[axis] for axis in self.shape
        )
        return TensorSpec(self.name, self.resolved_dtype(precision), shape, self.about)

    def resolved_dtype(self, precision: Precision) -> str:
        """The dtype in a component of that precision."""
        names = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
        return names[precision] if self.dtype == FLOAT else self.dtype

    def concrete(self, axes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every named axis looked up in ``axes``."""
        return tuple(axis if isinstance(axis, int) else axes[axis] for axis in self.shape)


@dataclass(frozen=True, slots=True)
class ComponentSpec:
    """Inputs and outputs of one component, in the graph's order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def resolve(self, sizes: Mapping[str, int], precision: Precision) -> ComponentSpec:
        """The same component with one checkpoint's sizes and precision filled in."""
        return ComponentSpec(
            self.name,
            tuple(spec.resolve(sizes, precision) for spec in self.inputs),
            tuple(spec.resolve(sizes, precision) for spec in self.outputs),
        )


_INPUT_IDS: Final = TensorSpec("input_ids", "int64", ("batch", "tokens"), "token ids")
# `rows` is the U-Net's batch: twice the images under guidance, the unconditional half first.
_UNET_INPUTS: Final = (
    TensorSpec(
        "sample",
        FLOAT,
        ("rows", "unet_channels", "latent_height", "latent_width"),
        "noisy latents, scaled as the sampler says",
    ),
    # float32 in every precision: a fractional timestep must not be rounded to fp16.
    TensorSpec("timestep", "float32", (1,), "0 … num_train_timesteps − 1, may be fractional"),
    TensorSpec("encoder_hidden_states", FLOAT, ("rows", "tokens", "cross_width"), "text embeddings"),
)
_UNET_OUTPUTS: Final = (
    TensorSpec(
        "noise_pred",
        FLOAT,
        ("rows", "latent_channels", "latent_height", "latent_width"),
        "epsilon or v, as the schedule's prediction_type says",
    ),
)

# Stable Diffusion 1.x and 2.x.
COMPONENTS: Final[dict[str, ComponentSpec]] = {
    "text_encoder": ComponentSpec(
        "text_encoder",
        (_INPUT_IDS,),
        (
            TensorSpec("last_hidden_state", FLOAT, ("batch", "tokens", "text_width"), "normalised"),
            TensorSpec(
                "penultimate_hidden_state",
                FLOAT,
                ("batch", "tokens", "text_width"),
                "output of the last layer but one, not normalised",
            ),
        ),
    ),
    "unet": ComponentSpec("unet", _UNET_INPUTS, _UNET_OUTPUTS),
    "vae_decoder": ComponentSpec(
        "vae_decoder",
        (
            TensorSpec(
                "latents",
                FLOAT,
                ("batch", "latent_channels", "latent_height", "latent_width"),
                "the sampler's latents; scaling_factor and shift_factor are inside the graph",
            ),
        ),
        (TensorSpec("image", FLOAT, ("batch", 3, "height", "width"), "RGB in [-1, 1]"),),
    ),
    "vae_encoder": ComponentSpec(
        "vae_encoder",
        (TensorSpec("image", FLOAT, ("batch", 3, "height", "width"), "RGB in [-1, 1]"),),
        (
            TensorSpec(
                "latent_mean",
                FLOAT,
                ("batch", "latent_channels", "latent_height", "latent_width"),
                "mean of the posterior in the sampler's scale",
            ),
            TensorSpec(
                "latent_std",
                FLOAT,
                ("batch", "latent_channels", "latent_height", "latent_width"),
                "standard deviation of the posterior in the sampler's scale",
            ),
        ),
    ),
}

# SDXL: `encoder_hidden_states` is the penultimate states of both text encoders side by side.
_SDXL_COMPONENTS: Final[dict[str, ComponentSpec]] = {
    "text_encoder": COMPONENTS["text_encoder"],
    "text_encoder_2": ComponentSpec(
        "text_encoder_2",
        (_INPUT_IDS,),
        (
            TensorSpec(
                "penultimate_hidden_state",
                FLOAT,
                ("batch", "tokens", "text_width_2"),
                "output of the last layer but one, not normalised",
            ),
            TensorSpec("text_embeds", FLOAT, ("batch", "projection_width"), "pooled and projected"),
        ),
    ),
    "unet": ComponentSpec(
        "unet",
        (
            *_UNET_INPUTS,
            TensorSpec("text_embeds", FLOAT, ("rows", "projection_width"), "text_encoder_2's text_embeds"),
            TensorSpec(
                "time_ids",
                FLOAT,
                ("rows", 6),
                "original height and width, top and left of the crop, target height and width; pixels",
            ),
        ),
        _UNET_OUTPUTS,
    ),
    "vae_decoder": COMPONENTS["vae_decoder"],
    "vae_encoder": COMPONENTS["vae_encoder"],
}

_BY_FAMILY: Final = {"sd": COMPONENTS, "sdxl": _SDXL_COMPONENTS}
FAMILIES: Final = tuple(_BY_FAMILY)


def components_of(family: str) -> dict[str, ComponentSpec]:
    """The components table of one family, in the order in which they are exported.

    Args:
        family: ``sd`` (Stable Diffusion 1.x and 2.x) or ``sdxl``.

    Raises:
        KeyError: No such family.
    """
    return _BY_FAMILY[family]


def required_components(family: str) -> tuple[str, ...]:
    """Without one of these nothing can be drawn; the VAE's encoder is for image-to-image alone.

    Raises:
        KeyError: No such family.
    """
    return tuple(name for name in components_of(family) if name != "vae_encoder")
