"""Device memory as Python objects: arrays that other libraries take without a copy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from sdrt.runtime.devices.gpu.dlpack import export_capsule
from sdrt.runtime.devices.gpu.driver import LEGACY_STREAM
from sdrt.runtime.devices.gpu.stream import Stream

if TYPE_CHECKING:
    from typing_extensions import CapsuleType


class DeviceArray:
    """C-contiguous memory of a GPU, for the kernels, for executors and for other libraries.

    PyTorch, CuPy, Numba and PyCUDA take it without a copy through ``__dlpack__`` or
    ``__cuda_array_interface__``. It keeps its memory alive. There is no arithmetic and no indexing.

    Attributes:
        address: The address of the first element.
        shape: The number of elements along each axis.
        dtype: NumPy's name of the element type.
    """

    __slots__ = ("__weakref__", "_owner", "_stream", "address", "dtype", "shape")

    def __init__(
        self, stream: Stream, owner: object, address: int, shape: tuple[int, ...], dtype: DTypeLike
    ) -> None:
        """Made by `CudaDevice.zeros`, `view` and `from_cuda_array`; ``owner`` keeps the memory alive."""
        self._stream = stream
        self._owner = owner
        self.address = address
        self.shape = tuple(int(size) for size in shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.size * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """Axes."""
        return len(self.shape)

    def part(self, offset: int, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """A part of the memory from byte ``offset`` on, which keeps all of it alive; nothing is checked."""
        return DeviceArray(self._stream, self._owner, self.address + offset, shape, dtype)

    def __len__(self) -> int:
        """Length of the first axis."""
        if not self.shape:
            raise TypeError("len() of a device array without axes")
        return self.shape[0]

    def __repr__(self) -> str:
        """Shape, dtype and address; the contents are on the GPU."""
        return f"DeviceArray({list(self.shape)}, {self.dtype.name}, at {self.address:#x})"

    def __array__(self, *_args: object, **_kwargs: object) -> Any:
        """NumPy would otherwise make an array of one Python object of it, in silence."""
        raise TypeError("the array is in GPU memory: copy it to the host first (Device.download)")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3 of Numba's CUDA array interface; a reader waits for what is in the stream it names."""
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address if self.size else 0, False),
            "strides": None,
            "stream": self._stream.handle,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """The kind of memory (2 is CUDA) and the GPU's ordinal."""
        driver = self._stream.driver
        return driver.dlpack_device_type, driver.facts.ordinal

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> CapsuleType:
        """A DLPack capsule of the same memory (Python array API, 2023.12).

        Args:
            stream: The reader's stream: it is made to wait for the work queued so far. None is the default
                stream, -1 asks for no waiting.
            max_version: The newest version that the reader knows; the capsule has the layout that every
                version reads.
            dl_device: The device on which the reader wants it; only this one.
            copy: Whether a copy is wanted: only None or False.

        Raises:
            BufferError: Another device, or a copy, was asked for.
        """
        del max_version
        if copy:
            raise BufferError("a copy was asked for: only the memory itself is given")
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"the array is on device {self.__dlpack_device__()}, not on {dl_device}")
        if stream != -1:
            self._stream.driver.make_current()
            self._stream.order_before(LEGACY_STREAM if stream is None else stream)
        return export_capsule(self, self.address, self.shape, self.dtype, self.__dlpack_device__())
