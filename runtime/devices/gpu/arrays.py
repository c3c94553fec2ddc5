"""Device memory as Python objects: given back in stream order when the last of them dies."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from sdrt.runtime.devices.gpu.dlpack import export_capsule
from sdrt.runtime.devices.gpu.driver import LEGACY_STREAM, Driver

if TYPE_CHECKING:
    from typing_extensions import CapsuleType


class Session:
    """A driver and the stream that all work goes to.

    It is closed when the device and everything that was allocated have let go of it: a picture may outlive
    the pipeline that drew it.
    """

    def __init__(self, driver: Driver, stream: int, *, keep: object = None) -> None:
        """Take a driver and a stream of it.

        Args:
            driver: Its context is current.
            stream: 0 for a stream of our own.
            keep: What owns a caller's stream, kept as long as the stream is used.
        """
        self.driver = driver
        self._owns_stream = not stream
        self.stream = stream or driver.create_stream()
        self._keep = keep
        self._lock = threading.RLock()
        self._holders = 0
        self._deferred: list[Callable[[], None]] | None = None

    def hold(self) -> None:
        """One more object needs the session."""
        with self._lock:
            self._holders += 1

    def release(self) -> None:
        """One object fewer; the last one closes the session."""
        with self._lock:
            self._holders -= 1
            if self._holders:
                return
        if self._owns_stream:
            self.driver.destroy_stream(self.stream)
        self.driver.close()
        self._keep = None

    @property
    def capturing(self) -> bool:
        """Whether the stream records instead of running."""
        return self._deferred is not None

    def begin_capture(self) -> None:
        """Record what goes into the stream; what dies meanwhile is given back afterwards.

        Otherwise a free that the garbage collector happens to make would become part of the graph.
        """
        with self._lock:
            self._deferred = []  # first: the collector may run at any line
            try:
                self.driver.begin_capture(self.stream)
            except BaseException:
                self.capture_ended()
                raise

    def capture_ended(self) -> None:
        """Run again what goes into the stream, and give back what has died."""
        with self._lock:
            deferred, self._deferred = self._deferred, None
        for give_back in deferred or ():
            give_back()

    def give_back(self, give_back: Callable[[], None]) -> None:
        """Call it now, or at the end of a capture. For finalisers, so from any thread."""
        with self._lock:
            if self._deferred is not None:
                self._deferred.append(give_back)
                return
            give_back()

    def order_behind(self, producer: int) -> None:
        """Let our stream wait for what another one holds now."""
        self._order(self.stream, producer)

    def order_before(self, consumer: int) -> None:
        """Let another stream wait for what ours holds now."""
        self._order(consumer, self.stream)

    def _order(self, later: int, earlier: int) -> None:
        if later == earlier:
            return
        event = self.driver.create_event(timing=False)
        try:
            self.driver.record_event(event, earlier)
            self.driver.wait_event(later, event)
        finally:
            self.driver.destroy_event(event)


class Owned:
    """A handle or address of the driver, given back when this object dies."""

    def __init__(self, session: Session, handle: int, free: Callable[[int], None]) -> None:
        """``free(handle)`` gives it back; it must be callable from any thread."""
        session.hold()
        self._session = session
        self.handle = handle
        self._free = free

    def __del__(self) -> None:
        """Give it back."""
        session, free, handle = self._session, self._free, self.handle

        def give_back() -> None:
            free(handle)
            session.release()

        session.give_back(give_back)


class DeviceArray:
    """C-contiguous memory of a GPU, for the kernels, for executors and for other libraries.

    PyTorch, CuPy, Numba and PyCUDA take it without a copy through ``__dlpack__`` or
    ``__cuda_array_interface__``. It keeps its memory alive. There is no arithmetic and no indexing.

    Attributes:
        address: Of the first element.
        shape: Elements along each axis.
        dtype: NumPy's name of the element type.
    """

    __slots__ = ("__weakref__", "_owner", "_session", "address", "dtype", "shape")

    def __init__(
        self, session: Session, owner: object, address: int, shape: tuple[int, ...], dtype: DTypeLike
    ) -> None:
        """Made by `CudaDevice.zeros`, `view` and `from_cuda_array`; ``owner`` keeps the memory alive."""
        self._session = session
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
        return DeviceArray(self._session, self._owner, self.address + offset, shape, dtype)

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
            "stream": self._session.stream,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """The kind of memory (2 is CUDA) and the GPU's ordinal."""
        driver = self._session.driver
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
            stream: The reader's: it is made to wait for the work queued so far. None is the default stream,
                -1 asks for no waiting.
            max_version: Not needed: the capsule has the layout that every version reads.
            dl_device: Where the reader wants it; only here.
            copy: Only None or False.

        Raises:
            BufferError: Another device, or a copy, was asked for.
        """
        del max_version
        if copy:
            raise BufferError("a copy was asked for: only the memory itself is given")
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"the array is on device {self.__dlpack_device__()}, not on {dl_device}")
        if stream != -1:
            self._session.driver.make_current()
            self._session.order_before(LEGACY_STREAM if stream is None else stream)
        return export_capsule(self, self.address, self.shape, self.dtype, self.__dlpack_device__())
