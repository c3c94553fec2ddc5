"""Stable Diffusion XL (Podell et al. 2023): two text encoders, and sizes that the U-Net is told."""

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
from sdrt.runtime.bundle.families.record import FLOAT, Encoder, Family, PixelOption, TensorSpec
from sdrt.runtime.bundle.families.stable_diffusion import TEXT_ENCODER

TEXT_EMBEDS, TIME_IDS = "text_embeds", "time_ids"

_SIZES: Final = (
    PixelOption("original_size"),
    PixelOption("crops_coords_top_left", of_picture=False),
    PixelOption("target_size"),
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
UNET_INPUTS: Final = (
    TensorSpec(TEXT_EMBEDS, FLOAT, ("rows", "projection_width"), "text_encoder_2's text_embeds"),
    TensorSpec(
        TIME_IDS,
        FLOAT,
        ("rows", 2 * len(_SIZES)),
        "original height and width, top and left of the crop, target height and width; pixels",
    ),
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
        Encoder(
            _TEXT_ENCODER_2.name,
            {ENCODER_HIDDEN_STATES: PENULTIMATE_HIDDEN_STATE, TEXT_EMBEDS: TEXT_EMBEDS},
            tokenizer="tokenizer_2",
            embedding="clip_g",
        ),
    ),
    pixels={TIME_IDS: _SIZES},
    zeros_for_no_text=True,
)
