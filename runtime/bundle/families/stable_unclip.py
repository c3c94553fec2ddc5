"""Stable unCLIP: variations of a picture by its CLIP embedding, beside a text (Ramesh et al. 2022, "unCLIP").

Stable Diffusion 2.1's networks, and a U-Net that is told the embedding with noise laid over it, and how much.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from sdrt.runtime.bundle.families.components import (
    CLASS_LABELS,
    CLIP_PIXELS,
    NOISE_LEVEL,
    VAE_DECODER,
    by_name,
    unet,
)
from sdrt.runtime.bundle.families.record import FLOAT, ComponentSpec, TensorSpec
from sdrt.runtime.bundle.families.stable_diffusion import STABLE_DIFFUSION, TEXT_ENCODER

LABEL_MEAN, LABEL_STD = "label_mean", "label_std"

IMAGE_ENCODER: Final = ComponentSpec(
    "image_encoder",
    (
        CLIP_PIXELS,
        TensorSpec(NOISE_LEVEL, "int64", ("batch",), "of the embedding, 0 to the manifest's max_level"),
    ),
    (
        TensorSpec(
            LABEL_MEAN,
            FLOAT,
            ("batch", "label_width"),
            "class_labels without noise: embedding, then its level",
        ),
        TensorSpec(
            LABEL_STD,
            FLOAT,
            ("batch", "label_width"),
            "what the noise is multiplied with; 0 in the second half",
        ),
    ),
)

STABLE_UNCLIP: Final = replace(
    STABLE_DIFFUSION,
    name="stable-unclip",
    title="Stable unCLIP",
    components=by_name(
        TEXT_ENCODER,
        IMAGE_ENCODER,
        unet(
            TensorSpec(
                CLASS_LABELS,
                FLOAT,
                ("rows", "label_width"),
                "label_mean + label_std · noise of the picture; zeros in the row of nothing",
            ),
            of_request=(CLASS_LABELS,),
        ),
        VAE_DECODER,
    ),
    without=("strength", "mask_image", "expand", "variation"),
    spare=frozenset(),
    picture_input=CLASS_LABELS,
    picture_alone=True,
    noise_level=0,
    own=(NOISE_LEVEL,),
)
