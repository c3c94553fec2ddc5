"""A CUDA driver on host memory that runs the host build of the kernels, and counts.

As on a GPU, nothing that goes into a stream runs before somebody waits for it; new memory holds garbage; what
is freed is overwritten. What a GPU's driver would not bear raises, or is kept in `RecordingDriver.faults`.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.host_build import run_on_host
from sdrt.kernels.launch import Launch
from sdrt.runtime.devices.gpu.driver import CudaError, DeviceFacts, OutOfMemoryError

# What `RecordingDriver.counts` counts. Work inside a graph is counted once, as it is recorded, under its name
# with "recorded_" before it.
COUNTED: Final = (
    "allocations",
    "frees",
    "pinned_allocations",
    "pinned_frees",
    "fills",  # device memory set to zero
    "uploads",  # host to device
    "downloads",  # device to host
    "device_copies",
    "kernel_launches",
    "executor_calls",
    "captures",
    "graph_launches",
    "graphs_destroyed",
    "modules_loaded",
    "event_records",
    "event_waits",  # one stream waits for another
    "waits",  # the host waits for the device
)

_ALIGNMENT: Final = 256
_FRESH: Final = 0xCD  # what new memory holds
_FREED: Final = 0xFF  # NaN in every floating dtype

_Operation = Callable[[], None]


@dataclass
class _Event:
    timing: bool
    stream: int = 0
    done: bool = True
    when: float = 0.0
    records: int = 0


@dataclass
class _Capture:
    thread: int
    operations: list[_Operation] = field(default_factory=list)
    invalid: bool = False


class RecordingDriver:
    """`sdrt.runtime.devices.gpu.driver.Driver` on host memory.

    Attributes:
        counts: How often each of ``COUNTED`` happened. ``counts - earlier`` leaves what was added since.
        faults: What a finaliser did that a driver would not bear; a test ends with an empty list.
        ordered: (later, earlier) for each time one stream was made to wait for another.
        opened: How many devices are open on it; several may share its memory, as on a GPU.
    """

    dlpack_device_type = 1  # kDLCPU: NumPy and PyTorch can read what is exported

    def __init__(
        self,
        *,
        memory: int = 1 << 30,
        compute_capability: tuple[int, int] = (9, 0),
        memory_pools: bool = True,
        name: str = "Recording GPU",
    ) -> None:
        """A GPU of ``memory`` bytes."""
        self.facts = DeviceFacts(0, name, compute_capability, memory_pools)
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.ordered: list[tuple[int, int]] = []
        self.opened = 0
        self._total = memory
        self._memory: dict[int, NDArray[np.uint8]] = {}
        self._pinned: dict[int, NDArray[np.uint8]] = {}
        self._registered: dict[int, int] = {}
        self._streams: defaultdict[int, deque[_Operation]] = defaultdict(deque)
        self._own_streams: set[int] = set()
        self._handles = itertools.count(1000)
        self._events: dict[int, _Event] = {}
        self._modules: dict[int, bytes] = {}
        self._functions: dict[int, str] = {}
        self._captures: dict[int, _Capture] = {}
        self._graphs: dict[int, list[_Operation]] = {}
        self._threads = threading.local()

    # What tests ask.

    @property
    def used(self) -> int:
        """Bytes of device memory that are allocated."""
        return sum(array.size for array in self._memory.values())

    @property
    def live(self) -> dict[str, int]:
        """How many things of each kind are there that have to be given back."""
        kinds: dict[str, Mapping[int, object] | set[int]] = {
            "allocations": self._memory,
            "pinned": self._pinned,
            "streams": self._own_streams,
            "events": self._events,
            "modules": self._modules,
            "graphs": self._graphs,
        }
        return {name: len(kind) for name, kind in kinds.items() if kind}

    def register(self, address: int, nbytes: int) -> None:
        """Let memory that belongs to another library count as device memory."""
        self._registered[address] = nbytes

    def enqueue(self, stream: int, operation: _Operation, kind: str = "executor_calls") -> None:
        """Put host code into a stream in the place of a library's work; captured like a kernel."""
        self._current()
        self._put(stream, operation, kind)

    def run_all(self) -> None:
        """Run what is queued, as time passing would; not counted."""
        for stream in list(self._streams):
            self._run(stream)

    # The driver.

    def _current(self) -> None:
        if not getattr(self._threads, "current", False):
            raise CudaError("a driver function", "CUDA_ERROR_INVALID_CONTEXT", "no context is current")
        if not self.opened:
            raise CudaError("a driver function", "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed")

    def _outside_capture(self, function: str) -> None:
        self._current()
        for capture in self._captures.values():
            if capture.thread == threading.get_ident():
                capture.invalid = True
                text = "operation not permitted when stream is capturing"
                raise CudaError(function, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", text)

    def _put(self, stream: int, operation: _Operation, kind: str) -> None:
        capture = self._captures.get(stream)
        if capture is None:
            self.counts[kind] += 1
            self._streams[stream].append(operation)
        else:
            self.counts[f"recorded_{kind}"] += 1
            capture.operations.append(operation)

    def _run(self, stream: int) -> None:
        queue = self._streams[stream]
        while queue:
            queue.popleft()()

    def _run_until(self, event: _Event) -> None:
        queue = self._streams[event.stream]
        while not event.done and queue:
            queue.popleft()()

    def _holds(self, address: int, nbytes: int) -> None:
        """Fail like an illegal access where memory is not, or no longer, allocated."""
        sizes = {start: array.size for start, array in self._memory.items()} | self._registered
        if not any(start <= address and address + nbytes <= start + size for start, size in sizes.items()):
            text = f"{nbytes} bytes at {address:#x} are not allocated"
            raise CudaError("a stream operation", "CUDA_ERROR_ILLEGAL_ADDRESS", text)

    def make_current(self) -> None:
        self._threads.current = True

    def memory_info(self) -> tuple[int, int]:
        self._current()
        return self._total - self.used, self._total

    def allocate(self, nbytes: int, stream: int) -> int:
        self._outside_capture("cuMemAllocAsync")
        assert nbytes > 0
        if self.used + nbytes > self._total:
            raise OutOfMemoryError("cuMemAllocAsync", "CUDA_ERROR_OUT_OF_MEMORY", "out of memory")
        self.counts["allocations"] += 1
        array, address = _aligned(nbytes)
        array.fill(_FRESH)
        self._memory[address] = array
        return address

    def free(self, address: int, stream: int) -> None:
        if stream in self._captures:
            self.faults.append("memory was freed while its stream was capturing")
        self.counts["frees"] += 1
        self._streams[stream].append(lambda: self._memory.pop(address).fill(_FREED))

    def trim(self) -> None:
        self._outside_capture("cuMemPoolTrimTo")

    def allocate_pinned(self, nbytes: int) -> int:
        self._outside_capture("cuMemHostAlloc")
        self.counts["pinned_allocations"] += 1
        array, address = _aligned(nbytes)
        self._pinned[address] = array
        return address

    def free_pinned(self, address: int, stream: int) -> None:
        if stream in self._captures:
            self.faults.append("host memory was freed while a stream was capturing")
        self._run(stream)
        self.counts["pinned_frees"] += 1
        self._pinned.pop(address).fill(_FREED)

    def fill_zero(self, address: int, nbytes: int, stream: int) -> None:
        self._current()

        def fill() -> None:
            self._holds(address, nbytes)
            ctypes.memset(address, 0, nbytes)

        self._put(stream, fill, "fills")

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._copy(target, source, nbytes, stream, "uploads", pinned=source, device=(target,))

    def copy_to_host(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._copy(target, source, nbytes, stream, "downloads", pinned=target, device=(source,))

    def copy_on_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._copy(target, source, nbytes, stream, "device_copies", device=(target, source))

    def _copy(
        self,
        target: int,
        source: int,
        nbytes: int,
        stream: int,
        kind: str,
        *,
        device: tuple[int, ...],
        pinned: int | None = None,
    ) -> None:
        self._current()
        if pinned is not None:
            areas = ((start, array.size) for start, array in self._pinned.items())
            assert any(start <= pinned and pinned + nbytes <= start + size for start, size in areas), (
                "the host's side of a copy is not page-locked"
            )

        def copy() -> None:
            for address in device:
                self._holds(address, nbytes)
            ctypes.memmove(target, source, nbytes)

        self._put(stream, copy, kind)

    def create_stream(self) -> int:
        self._current()
        stream = next(self._handles)
        self._own_streams.add(stream)
        return stream

    def destroy_stream(self, stream: int) -> None:
        self._run(stream)
        self._own_streams.remove(stream)

    def synchronize_stream(self, stream: int) -> None:
        self._outside_capture("cuStreamSynchronize")
        self.counts["waits"] += 1
        self._run(stream)

    def create_event(self, *, timing: bool) -> int:
        self._current()
        event = next(self._handles)
        self._events[event] = _Event(timing)
        return event

    def destroy_event(self, event: int) -> None:
        del self._events[event]

    def record_event(self, event: int, stream: int) -> None:
        self._current()
        this = self._events[event]
        this.stream, this.done = stream, False
        this.records += 1
        record = this.records

        def reach() -> None:
            if this.records == record:  # else it was recorded again since
                this.done, this.when = True, time.perf_counter()

        self._put(stream, reach, "event_records")

    def event_done(self, event: int) -> bool:
        self._outside_capture("cuEventQuery")
        return self._events[event].done

    def synchronize_event(self, event: int) -> None:
        self._outside_capture("cuEventSynchronize")
        self.counts["waits"] += 1
        self._run_until(self._events[event])

    def wait_event(self, stream: int, event: int) -> None:
        self._current()
        this = self._events[event]
        self.ordered.append((stream, this.stream))
        self._put(stream, lambda: self._run_until(this), "event_waits")

    def elapsed(self, start: int, end: int) -> float:
        first, last = self._events[start], self._events[end]
        for event in (first, last):
            assert event.timing, "an event without timing was asked for the time"
            assert event.done, "an event was asked for the time before it was reached"
        return last.when - first.when

    def load_module(self, image: bytes) -> int:
        self._current()
        self.counts["modules_loaded"] += 1
        module = next(self._handles)
        self._modules[module] = image
        return module

    def unload_module(self, module: int) -> None:
        del self._modules[module]

    def function(self, module: int, name: str) -> int:
        self._current()
        assert module in self._modules
        function = next(self._handles)
        self._functions[function] = name
        return function

    def launch(self, function: int, launch: Launch, stream: int) -> None:
        self._current()
        assert self._functions[function] == launch.entry
        copied = replace(launch, params=type(launch.params).from_buffer_copy(launch.params))

        def run() -> None:
            for name in (entry[0] for entry in copied.params._fields_):
                value = getattr(copied.params, name)
                if value > 1 << 40:  # an address: counts are smaller
                    self._holds(value, 1)
            run_on_host(copied)

        self._put(stream, run, "kernel_launches")

    def begin_capture(self, stream: int) -> None:
        self._current()
        assert stream not in self._captures
        assert stream > 2, "a default stream cannot be captured"
        self.counts["captures"] += 1
        self._captures[stream] = _Capture(threading.get_ident())

    def end_capture(self, stream: int) -> int:
        capture = self._captures.pop(stream)
        if capture.invalid:
            text = "operation failed due to a previous error during capture"
            raise CudaError("cuStreamEndCapture", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", text)
        graph = next(self._handles)
        self._graphs[graph] = capture.operations
        return graph

    def abandon_capture(self, stream: int) -> None:
        del self._captures[stream]

    def launch_graph(self, graph: int, stream: int) -> None:
        self._current()
        operations = self._graphs[graph]

        def run() -> None:
            for operation in operations:
                operation()

        self._put(stream, run, "graph_launches")

    def destroy_graph(self, graph: int) -> None:
        self.counts["graphs_destroyed"] += 1
        del self._graphs[graph]

    def context_of(self, address: int) -> int | None:
        return 1

    def is_own_context(self, context: int) -> bool:
        return context == 1

    def close(self) -> None:
        self.opened -= 1
        assert self.opened >= 0


def _aligned(nbytes: int) -> tuple[NDArray[np.uint8], int]:
    """Bytes at an address as good as a GPU's driver gives."""
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    skip = -memory.ctypes.data % _ALIGNMENT
    array = memory[skip : skip + nbytes]
    return array, array.ctypes.data
