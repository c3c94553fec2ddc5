"""Devices: each owns buffers and runs the kernels of our own on them.

The sampling loop is written once against this protocol. ``host`` (`sdrt.runtime.devices.host`) keeps buffers
as NumPy arrays and does everything at once; ``cuda`` (`sdrt.runtime.devices.gpu.device`) queues everything in
one stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sdrt.kernels.guided_step import StepBuffers
from sdrt.runtime.errors import UsageError

Buffer = Any  # a NumPy array on the host, a device array elsewhere; both have shape and dtype


class Timer(Protocol):
    """Seconds between marks in the device's order of work. Made by `Device.timer`, which sets the start."""

    def mark(self, name: str) -> None:
        """End the stage ``name``, which began at the mark before; does not wait.

        Stages of one name add up.
        """
        ...

    def seconds(self) -> dict[str, float]:
        """The seconds of every stage, in the order of their first marks; waits for the last mark."""
        ...


class Device(Protocol):
    """Memory and kernels. What is called here runs in the order of the calls.

    Nothing but `download`, `synchronize` and `Timer.seconds` waits for the device.
    """

    name: str

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        """A new buffer, C-contiguous, filled with zeros; freed with the last object that refers to it.

        Raises:
            DeviceMemoryError: It does not fit; the device stays usable.
        """
        ...

    def view(self, buffer: Buffer, offset: int, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        """A part of a uint8 buffer, from byte ``offset`` on, as an array; the same memory, which it keeps.

        Raises:
            UsageError: It would leave the buffer, or ``offset`` is no multiple of the dtype's size.
        """
        ...

    def upload(self, array: NDArray[Any], buffer: Buffer) -> None:
        """Copy a host array into a buffer of its shape, converting the dtype (NumPy's ``same_kind``).

        ``array`` may be changed as soon as this returns.
        """
        ...

    def clear(self, buffer: Buffer) -> None:
        """Fill a buffer with zeros."""
        ...

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy a buffer into another of its shape and dtype."""
        ...

    def from_cuda_array(self, array: Any) -> Buffer:
        """Take an array of another library (PyTorch, CuPy, PyCUDA …) as a buffer, without a copy.

        The device's further work waits for what the other library has queued. The array must stay unchanged
        until what reads it has run.

        Args:
            array: C-contiguous, on this device, with ``__dlpack__`` or ``__cuda_array_interface__``.

        Raises:
            UsageError: It is something else, on another device, or not contiguous.
        """
        ...

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """A host copy of a buffer; waits until everything queued before has run."""
        ...

    def prepare_input(self, buffers: StepBuffers) -> None:
        """See `sdrt.kernels.guided_step.prepare_input`."""
        ...

    def guidance_rescale(self, buffers: StepBuffers) -> None:
        """See `sdrt.kernels.guidance_rescale.guidance_rescale`."""
        ...

    def guided_step(self, buffers: StepBuffers) -> None:
        """See `sdrt.kernels.guided_step.guided_step`."""
        ...

    def philox_normal(
        self, noise: Buffer, seeds: Buffer, counter: Buffer | None = None, draws: Buffer | None = None
    ) -> None:
        """Fill ``noise`` with fresh normal numbers: a draw of each image's seed.

        Args:
            noise: float32 [N, C, h, w].
            seeds: uint64 [N].
            counter: int32 [1], the row that comes next; without it draw 0 is taken.
            draws: int32 [n], which draw each row takes, or `sdrt.kernels.philox_normal.NO_DRAW`; with a
                counter.
        """
        ...

    def check_finite(self, buffer: Buffer, fault: Buffer) -> None:
        """Set ``fault`` (int32 [1]) to 1 if any element of ``buffer`` is NaN or infinite; never clears it."""
        ...

    def image_to_uint8(self, image: Buffer, pixels: Buffer) -> None:
        """Decoder output [N, 3, H, W], float32 or float16, into uint8 ``pixels`` [N, H, W, 3]."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what ``work`` queues, without running it, and return a call that queues it all at once.

        Addresses are baked in: the result keeps ``work`` alive, and ``work`` must keep its buffers. Anything
        that must be warm (lazily loaded kernels, a TensorRT context after a change of shape) has to have run
        once before. ``host`` gives back ``work`` itself.
        """
        ...

    def timer(self) -> Timer:
        """A timer that starts now."""
        ...

    def synchronize(self) -> None:
        """Wait until everything queued before has run."""
        ...

    def close(self) -> None:
        """Give back what the device holds; using it afterwards is an error, closing it again is none."""
        ...


def checked_view(buffer: Buffer, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """The bytes of an array of ``shape`` and ``dtype`` that starts at byte ``offset`` of a uint8 buffer.

    Raises:
        UsageError: As `Device.view`.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if buffer.dtype != np.uint8:
        raise UsageError(f"a view of a {buffer.dtype} buffer was asked for: only uint8 buffers have views")
    if offset < 0 or offset % dtype.itemsize:
        raise UsageError(f"offset is {offset}: a multiple of {dtype.itemsize}, the bytes of a {dtype}")
    if offset + nbytes > math.prod(buffer.shape):
        raise UsageError(
            f"a view of {nbytes} bytes at {offset} leaves its buffer of {math.prod(buffer.shape)} bytes"
        )
    return nbytes
