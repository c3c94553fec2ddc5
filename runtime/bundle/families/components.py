"""Components that several families have: CLIP's text encoders, the U-Net, the VAE; and their tensors' names.

No other part of runtime or export spells the tensors' names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sdrt.runtime.bundle.families.record import FLOAT, ComponentSpec, TensorSpec

# Of text encoders.
INPUT_IDS, CUSTOM_EMBEDDINGS, CLIP_SKIP = "input_ids", "custom_embeddings", "clip_skip"
LAST_HIDDEN_STATE, PENULTIMATE_HIDDEN_STATE = "last_hidden_state", "penultimate_hidden_state"
# Of the U-Net.
SAMPLE, TIMESTEP, ENCODER_HIDDEN_STATES = "sample", "timestep", "encoder_hidden_states"
TIMESTEP_COND, INPAINTING, DEPTH = "timestep_cond", "inpainting", "depth"
IMAGE_LATENTS, CLASS_LABELS, LOW_RES = "image_latents", "class_labels", "low_res"
NOISE_LEVEL = "noise_level"
NOISE_PRED = "noise_pred"
# Of image encoders.
PIXEL_VALUES = "pixel_values"
# Of the VAE.
LATENTS, IMAGE, LATENT_MEAN, LATENT_STD = "latents", "image", "latent_mean", "latent_std"

_STATES: Final[Mapping[str, str]] = {
    LAST_HIDDEN_STATE: "output of the last layer that is not skipped, normalised",
    PENULTIMATE_HIDDEN_STATE: "output of the layer before that, not normalised",
}
_LATENT_AXES: Final = ("latent_channels", "latent_height", "latent_width")
_PICTURE: Final = TensorSpec(IMAGE, FLOAT, ("batch", 3, "height", "width"), "RGB in [-1, 1]")


def text_encoder(name: str, width: str, outputs: tuple[TensorSpec, ...]) -> ComponentSpec:
    """One of CLIP's text encoders.

    Args:
        name: The component's.
        width: The axis that its hidden states have for each token.
        outputs: What it gives.
    """
    ids = TensorSpec(
        INPUT_IDS, "int64", ("batch", "tokens"), "token ids; -1 where custom_embeddings stands for the token"
    )
    custom = TensorSpec(
        CUSTOM_EMBEDDINGS,
        FLOAT,
        ("batch", "tokens", width),
        "of textual inversion; read where input_ids is -1",
    )
    skip = TensorSpec(CLIP_SKIP, "int64", ("skips",), "how many of the last layers are left out: 0 for none")
    return ComponentSpec(name, (ids, custom, skip), outputs)


def hidden_state(name: str, width: str, about: str = "") -> TensorSpec:
    """One of a text encoder's hidden states, `LAST_HIDDEN_STATE` or `PENULTIMATE_HIDDEN_STATE`."""
    return TensorSpec(name, FLOAT, ("batch", "tokens", width), about or _STATES[name])


def unet(*more: TensorSpec, of_request: tuple[str, ...] = ()) -> ComponentSpec:
    """The U-Net. ``rows`` is its batch: under guidance twice the images, the unconditional half first, or as
    many times as `sdrt.runtime.bundle.families.record.Family.guided_rows` says.

    Args:
        more: What a family's U-Net reads beside what all of them do, a few numbers for each row.
        of_request: Those of them that no encoder gives.
    """
    inputs = (
        TensorSpec(
            SAMPLE,
            FLOAT,
            ("rows", "unet_channels", "latent_height", "latent_width"),
            "noisy latents, scaled as the sampler says",
        ),
        # float32 in every precision: a fractional timestep must not be rounded to fp16.
        TensorSpec(TIMESTEP, "float32", ("rows",), "0 … num_train_timesteps − 1, may be fractional"),
        TensorSpec(ENCODER_HIDDEN_STATES, FLOAT, ("rows", "context", "cross_width"), "text embeddings"),
    )
    of_some_checkpoints = (
        TensorSpec(
            TIMESTEP_COND,
            FLOAT,
            ("rows", "guidance_width"),
            "sinusoidal embedding of the guidance scale less 1: of latent consistency models",
        ),
        TensorSpec(
            INPAINTING,
            FLOAT,
            ("rows", "inpainting_channels", "latent_height", "latent_width"),
            "mask (1 is drawn), then the masked picture's latents: of inpainting checkpoints",
        ),
    )
    noise_pred = TensorSpec(
        NOISE_PRED,
        FLOAT,
        ("rows", *_LATENT_AXES),
        "epsilon or v, as the schedule's prediction_type says",
    )
    optional = tuple(spec.name for spec in of_some_checkpoints)
    return ComponentSpec(
        "unet",
        (*inputs, *more, *of_some_checkpoints),
        (noise_pred,),
        frozenset(optional),
        (*of_request, *optional),
        # The texts stay for a picture; the rest does too, or, as the timesteps, takes few values.
        (
            (ENCODER_HIDDEN_STATES,),
            (TIMESTEP, TIMESTEP_COND, *(spec.name for spec in more if "latent_height" not in spec.shape)),
        ),
    )


CLIP_PIXELS: Final = TensorSpec(
    PIXEL_VALUES,
    FLOAT,
    ("batch", 3, "encoder_size", "encoder_size"),
    "RGB as the manifest's image_processor says",
)
VAE_DECODER: Final = ComponentSpec(
    "vae_decoder",
    (
        TensorSpec(
            LATENTS,
            FLOAT,
            ("batch", *_LATENT_AXES),
            "the sampler's latents; scaling_factor and shift_factor are inside the graph",
        ),
    ),
    (_PICTURE,),
)
VAE_ENCODER: Final = ComponentSpec(
    "vae_encoder",
    (_PICTURE,),
    (
        TensorSpec(
            LATENT_MEAN, FLOAT, ("batch", *_LATENT_AXES), "mean of the posterior in the sampler's scale"
        ),
        TensorSpec(
            LATENT_STD,
            FLOAT,
            ("batch", *_LATENT_AXES),
            "standard deviation of the posterior in the sampler's scale",
        ),
    ),
)


def by_name(*components: ComponentSpec) -> dict[str, ComponentSpec]:
    """Components as a family's record lists them."""
    return {component.name: component for component in components}
