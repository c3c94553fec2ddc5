"""The x4 upscaler of Stable Diffusion 2: a small picture, with some noise laid over it, four times as large.

Its latents have the small picture's size (the VAE's factor is 4), and the U-Net reads its pixels beside them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from sdrt.runtime.bundle.families.components import LOW_RES, NOISE_LEVEL, VAE_DECODER, by_name, unet
from sdrt.runtime.bundle.families.record import FLOAT, TensorSpec
from sdrt.runtime.bundle.families.stable_diffusion import STABLE_DIFFUSION, TEXT_ENCODER

X4_UPSCALER: Final = replace(
    STABLE_DIFFUSION,
    name="x4-upscaler",
    title="the x4 upscaler",
    components=by_name(
        TEXT_ENCODER,
        unet(
            TensorSpec(
                LOW_RES,
                FLOAT,
                ("rows", 3, "latent_height", "latent_width"),
                "the small picture, RGB in [-1, 1], with noise as the manifest's noising says",
            ),
            TensorSpec(
                NOISE_LEVEL, "int64", ("rows",), "how much noise that is, 0 to the manifest's max_level"
            ),
            of_request=(LOW_RES, NOISE_LEVEL),
        ),
        VAE_DECODER,
    ),
    without=("strength", "mask_image", "expand", "variation"),
    spare=frozenset(),
    picture_input=LOW_RES,
    picture_blank=False,
    picture_alone=True,
    noise_level=20,
    own=(NOISE_LEVEL,),
)
