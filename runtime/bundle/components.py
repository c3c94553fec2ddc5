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
# `context` is what the U-Net's cross-attention reads: the text encoder's tokens, once for each chunk of a
# prompt.
DYNAMIC_AXES: Final = frozenset(
    {"batch", "rows", "height", "width", "latent_height", "latent_width", "context"}
)


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
    """Inputs and outputs of one component, in the graph's order.

    ``optional`` names inputs that not every graph has: of some kinds of checkpoints, or of bundles that were
    written since they exist. Each has at least one axis whose size only those checkpoints give.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    optional: frozenset[str] = frozenset()

    def resolve(self, sizes: Mapping[str, int], precision: Precision) -> ComponentSpec:
        """The same component with one checkpoint's sizes and precision filled in.

        Of the optional inputs those stay whose sizes the checkpoint has.
        """
        return ComponentSpec(
            self.name,
            tuple(spec.resolve(sizes, precision) for spec in self.inputs if self._has(spec, sizes)),
            tuple(spec.resolve(sizes, precision) for spec in self.outputs),
        )

    def _has(self, spec: TensorSpec, sizes: Mapping[str, int]) -> bool:
        named = {axis for axis in spec.shape if isinstance(axis, str)} - DYNAMIC_AXES
        return spec.name not in self.optional or named <= set(sizes)

    def input(self, name: str) -> TensorSpec | None:
        """The input of that name, if there is one."""
        return next((spec for spec in self.inputs if spec.name == name), None)


_INPUT_IDS: Final = TensorSpec(
    "input_ids", "int64", ("batch", "tokens"), "token ids; -1 where custom_embeddings stands for the token"
)
# Bundles of format version 3 have both in every text encoder.
_CLIP_SKIP: Final = TensorSpec(
    "clip_skip", "int64", ("skips",), "how many of the last layers are left out: 0 for none"
)


def _custom_embeddings(width: str) -> TensorSpec:
    return TensorSpec(
        "custom_embeddings",
        FLOAT,
        ("batch", "tokens", width),
        "of textual inversion; read where input_ids is -1",
    )


_TEXT_OPTIONAL: Final = frozenset({"custom_embeddings", "clip_skip"})
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
    TensorSpec("encoder_hidden_states", FLOAT, ("rows", "context", "cross_width"), "text embeddings"),
)
# What only some checkpoints have.
_UNET_OPTIONAL_INPUTS: Final = (
    TensorSpec(
        "timestep_cond",
        FLOAT,
        ("rows", "guidance_width"),
        "sinusoidal embedding of the guidance scale less 1: of latent consistency models",
    ),
    TensorSpec(
        "inpainting",
        FLOAT,
        ("rows", "inpainting_channels", "latent_height", "latent_width"),
        "mask (1 is drawn), then the masked picture's latents: of inpainting checkpoints",
    ),
)
_UNET_OPTIONAL: Final = frozenset(spec.name for spec in _UNET_OPTIONAL_INPUTS)
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
        (_INPUT_IDS, _custom_embeddings("text_width"), _CLIP_SKIP),
        (
            TensorSpec(
                "last_hidden_state",
                FLOAT,
                ("batch", "tokens", "text_width"),
                "output of the last layer that is not skipped, normalised",
            ),
            TensorSpec(
                "penultimate_hidden_state",
                FLOAT,
                ("batch", "tokens", "text_width"),
                "output of the layer before that, not normalised",
            ),
        ),
        _TEXT_OPTIONAL,
    ),
    "unet": ComponentSpec("unet", (*_UNET_INPUTS, *_UNET_OPTIONAL_INPUTS), _UNET_OUTPUTS, _UNET_OPTIONAL),
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
        (_INPUT_IDS, _custom_embeddings("text_width_2"), _CLIP_SKIP),
        (
            TensorSpec(
                "penultimate_hidden_state",
                FLOAT,
                ("batch", "tokens", "text_width_2"),
                "output of the layer before the last that is not skipped, not normalised",
            ),
            TensorSpec(
                "text_embeds", FLOAT, ("batch", "projection_width"), "pooled and projected, of the last layer"
            ),
        ),
        _TEXT_OPTIONAL,
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
            *_UNET_OPTIONAL_INPUTS,
        ),
        _UNET_OUTPUTS,
        _UNET_OPTIONAL,
    ),
    "vae_decoder": COMPONENTS["vae_decoder"],
    "vae_encoder": COMPONENTS["vae_encoder"],
}

# Image variations (the `StableDiffusionImageVariationPipeline` kind): a picture's embedding in place of a
# text's; that of "no picture" is zeros.
_IMAGE_VARIATIONS_COMPONENTS: Final[dict[str, ComponentSpec]] = {
    "image_encoder": ComponentSpec(
        "image_encoder",
        (
            TensorSpec(
                "pixel_values",
                FLOAT,
                ("batch", 3, "encoder_size", "encoder_size"),
                "RGB as the manifest's image_processor says",
            ),
        ),
        (TensorSpec("image_embeds", FLOAT, ("batch", 1, "cross_width"), "pooled and projected"),),
    ),
    "unet": COMPONENTS["unet"],
    "vae_decoder": COMPONENTS["vae_decoder"],
    "vae_encoder": COMPONENTS["vae_encoder"],
}

_BY_FAMILY: Final = {
    "sd": COMPONENTS,
    "sdxl": _SDXL_COMPONENTS,
    "image-variations": _IMAGE_VARIATIONS_COMPONENTS,
}
FAMILIES: Final = tuple(_BY_FAMILY)


def components_of(family: str) -> dict[str, ComponentSpec]:
    """The components table of one family, in the order in which they are exported.

    Args:
        family: ``sd`` (Stable Diffusion 1.x and 2.x), ``sdxl`` or ``image-variations``.

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
