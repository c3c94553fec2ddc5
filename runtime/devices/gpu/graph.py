"""CUDA graphs: work that is recorded once and queued with one launch."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

from sdrt.runtime.devices.gpu.stream import Owned, Stream
from sdrt.runtime.errors import UsageError


class Graph:
    """Recorded work: calling it queues all of it with one launch."""

    def __init__(self, stream: Stream, work: Callable[[], None], *, check: Callable[[], object]) -> None:
        """Record.

        Args:
            stream: The stream that records.
            work: The function whose work is recorded; kept, since addresses of its buffers are in the graph.
            check: A function that is called before each launch, and raises if the device was closed.

        Raises:
            BackendError: Something in ``work`` cannot be captured. The stream is usable again, also after any
                error that ``work`` raises itself.
        """
        if stream.capturing:
            raise UsageError("a capture was asked for while another one runs: record one after the other")
        self._stream = stream
        self._work = work
        self._check = check
        with _no_collection():
            stream.begin_capture()
            try:
                try:
                    work()
                except BaseException:
                    stream.driver.abandon_capture(stream.handle)
                    raise
                graph = stream.driver.end_capture(stream.handle)
            finally:
                stream.capture_ended()
        self._graph = Owned(stream, graph, stream.driver.destroy_graph)

    def __call__(self) -> None:
        """Queue the recorded work."""
        self._check()
        self._stream.driver.launch_graph(self._graph.handle, self._stream.handle)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Put the garbage collector off.

    It may find another library's memory, such as an execution context of TensorRT: what that calls to give it
    back (cudaFree) would end the capture. What is ours waits in any case: `Stream.give_back`.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
