"""Image variations: what a picture in place of a text conditions (Ramesh et al. 2022, section 3.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.checks import whole
from sdrt.runtime.errors import UsageError
from sdrt.runtime.request.picture import picture_recipe
from sdrt.runtime.request.texts import MAX_IMAGES, Conditions

_NEUTRAL: Final = ("negative_prompt", "clip_skip", "plain_prompt")  # such as a recipe has them


class ClipImage:
    """A picture as CLIP's image encoder takes it. Equal to another if it shows the same.

    Attributes:
        pixels: float32 [1, 3, S, S].
    """

    def __init__(self, pixels: NDArray[np.float32]) -> None:
        """Keep the pixels."""
        self.pixels = pixels
        self._digest = hashlib.sha256(pixels.tobytes()).digest()

    def __eq__(self, other: object) -> bool:
        """See the class."""
        return isinstance(other, ClipImage) and self._digest == other._digest

    def __hash__(self) -> int:
        """See the class."""
        return hash(self._digest)


def image_conditions(
    manifest: Manifest, prompt: str | Sequence[str] | None, options: Mapping[str, Any]
) -> Conditions:
    """Check what of a call's options is about the picture that is varied.

    Raises:
        UsageError: There is no image, it cannot be read, or an option is given that only texts have.
    """
    from sdrt.runtime.pictures.canvas import clip_pixels
    from sdrt.runtime.pictures.reading import read_image

    if prompt not in (None, ""):  # such as a recipe has it
        raise UsageError("a prompt is given: this bundle draws variations of an image and reads no text")
    if options.get("image") is None:
        raise UsageError("the image is missing: this bundle draws variations of one")
    for name in manifest.record.without:
        if name in options and not _is_neutral(name, options[name]):
            raise UsageError(f"{name} is given: a bundle of image variations has no such thing")
    images = whole("num_images_per_prompt", options.get("num_images_per_prompt", 1))
    if not 1 <= images <= MAX_IMAGES:
        raise UsageError(f"num_images_per_prompt is {images}: a whole number from 1 to {MAX_IMAGES}")
    assert manifest.image_processor is not None  # every manifest of the family has one
    shown = read_image(options["image"])
    picture = ClipImage(clip_pixels(shown, manifest.image_processor))
    text = {"prompt": "", "negative_prompt": "", **picture_recipe(options, "image", shown)}
    return Conditions([picture] * images, [None] * images, [text] * images, [()] * images)


def _is_neutral(name: str, value: object) -> bool:
    """Whether it asks for nothing. Of a share, 0 is an answer; an array is neither true nor false."""
    return name in _NEUTRAL and not value
