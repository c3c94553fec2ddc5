"""Image variations: a picture's CLIP embedding in place of a text's (Ramesh et al. 2022, section 3.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.backends.executor import Executor
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.checks import whole
from sdrt.runtime.devices.arena import Arena
from sdrt.runtime.devices.device import Device
from sdrt.runtime.drawing.faults import Faults
from sdrt.runtime.drawing.loop import DenoiseLoop
from sdrt.runtime.errors import NumericsError, UsageError
from sdrt.runtime.request.picture import picture_recipe
from sdrt.runtime.request.request import Request, with_sampling
from sdrt.runtime.request.texts import MAX_IMAGES
from sdrt.runtime.samplers.noise import Rng
from sdrt.runtime.samplers.table import SamplerTable

_NEUTRAL: Final = ("negative_prompt", "clip_skip", "plain_prompt")  # such as a recipe has them


class Picture:
    """A picture as the image encoder takes it. Equal to another if it shows the same.

    Attributes:
        pixels: float32 [1, 3, S, S].
    """

    def __init__(self, pixels: NDArray[np.float32]) -> None:
        """Keep the pixels."""
        self.pixels = pixels
        self._digest = hashlib.sha256(pixels.tobytes()).digest()

    def __eq__(self, other: object) -> bool:
        """See the class."""
        return isinstance(other, Picture) and self._digest == other._digest

    def __hash__(self) -> int:
        """See the class."""
        return hash(self._digest)


def build_variations(
    manifest: Manifest, prompt: str | Sequence[str] | None, options: Mapping[str, Any], rng: Rng
) -> Request:
    """The request for variations of ``image``.

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
    picture: Hashable = Picture(clip_pixels(shown, manifest.image_processor))
    text = {
        "prompt": "",
        "negative_prompt": "",
        **picture_recipe(options, "image", shown),
    }
    return with_sampling(manifest, options, rng, None, [picture] * images, [None] * images, [text] * images)


def _is_neutral(name: str, value: object) -> bool:
    """Whether it asks for nothing. Of a share, 0 is an answer; an array is neither true nor false."""
    return name in _NEUTRAL and not value


class ImageEncoder:
    """The image encoder, with the embedding of the picture that was encoded last."""

    def __init__(self, encoder: Executor, gives: Mapping[str, str], device: Device, *, batch: int) -> None:
        """Allocate the encoder's buffers and bind it to them.

        Args:
            encoder: On the device.
            gives: Input of the U-Net → its output, see `sdrt.runtime.bundle.families.record.Encoder`.
            device: Owns the buffers.
            batch: The smallest batch that the graph admits; every row of it holds the same picture.

        Raises:
            DeviceMemoryError: The buffers do not fit.
        """
        self._device, self._name, self._batch = device, encoder.spec.name, batch
        (source,), (result,) = encoder.spec.inputs, encoder.spec.outputs
        (self._target,) = gives
        axes = {"batch": batch}
        arena = Arena(device, {entry.name: (entry.concrete(axes), entry.dtype) for entry in (source, result)})
        self._pixels, self._embeddings = arena[source.name], arena[result.name]
        self._row = arena.rows(result.name)[0]
        self._evaluate = encoder.bind({source.name: self._pixels}, {result.name: self._embeddings})
        self._latest: Picture | None = None

    def chunks(self, condition: Hashable) -> int:  # noqa: ARG002 - of the protocol
        """A picture is one."""
        return 1

    def write(self, rows: Sequence[Hashable], loop: DenoiseLoop, chunks: int) -> None:  # noqa: ARG002
        """Put embeddings into the rows of a loop's conditioning; zeros for None, as in training.

        Raises:
            NumericsError: The encoder gave NaN or infinity.
        """
        for target, fault, condition in zip(
            loop.conditioning[self._target], loop.text_faults, rows, strict=True
        ):
            self._device.clear(fault)
            if condition is None:
                self._device.clear(target)
                continue
            assert isinstance(condition, Picture)
            self._encode(condition)
            self._device.copy(self._row, target)

    def raise_faults(self, faults: Faults, table: SamplerTable, rows: Sequence[Hashable]) -> None:
        """See `PromptEncoder.raise_faults` in `text_conditioning`; the encoder's were raised by `write`."""
        faults.raise_if_any(table, ["" for _ in rows], [self._name])

    def _encode(self, picture: Picture) -> None:
        if picture == self._latest:
            return
        self._latest = None
        self._device.upload(np.repeat(picture.pixels, self._batch, axis=0), self._pixels)
        self._evaluate()
        if not np.isfinite(self._device.download(self._embeddings)).all():
            raise NumericsError(f"the {self._name} gave NaN or infinity for the image")
        self._latest = picture
