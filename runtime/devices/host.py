"""The ``host`` device: buffers are NumPy arrays in main memory, and everything is done at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sdrt.kernels.check_finite import check_finite
from sdrt.kernels.guidance_rescale import guidance_rescale
from sdrt.kernels.guided_step import StepBuffers, guided_step, prepare_input
from sdrt.kernels.image_to_uint8 import image_to_uint8
from sdrt.kernels.philox_normal import fill_philox_normal
from sdrt.runtime.devices.device import Buffer, checked_view
from sdrt.runtime.errors import UsageError


class HostTimer:
    """Wall clock: on the host everything has run when a call returns."""

    def __init__(self) -> None:
        """Start now."""
        self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """See `Timer.mark`."""
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """See `Timer.seconds`."""
        return dict(self._seconds)


class HostDevice:
    """NumPy arrays in main memory. There is nothing to give back: `close` does nothing."""

    name = "host"

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        """See `Device.zeros`."""
        return np.zeros(shape, dtype=dtype)

    def view(self, buffer: Buffer, offset: int, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        """See `Device.view`."""
        nbytes = checked_view(buffer, offset, shape, np.dtype(dtype))
        flat: NDArray[np.uint8] = buffer.reshape(-1)
        return flat[offset : offset + nbytes].view(dtype).reshape(shape)

    def upload(self, array: NDArray[Any], buffer: Buffer) -> None:
        """See `Device.upload`."""
        np.copyto(buffer, array, casting="same_kind")

    def clear(self, buffer: Buffer) -> None:
        """See `Device.clear`."""
        buffer.fill(0)

    def from_cuda_array(self, array: Any) -> Buffer:
        """See `Device.from_cuda_array`: nothing of a GPU can be taken here."""
        raise UsageError(
            f"a {type(array).__name__} on a GPU was given, but this pipeline draws on the host: give it a "
            "NumPy array, or load the pipeline with a backend that draws on the GPU"
        )

    def copy(self, source: Buffer, target: Buffer) -> None:
        """See `Device.copy`; here the dtype may differ, as for `upload`."""
        np.copyto(target, source, casting="same_kind")

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """See `Device.download`."""
        return np.array(buffer)

    def prepare_input(self, buffers: StepBuffers) -> None:
        """See `Device.prepare_input`."""
        prepare_input(buffers)

    def guidance_rescale(self, buffers: StepBuffers) -> None:
        """See `Device.guidance_rescale`."""
        guidance_rescale(buffers)

    def guided_step(self, buffers: StepBuffers) -> None:
        """See `Device.guided_step`."""
        guided_step(buffers)

    def philox_normal(
        self, noise: Buffer, seeds: Buffer, counter: Buffer | None = None, draws: Buffer | None = None
    ) -> None:
        """See `Device.philox_normal`."""
        fill_philox_normal(noise, seeds, counter, draws)

    def check_finite(self, buffer: Buffer, fault: Buffer) -> None:
        """See `Device.check_finite`."""
        check_finite(buffer, fault)

    def image_to_uint8(self, image: Buffer, pixels: Buffer) -> None:
        """See `Device.image_to_uint8`."""
        pixels[...] = image_to_uint8(image)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Device.capture`."""
        return work

    def timer(self) -> HostTimer:
        """See `Device.timer`."""
        return HostTimer()

    def synchronize(self) -> None:
        """See `Device.synchronize`."""

    def close(self) -> None:
        """See `Device.close`."""
