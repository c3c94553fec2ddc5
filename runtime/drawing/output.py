"""What a call gives back: pictures in the form that was asked for, latents, recipes, timings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.devices.device import Buffer, Device
from sdrt.runtime.drawing.loop import DenoiseLoop
from sdrt.runtime.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdrt.runtime.pictures.canvas import Canvas

OutputType = Literal["pil", "numpy", "latents", "device", "np", "latent"]
OUTPUT_TYPES: Final = ("pil", "numpy", "latents", "device", "np", "latent")
WITHOUT_PICTURES: Final = ("latents", "latent")


class BlackImageWarning(UserWarning):
    """A picture came out all black; the message names the component that made it."""


@dataclass(frozen=True, slots=True)
class PipelineOutput:
    """What a call of `Pipeline` returns.

    Attributes:
        images: Pillow images, or one uint8 array [N, H, W, 3] for ``output_type="numpy"``; empty for
            ``"latents"``. For ``"device"`` that array in the device's memory (on the CPU a NumPy array). As
            diffusers has them, for ``"np"`` float32 [N, H, W, 3] in [0, 1], for ``"latent"`` the latents.
        latents: float32 [N, C, h, w], the final latents; for ``"device"`` in the device's memory.
        recipes: For each image everything that drew it, as plain data: ``prompt``, ``negative_prompt``,
            ``seed``, ``height``, ``width``, ``num_inference_steps``, ``guidance_scale``, ``sampler``,
            ``karras``, ``eta``, ``rng``, what else was asked for, SDXL's sizes, given pictures' file names
            and SHA-256, ``backend``, ``model``, ``model_sha256``, ``version``. As arguments of a call they
            draw the image again (see `sdrt.runtime.request.recipes`).
        timings: Seconds per stage: ``text_encoder``, ``denoise``, ``vae_decoder`` by the device's clock,
            ``vae_encoder`` and ``invert`` where a picture was given, by wall clock, ``step``, the mean of one
            step, and ``total``, wall clock from call to return.
    """

    images: Any
    latents: Any
    recipes: tuple[dict[str, Any], ...]
    timings: dict[str, float]


@dataclass(frozen=True, slots=True)
class FinishedBatch:
    """Pictures of a call that are finished while others are not: what ``callback_on_batch_end`` is given.

    Attributes:
        numbers: Which of the call's pictures they are, from 0.
        total: How many the call draws.
        images: As `PipelineOutput.images`, of these alone; for ``"device"`` a list of arrays [1, H, W, 3].
        recipes: Likewise.
    """

    numbers: tuple[int, ...]
    total: int
    images: Any
    recipes: tuple[dict[str, Any], ...]


class Collected:
    """Pictures and latents of one batch after the other, in main memory."""

    def __init__(self, output_type: OutputType, images: int, canvas: Canvas | None = None) -> None:
        """``images`` are wanted; ``canvas`` holds what is to be kept of a given picture."""
        self._output_type, self._images, self._canvas = output_type, images, canvas
        self._latents: dict[int, NDArray[np.float32]] = {}
        self._pixels: dict[int, NDArray[np.uint8]] = {}

    def finish(self) -> tuple[Any, NDArray[np.float32]]:
        """Images as ``output_type`` says, and latents."""
        latents = np.stack([self._latents[image] for image in range(self._images)])
        if self._output_type in WITHOUT_PICTURES:
            return latents if self._output_type == "latent" else [], latents
        _warn_of_black(np.stack([self._pixels[image] for image in range(self._images)]))
        return self.pictures(range(self._images)), latents

    def pictures(self, numbers: Sequence[int]) -> Any:
        """Those with these numbers, as ``output_type`` says; of latents none."""
        if self._output_type in WITHOUT_PICTURES:
            return []
        pixels = np.stack([self._pixels[image] for image in numbers])
        if self._canvas is not None:
            from sdrt.runtime.pictures.canvas import finish

            pixels = finish(pixels, self._canvas)
        return _AS[self._output_type](pixels)

    def add(
        self, batch: Sequence[int], latents: NDArray[np.float32], pixels: NDArray[np.uint8] | None
    ) -> None:
        """Keep a batch's result; ``batch`` says which images they are, some of them twice to pad it."""
        self._latents.update(zip(batch, latents, strict=True))
        if pixels is not None:
            self._pixels.update(zip(batch, pixels, strict=True))


class DeviceCollected:
    """The same in the device's memory: copies there, since the loop writes over its own buffers."""

    def __init__(self, device: Device, images: int) -> None:
        """Make room for ``images`` as soon as their shape is known."""
        self._device = device
        self._images = images
        self._arrays: tuple[Buffer, Buffer] | None = None  # images, latents
        self._rows: dict[str, list[Buffer]] = {}

    def add(self, batch: Sequence[int], loop: DenoiseLoop) -> None:
        """Queue the copies of a batch; ``batch`` says which images they are."""
        if self._arrays is None:
            self._arrays = (self._room("pixels", loop.pixels), self._room("latents", loop.buffers.latents))
        for name, rows in self._rows.items():
            for image, source in dict(zip(batch, loop.arena.rows(name), strict=True)).items():
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


def _warn_of_black(pixels: NDArray[np.uint8]) -> None:
    for index in np.flatnonzero(~pixels.reshape(len(pixels), -1).any(axis=1)):
        warnings.warn(
            f"picture {index + 1} of {len(pixels)} is all black; its latents are finite, so the "
            "vae_decoder made it so",
            BlackImageWarning,
            stacklevel=2,
        )


def checked_output_type(given: object) -> OutputType:
    """What a call is to give back.

    Raises:
        UsageError: There is no such thing.
    """
    for known in OUTPUT_TYPES:
        if given == known:
            return known
    if given == "pt":
        raise UsageError(
            "output_type is 'pt': sdrt does without PyTorch; of output_type='np', "
            "torch.from_numpy(output.images).permute(0, 3, 1, 2) is that tensor"
        )
    raise UsageError(f"output_type is {given!r}: one of {', '.join(OUTPUT_TYPES)}")


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
