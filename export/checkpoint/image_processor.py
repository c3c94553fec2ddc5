"""``preprocessor_config.json`` → how an image encoder wants its picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sdrt.runtime.bundle.manifest import ImageProcessorFacts
from sdrt.runtime.errors import CheckpointError

# What transformers' CLIPImageProcessor takes where the file does not say: OpenAI's CLIP.
CLIP_SIZE: Final = 224
CLIP_MEAN: Final = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD: Final = [0.26862954, 0.26130258, 0.27577711]
# The steps that `ImageProcessorFacts` stands for; a file that leaves one out means another picture.
STEPS: Final = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
BICUBIC: Final = 3  # of Pillow's filters


def image_processor_from_config(file: Path, config: Mapping[str, Any]) -> ImageProcessorFacts:
    """Read what a CLIPImageProcessor (or the older CLIPFeatureExtractor) was saved with.

    Args:
        file: Where it was read, for the messages.
        config: Its contents.

    Raises:
        CheckpointError: A value is malformed, or asks for something else than bicubic resizing of the
            shorter side, a square crop from the middle and normalisation.
    """
    for step in STEPS:
        if config.get(step, True) is not True:
            raise CheckpointError(f"{file}: {step} is {config[step]!r}; only true is supported")
    if config.get("resample", BICUBIC) != BICUBIC:
        raise CheckpointError(
            f"{file}: resample is {config['resample']!r}; only {BICUBIC}, bicubic, is supported"
        )
    factor = config.get("rescale_factor", 1 / 255)
    if not _are_numbers([factor]) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise CheckpointError(f"{file}: rescale_factor is {factor!r}; only 1/255 is supported")
    size, crop = (_side(file, config, key) for key in ("size", "crop_size"))
    if size != crop:
        raise CheckpointError(
            f"{file}: size is {size} and crop_size {crop}; only one size for both is supported"
        )
    mean, std = _triple(file, config, "image_mean", CLIP_MEAN), _triple(file, config, "image_std", CLIP_STD)
    if min(std) <= 0:
        raise CheckpointError(f"{file}: image_std is {list(std)}; it must be above 0")
    return ImageProcessorFacts(size, mean, std)


def _side(file: Path, config: Mapping[str, Any], key: str) -> int:
    """A size as the versions of transformers write it: n, ``shortest_edge``, or equal height and width."""
    value = config.get(key, CLIP_SIZE)
    sides = list(value.values()) if isinstance(value, dict) else [value]
    side = sides[0] if sides and all(other == sides[0] for other in sides) else None
    if type(side) is not int or side < 1:
        raise CheckpointError(f"{file}: {key} is {value!r}; it must be one whole number of pixels")
    return side


def _triple(
    file: Path, config: Mapping[str, Any], key: str, default: list[float]
) -> tuple[float, float, float]:
    value = config.get(key, default)
    if not isinstance(value, list) or len(value) != 3 or not _are_numbers(value):
        raise CheckpointError(f"{file}: {key} is {value!r}; it must be three numbers")
    red, green, blue = (float(number) for number in value)
    return red, green, blue


def _are_numbers(values: list[Any]) -> bool:
    return all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        for value in values
    )
