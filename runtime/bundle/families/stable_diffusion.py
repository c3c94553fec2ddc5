"""Stable Diffusion 1.x and 2.x, inpainting and latent consistency models among them (Rombach et al. 2022)."""

from __future__ import annotations

from typing import Final

from sdrt.runtime.bundle.families.components import (
    ENCODER_HIDDEN_STATES,
    LAST_HIDDEN_STATE,
    PENULTIMATE_HIDDEN_STATE,
    VAE_DECODER,
    VAE_ENCODER,
    by_name,
    hidden_state,
    text_encoder,
    unet,
)
from sdrt.runtime.bundle.families.record import Encoder, Family

TEXT_ENCODER: Final = text_encoder(
    "text_encoder",
    "text_width",
    (
        hidden_state(LAST_HIDDEN_STATE, "text_width"),
        hidden_state(PENULTIMATE_HIDDEN_STATE, "text_width"),
    ),
)

STABLE_DIFFUSION: Final = Family(
    name="sd",
    title="Stable Diffusion",
    components=by_name(TEXT_ENCODER, unet(), VAE_DECODER, VAE_ENCODER),
    encoders=(Encoder(TEXT_ENCODER.name, {ENCODER_HIDDEN_STATES: LAST_HIDDEN_STATE}, tokenizer="tokenizer"),),
)
