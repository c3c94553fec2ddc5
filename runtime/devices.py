"""Devices: each owns buffers and runs the kernels of our own on them.

The sampling loop is written once against this protocol. ``host`` keeps buffers as NumPy arrays.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.guided_step import StepBuffers, guided_step, prepare_input
from sdrt.kernels.image import image_to_uint8

Buffer = Any  # a NumPy array on the host, a device array elsewhere; both have shape and dtype


class Device(Protocol):
    """Memory and kernels. Nothing but `download` and `all_finite` waits for the device."""

    name: str

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A new buffer, C-contiguous, filled with zeros."""
        ...

    def upload(self, array: NDArray[Any], buffer: Buffer) -> None:
        """Copy a host array into a buffer of its shape, converting the dtype."""
        ...

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """A host copy of a buffer; waits until everything queued before has run."""
        ...

    def all_finite(self, buffer: Buffer) -> bool:
        """Whether a buffer holds neither NaN nor infinity; waits as `download` does."""
        ...

    def prepare_input(self, buffers: StepBuffers) -> None:
        """See `sdrt.kernels.guided_step.prepare_input`."""
        ...

    def guided_step(self, buffers: StepBuffers) -> None:
        """See `sdrt.kernels.guided_step.guided_step`."""
        ...

    def image_to_uint8(self, image: Buffer) -> NDArray[np.uint8]:
        """Decoder output [N, 3, H, W] → host bytes [N, H, W, 3]."""
        ...


class HostDevice:
    """NumPy arrays in main memory."""

    name = "host"

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """See `Device.zeros`."""
        return np.zeros(shape, dtype=dtype)

    def upload(self, array: NDArray[Any], buffer: Buffer) -> None:
        """See `Device.upload`."""
        np.copyto(buffer, array, casting="same_kind")

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """See `Device.download`."""
        return np.array(buffer)

    def all_finite(self, buffer: Buffer) -> bool:
        """See `Device.all_finite`."""
        return bool(np.isfinite(buffer).all())

    def prepare_input(self, buffers: StepBuffers) -> None:
        """See `Device.prepare_input`."""
        prepare_input(buffers)

    def guided_step(self, buffers: StepBuffers) -> None:
        """See `Device.guided_step`."""
        guided_step(buffers)

    def image_to_uint8(self, image: Buffer) -> NDArray[np.uint8]:
        """See `Device.image_to_uint8`."""
        return image_to_uint8(image)
