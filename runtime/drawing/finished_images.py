"""Finished pictures and latents, kept batch by batch and handed back in the form that was asked for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.devices.device import Buffer, Device
from sdrt.runtime.drawing.faults import Faults
from sdrt.runtime.drawing.loop import DenoiseLoop
from sdrt.runtime.request.output import OutputType
from sdrt.runtime.request.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image


class BlackImageWarning(UserWarning):
    """A picture came out all black; the message names the component that made it."""


class ImageCollector(Protocol):
    """Takes what the loop's buffers hold after each batch."""

    def add(self, images: Sequence[int], loop: DenoiseLoop, raise_faults: Callable[[Faults], None]) -> None:
        """Keep a batch's result; ``images`` says which images they are, some of them twice to pad it.

        Raises:
            NumericsError: The fault words say that a component gave NaN or infinity.
        """
        ...

    def pictures(self, numbers: Sequence[int]) -> Any:
        """Those with these numbers, in the form that was asked for; of latents none."""
        ...

    def finish(self) -> tuple[Any, Any]:
        """All images, in the form that was asked for, and all latents."""
        ...


def image_collector(request: Request, device: Device) -> ImageCollector:
    """What keeps a request's images: in main memory, or in the device's."""
    if request.output_type == "device":
        return DeviceImages(device, len(request.conditions))
    return HostImages(request)


class HostImages:
    """Pictures and latents in main memory; with a given picture's pixels where nothing was to be drawn."""

    def __init__(self, request: Request) -> None:
        """Nothing is there yet."""
        self._request = request
        self._latents: dict[int, NDArray[np.float32]] = {}
        self._pixels: dict[int, NDArray[np.uint8]] = {}
        self._black: set[int] = set()

    def add(self, images: Sequence[int], loop: DenoiseLoop, raise_faults: Callable[[Faults], None]) -> None:
        """See `ImageCollector`; one download, which waits."""
        result = loop.result(pixels=self._request.decodes)
        raise_faults(result.faults)
        self._latents.update(zip(images, result.latents, strict=True))
        if result.pixels is None:
            return
        drawn = dict(zip(images, result.pixels, strict=True))
        self._black |= {number for number, pixels in drawn.items() if not pixels.any()}
        finished = self._with_kept_pixels(np.stack(list(drawn.values())))
        self._pixels.update(zip(drawn, finished, strict=True))

    def pictures(self, numbers: Sequence[int]) -> Any:
        """See `ImageCollector`."""
        if not self._request.decodes:
            return []
        return _AS[self._request.output_type](np.stack([self._pixels[image] for image in numbers]))

    def finish(self) -> tuple[Any, NDArray[np.float32]]:
        """See `ImageCollector`."""
        numbers = range(len(self._request.conditions))
        latents = np.stack([self._latents[image] for image in numbers])
        if not self._request.decodes:
            return latents if self._request.output_type == "latent" else [], latents
        for number in sorted(self._black):
            warnings.warn(
                f"picture {number + 1} of {len(numbers)} is all black; its latents are finite, so the "
                "vae_decoder made it so",
                BlackImageWarning,
                stacklevel=2,
            )
        return self.pictures(numbers), latents

    def _with_kept_pixels(self, drawn: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self._request.picture is None:
            return drawn
        from sdrt.runtime.pictures.canvas import finish

        return finish(drawn, self._request.picture.canvas)


class DeviceImages:
    """The same in the device's memory: copies there, since the loop writes over its own buffers."""

    def __init__(self, device: Device, images: int) -> None:
        """Make room for ``images`` as soon as their shape is known."""
        self._device = device
        self._images = images
        self._arrays: tuple[Buffer, Buffer] | None = None  # images, latents
        self._rows: dict[str, list[Buffer]] = {}

    def add(self, images: Sequence[int], loop: DenoiseLoop, raise_faults: Callable[[Faults], None]) -> None:
        """See `ImageCollector`; only the fault words are downloaded, and the copies queued."""
        raise_faults(loop.faults())
        if self._arrays is None:
            self._arrays = (self._room("pixels", loop.pixels), self._room("latents", loop.buffers.latents))
        for name, rows in self._rows.items():
            for image, source in dict(zip(images, loop.arena.rows(name), strict=True)).items():
                self._device.copy(source, rows[image])

    def pictures(self, numbers: Sequence[int]) -> list[Buffer]:
        """Those with these numbers, uint8 [1, H, W, 3] each."""
        return [self._rows["pixels"][image] for image in numbers]

    def finish(self) -> tuple[Buffer, Buffer]:
        """uint8 images [N, H, W, 3] and float32 latents [N, C, h, w]."""
        assert self._arrays is not None  # a call has at least one batch
        return self._arrays

    def _room(self, name: str, like: Buffer) -> Buffer:
        """An array for all images, and a view of it for each."""
        rest, dtype = tuple(like.shape[1:]), np.dtype(like.dtype)
        each = math.prod(rest) * dtype.itemsize
        memory = self._device.zeros((self._images * each,), "uint8")
        view = self._device.view
        self._rows[name] = [view(memory, each * row, (1, *rest), dtype) for row in range(self._images)]
        return view(memory, 0, (self._images, *rest), dtype)


def _in_unit_interval(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return pixels.astype(np.float32) / np.float32(255)


def _pillow(pixels: NDArray[np.uint8]) -> list[Image]:
    from PIL import Image  # 20 ms that a caller who wants arrays need not spend

    return [Image.fromarray(picture) for picture in pixels]


_AS: Final[Mapping[OutputType, Callable[[NDArray[np.uint8]], Any]]] = {
    "pil": _pillow,
    "numpy": lambda pixels: pixels,
    "np": _in_unit_interval,
}
