"""A CUDA stream and the driver's handles and addresses, which are given back in the order of the stream."""

from __future__ import annotations

import threading
from collections.abc import Callable

from sdrt.runtime.devices.gpu.driver import Driver


class Stream:
    """The CUDA stream that all work of a device goes to, and the driver whose stream it is.

    It is closed when the device and everything that was allocated have let go of it: a picture may outlive
    the pipeline that drew it.

    Attributes:
        driver: The driver; its context is the stream's.
        handle: The driver's handle of the stream.
    """

    def __init__(self, driver: Driver, handle: int, *, keep: object = None) -> None:
        """Take a stream of a driver, or make one.

        Args:
            driver: The driver, whose context is current.
            handle: The handle of a caller's stream; 0 for a stream of our own.
            keep: What owns a caller's stream, kept as long as the stream is used.
        """
        self.driver = driver
        self._is_own = not handle
        self.handle = handle or driver.create_stream()
        self._keep = keep
        self._lock = threading.RLock()
        self._holders = 0
        self._deferred: list[Callable[[], None]] | None = None

    def hold(self) -> None:
        """One more object needs the stream."""
        with self._lock:
            self._holders += 1

    def release(self) -> None:
        """One object fewer; the last one closes the stream."""
        with self._lock:
            self._holders -= 1
            if self._holders:
                return
        if self._is_own:
            self.driver.destroy_stream(self.handle)
        self.driver.close()
        self._keep = None

    @property
    def capturing(self) -> bool:
        """Whether it records instead of running."""
        return self._deferred is not None

    def begin_capture(self) -> None:
        """Record what goes into it; what dies meanwhile is given back afterwards.

        Otherwise a free that the garbage collector happens to make would become part of the graph.
        """
        with self._lock:
            self._deferred = []  # first: the collector may run at any line
            try:
                self.driver.begin_capture(self.handle)
            except BaseException:
                self.capture_ended()
                raise

    def capture_ended(self) -> None:
        """Run again what goes into it, and give back what has died."""
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
        """Let it wait for what another stream holds now."""
        self._order(self.handle, producer)

    def order_before(self, consumer: int) -> None:
        """Let another stream wait for what it holds now."""
        self._order(consumer, self.handle)

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

    def __init__(self, stream: Stream, handle: int, free: Callable[[int], None]) -> None:
        """``free(handle)`` gives it back; it must be callable from any thread."""
        stream.hold()
        self._stream = stream
        self.handle = handle
        self._free = free

    def __del__(self) -> None:
        """Give it back."""
        stream, free, handle = self._stream, self._free, self.handle

        def give_back() -> None:
            free(handle)
            stream.release()

        stream.give_back(give_back)


def new_event(stream: Stream, *, timing: bool) -> Owned:
    """An event of the driver."""
    return Owned(stream, stream.driver.create_event(timing=timing), stream.driver.destroy_event)
