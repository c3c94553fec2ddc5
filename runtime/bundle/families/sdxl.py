"""Stable Diffusion XL (Podell et al. 2023): two text encoders, and sizes that the U-Net is told.

And its refiner, which draws the end of the schedule: the second text encoder alone, and how much people are
to like the picture in place of its target size.
"""

from __future__ import annotations

from typing import Final

from sdrt.runtime.bundle.families.components import (
    ENCODER_HIDDEN_STATES,
    PENULTIMATE_HIDDEN_STATE,
    VAE_DECODER,
    VAE_ENCODER,
    by_name,
    hidden_state,
    text_encoder,
    unet,
)
from sdrt.runtime.bundle.families.record import FLOAT, Encoder, Family, TensorSpec
from sdrt.runtime.bundle.families.stable_diffusion import TEXT_ENCODER
from sdrt.runtime.bundle.families.told import PixelOption, ScoreOption, ToldOption

TEXT_EMBEDS, TIME_IDS = "text_embeds", "time_ids"

_SIZES: Final = (
    PixelOption("original_size"),
    PixelOption("crops_coords_top_left", of_picture=False),
    PixelOption("target_size"),
)
_SIZES_AND_SCORE: Final = (
    *_SIZES[:2],
    ScoreOption("aesthetic_score", 6.0, "negative_aesthetic_score", 2.5),  # diffusers' defaults
)
_TEXT_ENCODER_2: Final = text_encoder(
    "text_encoder_2",
    "text_width_2",
    (
        hidden_state(
            PENULTIMATE_HIDDEN_STATE,
            "text_width_2",
            "output of the layer before the last that is not skipped, not normalised",
        ),
        TensorSpec(
            TEXT_EMBEDS, FLOAT, ("batch", "projection_width"), "pooled and projected, of the last layer"
        ),
    ),
)


def _unet_inputs(told: tuple[ToldOption, ...], about: str) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(TEXT_EMBEDS, FLOAT, ("rows", "projection_width"), "text_encoder_2's text_embeds"),
        TensorSpec(TIME_IDS, FLOAT, ("rows", sum(option.count for option in told)), about),
    )


UNET_INPUTS: Final = _unet_inputs(
    _SIZES, "original height and width, top and left of the crop, target height and width; pixels"
)
_ENCODER_2: Final = Encoder(
    _TEXT_ENCODER_2.name,
    {ENCODER_HIDDEN_STATES: PENULTIMATE_HIDDEN_STATE, TEXT_EMBEDS: TEXT_EMBEDS},
    tokenizer="tokenizer_2",
    embedding="clip_g",
)

SDXL: Final = Family(
    name="sdxl",
    title="SDXL",
    components=by_name(
        TEXT_ENCODER,
        _TEXT_ENCODER_2,
        unet(*UNET_INPUTS, of_request=(TIME_IDS,)),
        VAE_DECODER,
        VAE_ENCODER,
    ),
    encoders=(
        Encoder(
            TEXT_ENCODER.name,
            {ENCODER_HIDDEN_STATES: PENULTIMATE_HIDDEN_STATE},
            tokenizer="tokenizer",
            embedding="clip_l",
        ),
        _ENCODER_2,
    ),
    told={TIME_IDS: _SIZES},
    zeros_for_no_text=True,
)

SDXL_REFINER: Final = Family(
    name="sdxl-refiner",
    title="the SDXL refiner",
    components=by_name(
        _TEXT_ENCODER_2,
        unet(
            *_unet_inputs(
                _SIZES_AND_SCORE,
                "original height and width, top and left of the crop in pixels, aesthetic score",
            ),
            of_request=(TIME_IDS,),
        ),
        VAE_DECODER,
        VAE_ENCODER,
    ),
    encoders=(_ENCODER_2,),
    told={TIME_IDS: _SIZES_AND_SCORE},
    zeros_for_no_text=True,
    strength=0.3,  # of diffusers' image-to-image pipeline of SDXL, whose class it is
    refines=(SDXL.name,),
)
