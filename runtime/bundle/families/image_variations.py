"""Image variations, of diffusers' ``StableDiffusionImageVariationPipeline``.

A picture's CLIP embedding stands in place of a text's (Ramesh et al. 2022, section 3.1); that of "no picture"
is zeros.
"""

from __future__ import annotations

from typing import Final

from sdrt.runtime.bundle.families.components import (
    CLIP_PIXELS,
    ENCODER_HIDDEN_STATES,
    VAE_DECODER,
    VAE_ENCODER,
    by_name,
    unet,
)
from sdrt.runtime.bundle.families.record import FLOAT, ComponentSpec, Encoder, Family, TensorSpec

IMAGE_EMBEDS: Final = "image_embeds"

_IMAGE_ENCODER: Final = ComponentSpec(
    "image_encoder",
    (CLIP_PIXELS,),
    (TensorSpec(IMAGE_EMBEDS, FLOAT, ("batch", 1, "cross_width"), "pooled and projected"),),
)

IMAGE_VARIATIONS: Final = Family(
    name="image-variations",
    title="image variations",
    components=by_name(_IMAGE_ENCODER, unet(), VAE_DECODER, VAE_ENCODER),
    encoders=(Encoder(_IMAGE_ENCODER.name, {ENCODER_HIDDEN_STATES: IMAGE_EMBEDS}),),
    # What a picture in place of a text leaves no room for.
    without=(
        *("negative_prompt", "clip_skip", "plain_prompt", "comma_lookback"),
        *("strength", "mask_image", "expand", "variation"),
    ),
)
