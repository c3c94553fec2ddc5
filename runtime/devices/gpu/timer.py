"""Timings on the GPU."""

from __future__ import annotations

from sdrt.runtime.devices.gpu.stream import Owned, Stream, new_event
from sdrt.runtime.errors import UsageError


class CudaTimer:
    """Seconds on the GPU between events in the stream (`sdrt.runtime.devices.device.Timer`)."""

    def __init__(self, stream: Stream) -> None:
        """Start now, in the order of the stream."""
        self._stream = stream
        self._marks: list[tuple[str, Owned]] = []
        self._record("")

    def _record(self, name: str) -> None:
        if self._stream.capturing:
            raise UsageError(
                "a timer was used in work that is recorded: set the marks around the graph's calls"
            )
        event = new_event(self._stream, timing=True)
        self._stream.driver.record_event(event.handle, self._stream.handle)
        self._marks.append((name, event))

    def mark(self, name: str) -> None:
        """See `Timer.mark`."""
        self._stream.driver.make_current()
        self._record(name)

    def seconds(self) -> dict[str, float]:
        """See `Timer.seconds`."""
        driver = self._stream.driver
        driver.make_current()
        driver.synchronize_event(self._marks[-1][1].handle)
        seconds: dict[str, float] = {}
        for (_, before), (name, event) in zip(self._marks, self._marks[1:], strict=False):
            elapsed = driver.elapsed(before.handle, event.handle)
            seconds[name] = seconds.get(name, 0.0) + elapsed
        return seconds
