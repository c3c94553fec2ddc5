"""A picture edited as a text says (Brooks et al. 2023, "InstructPix2Pix"), on the networks of SD 1.x or SDXL.

The U-Net reads the picture's latents beside the noisy ones, and is guided by text and by picture: three rows
a picture, of nothing, of the picture alone, and of both. diffusers' pipelines have them in the reverse order,
which is the same to a U-Net: its rows do not see each other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from sdrt.runtime.bundle.families.components import IMAGE_LATENTS, unet
from sdrt.runtime.bundle.families.record import FLOAT, Family, TensorSpec
from sdrt.runtime.bundle.families.sdxl import SDXL, TIME_IDS, UNET_INPUTS
from sdrt.runtime.bundle.families.stable_diffusion import STABLE_DIFFUSION

IMAGE_GUIDANCE_SCALE: Final = "image_guidance_scale"

_IMAGE_LATENTS: Final = TensorSpec(
    IMAGE_LATENTS,
    FLOAT,
    ("rows", "latent_channels", "latent_height", "latent_width"),
    "latents of the picture to edit, not scaled: vae_encoder's mean; zeros in the row of nothing",
)


def _editing(
    family: Family, name: str, title: str, *unet_inputs: TensorSpec, of_request: tuple[str, ...]
) -> Family:
    network = unet(*unet_inputs, _IMAGE_LATENTS, of_request=(*of_request, IMAGE_LATENTS))
    return replace(
        family,
        name=name,
        title=title,
        components={**family.components, network.name: network},
        # Of a run that starts mid-schedule, or of two halves.
        without=("strength", "mask_image", "expand", "variation", "guidance_rescale"),
        spare=frozenset(),
        guided_rows=3,
        picture_input=IMAGE_LATENTS,
        own=(IMAGE_GUIDANCE_SCALE,),
    )


INSTRUCT_PIX2PIX: Final = _editing(STABLE_DIFFUSION, "instruct-pix2pix", "InstructPix2Pix", of_request=())
SDXL_INSTRUCT_PIX2PIX: Final = _editing(
    SDXL, "sdxl-instruct-pix2pix", "InstructPix2Pix of SDXL", *UNET_INPUTS, of_request=(TIME_IDS,)
)
