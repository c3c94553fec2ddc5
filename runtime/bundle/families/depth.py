"""Stable Diffusion 2 with a depth map, of diffusers' ``StableDiffusionDepth2ImgPipeline``.

The U-Net reads the map beside the noisy latents, at their size. The network that guesses it from a picture
is not part of a bundle: the map is given.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from sdrt.runtime.bundle.families.components import DEPTH, unet
from sdrt.runtime.bundle.families.record import FLOAT, TensorSpec
from sdrt.runtime.bundle.families.stable_diffusion import STABLE_DIFFUSION

DEPTH_MAP: Final = "depth_map"

_UNET: Final = unet(
    TensorSpec(
        DEPTH,
        FLOAT,
        ("rows", 1, "latent_height", "latent_width"),
        "depth map, -1 is farthest and 1 nearest",
    ),
    of_request=(DEPTH,),
)

STABLE_DIFFUSION_DEPTH: Final = replace(
    STABLE_DIFFUSION,
    name="sd-depth",
    title="Stable Diffusion with depth maps",
    components={**STABLE_DIFFUSION.components, _UNET.name: _UNET},
    without=("mask_image", "expand"),  # of a canvas that the map does not cover
    own=(DEPTH_MAP,),
)
