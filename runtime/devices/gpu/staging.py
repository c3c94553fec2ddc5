"""Copies between NumPy and the GPU through page-locked memory.

Only such memory is copied without the host's waiting; from ordinary memory the driver would make a copy of
its own, and may wait for it.
"""

from __future__ import annotations

import ctypes
from collections import deque
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.devices.gpu.arrays import DeviceArray
from sdrt.runtime.devices.gpu.stream import Owned, Stream, new_event

RING_BYTES: Final = 8 << 20  # everything that one picture uploads, several times over
PIECE_BYTES: Final = RING_BYTES // 4  # of an array that is larger; converting and copying then overlap
DOWNLOAD_BYTES: Final = 16 << 20  # five pictures of 1024²
_ALIGNMENT: Final = 256


class _Region(NamedTuple):
    """A part of the ring whose copy may still be running."""

    start: int
    end: int
    done: Owned  # event


class UploadRing:
    """Page-locked memory that uploads go round in; made at the first one."""

    def __init__(self, stream: Stream) -> None:
        """Copies go into the stream."""
        self._stream = stream
        self._memory: Owned | None = None
        self._bytes: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._head = 0
        self._running: deque[_Region] = deque()
        self._events: list[Owned] = []

    def copy(self, array: NDArray[Any], target: DeviceArray) -> None:
        """Queue ``array`` into ``target``, of the same shape, converting the dtype.

        Waits only while the ring is full of copies that have not run, that is when the host is some megabytes
        of uploads ahead of the GPU. ``array`` may be changed at once.

        Raises:
            TypeError: NumPy's ``same_kind`` rule does not allow the conversion.
        """
        flat = array.reshape(-1)
        step = PIECE_BYTES // target.dtype.itemsize
        for first in range(0, flat.size, step):
            piece = flat[first : first + step]
            self._copy_piece(piece, target.address + first * target.dtype.itemsize, target.dtype)

    def _copy_piece(self, piece: NDArray[Any], address: int, dtype: np.dtype[Any]) -> None:
        stream = self._stream
        nbytes = piece.size * dtype.itemsize
        start = self._reserve(nbytes)
        np.copyto(self._bytes[start : start + nbytes].view(dtype), piece, casting="same_kind")
        stream.driver.copy_to_device(address, self._address + start, nbytes, stream.handle)
        event = self._events.pop() if self._events else new_event(stream, timing=False)
        stream.driver.record_event(event.handle, stream.handle)
        self._head = start + -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self._running.append(_Region(start, self._head, event))

    @property
    def _address(self) -> int:
        if self._memory is None:
            self._memory, self._bytes = pinned_memory(self._stream, RING_BYTES)
        return self._memory.handle

    def _reserve(self, nbytes: int) -> int:
        """Where ``nbytes`` fit, once the copies that are in the way have run."""
        assert self._address
        driver = self._stream.driver
        while self._running and driver.event_done(self._running[0].done.handle):
            self._events.append(self._running.popleft().done)
        while (start := self._room_for(nbytes)) is None:
            driver.synchronize_event(self._running[0].done.handle)
            self._events.append(self._running.popleft().done)
        return start

    def _room_for(self, nbytes: int) -> int | None:
        if not self._running:
            return 0
        tail = self._running[0].start
        if self._head > tail:  # free: from the head to the end, and from 0 to the tail
            if self._head + nbytes <= RING_BYTES:
                return self._head
            return 0 if nbytes <= tail else None
        return self._head if self._head + nbytes <= tail else None


class DownloadBuffer:
    """Page-locked memory that downloads pass through; made at the first one, as large as was needed."""

    def __init__(self, stream: Stream) -> None:
        """Copies go into the stream."""
        self._stream = stream
        self._memory: Owned | None = None
        self._bytes: NDArray[np.uint8] = np.empty(0, np.uint8)

    def copy(self, source: DeviceArray) -> NDArray[Any]:
        """A NumPy copy; waits for everything queued before."""
        result = np.empty(source.shape, source.dtype)
        target = result.reshape(-1).view(np.uint8)
        stream, driver = self._stream, self._stream.driver
        address = self._room(min(source.nbytes, DOWNLOAD_BYTES))
        for start in range(0, source.nbytes, DOWNLOAD_BYTES):
            nbytes = min(DOWNLOAD_BYTES, source.nbytes - start)
            driver.copy_to_host(address, source.address + start, nbytes, stream.handle)
            driver.synchronize_stream(stream.handle)
            target[start : start + nbytes] = self._bytes[:nbytes]
        return result

    def _room(self, nbytes: int) -> int:
        if self._memory is None or self._bytes.size < nbytes:
            self._memory = None
            size = 1 << max(nbytes - 1, 4095).bit_length()
            self._memory, self._bytes = pinned_memory(self._stream, size)
        return self._memory.handle


def pinned_memory(stream: Stream, nbytes: int) -> tuple[Owned, NDArray[np.uint8]]:
    """Page-locked host memory and the NumPy array of its bytes, which does not keep it."""
    driver, handle = stream.driver, stream.handle
    address = driver.allocate_pinned(nbytes)
    owned = Owned(stream, address, lambda at: driver.free_pinned(at, handle))
    memory = memoryview((ctypes.c_uint8 * nbytes).from_address(address)).cast("B")
    return owned, np.frombuffer(memory, np.uint8)
