"""Every family by its name: what a manifest names is looked up here."""

from __future__ import annotations

from typing import Final

from sdrt.runtime.bundle.families.depth import STABLE_DIFFUSION_DEPTH
from sdrt.runtime.bundle.families.image_variations import IMAGE_VARIATIONS
from sdrt.runtime.bundle.families.instruct_pix2pix import INSTRUCT_PIX2PIX, SDXL_INSTRUCT_PIX2PIX
from sdrt.runtime.bundle.families.record import Family
from sdrt.runtime.bundle.families.sdxl import SDXL, SDXL_REFINER
from sdrt.runtime.bundle.families.stable_diffusion import STABLE_DIFFUSION
from sdrt.runtime.bundle.families.stable_unclip import STABLE_UNCLIP
from sdrt.runtime.bundle.families.x4_upscaler import X4_UPSCALER

FAMILIES: Final[dict[str, Family]] = {
    family.name: family
    for family in (
        STABLE_DIFFUSION,
        STABLE_DIFFUSION_DEPTH,
        SDXL,
        SDXL_REFINER,
        IMAGE_VARIATIONS,
        INSTRUCT_PIX2PIX,
        SDXL_INSTRUCT_PIX2PIX,
        STABLE_UNCLIP,
        X4_UPSCALER,
    )
}
