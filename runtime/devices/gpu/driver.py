"""The few functions of the CUDA driver that the `cuda` device is made of, as plain integers and bytes.

`CudaDevice` is written against the `Driver` protocol. The real one is `sdrt.runtime.devices.gpu.bindings`;
the tests have a second one on host memory, which counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from sdrt.kernels.launch import Launch
from sdrt.runtime.errors import BackendError, DeviceMemoryError

LEGACY_STREAM: Final = 1  # CU_STREAM_LEGACY: the default stream by its explicit name
PER_THREAD_STREAM: Final = 2  # CU_STREAM_PER_THREAD

_ADVICE: Final = {
    "CUDA_ERROR_NO_DEVICE": "no NVIDIA GPU is visible: see what nvidia-smi lists and what "
    "CUDA_VISIBLE_DEVICES allows; without a GPU use --backend onnxruntime-cpu",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the driver's library and kernel module differ: restart the machine "
    "after a driver update",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "the forward-compatibility package (cuda-compat) works on "
    "data-centre GPUs only: update the driver instead",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the kernels were compiled for another GPU: remove the kernel cache "
    "($SDRT_CACHE or ~/.cache/sdrt/kernels) and run again",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "the CUDA context of this process is lost: start the process anew",
    "CUDA_ERROR_LAUNCH_FAILED": "the CUDA context of this process is lost: start the process anew",
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": "something in the recorded work cannot be captured",
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": "something in the recorded work cannot be captured",
    "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT": "the default stream was used while work was recorded: all work "
    "must be in the device's own stream",
}


class CudaError(BackendError):
    """A driver function failed; ``code`` is the name of its CUresult, such as CUDA_ERROR_INVALID_VALUE."""

    def __init__(self, function: str, code: str, text: str) -> None:
        """``text`` is the driver's own description."""
        advice = _ADVICE.get(code)
        super().__init__(f"{function} failed: {text} ({code})" + (f"; {advice}" if advice else ""))
        self.code = code


class OutOfMemoryError(CudaError, DeviceMemoryError):
    """A driver function failed for want of memory; nothing was changed."""


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What is asked about a GPU once.

    Attributes:
        ordinal: Its number among the visible ones.
        name: Its name, such as ``NVIDIA H100 80GB HBM3``.
        compute_capability: Its major and minor number, such as (9, 0).
        memory_pools: Whether memory can be allocated and freed in stream order.
    """

    ordinal: int
    name: str
    compute_capability: tuple[int, int]
    memory_pools: bool


class Driver(Protocol):
    """One GPU's context. Addresses and handles are integers; what takes a stream does not wait.

    Every function needs the context to be current in the calling thread (`make_current`), except the ones
    that give something back: finalisers call those from any thread.
    """

    facts: DeviceFacts
    dlpack_device_type: int  # what DLPack calls this kind of memory

    def make_current(self) -> None:
        """Make the context current in this thread."""
        ...

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes of the GPU."""
        ...

    def allocate(self, nbytes: int, stream: int) -> int:
        """Uninitialised device memory; raises OutOfMemoryError."""
        ...

    def free(self, address: int, stream: int) -> None:
        """Give device memory back after what the stream holds now; callable from any thread."""
        ...

    def trim(self) -> None:
        """Give memory that was freed and is kept for reuse back to the GPU; wait for the stream before."""
        ...

    def allocate_pinned(self, nbytes: int) -> int:
        """Page-locked host memory; raises OutOfMemoryError."""
        ...

    def free_pinned(self, address: int, stream: int) -> None:
        """Wait for the stream and give page-locked host memory back; callable from any thread."""
        ...

    def fill_zero(self, address: int, nbytes: int, stream: int) -> None:
        """Fill device memory with zeros."""
        ...

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy from page-locked host memory."""
        ...

    def copy_to_host(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy to page-locked host memory."""
        ...

    def copy_on_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy from device memory to device memory."""
        ...

    def create_stream(self) -> int:
        """A stream that does not synchronise with the default stream."""
        ...

    def destroy_stream(self, stream: int) -> None:
        """What it holds still runs. Callable from any thread."""
        ...

    def synchronize_stream(self, stream: int) -> None:
        """Wait for everything in the stream; raises what failed in it."""
        ...

    def create_event(self, *, timing: bool) -> int:
        """An event; without ``timing`` it is cheaper."""
        ...

    def destroy_event(self, event: int) -> None:
        """Callable from any thread."""
        ...

    def record_event(self, event: int, stream: int) -> None:
        """The event is done when what the stream holds now is done."""
        ...

    def event_done(self, event: int) -> bool:
        """Ask without waiting."""
        ...

    def synchronize_event(self, event: int) -> None:
        """Wait."""
        ...

    def wait_event(self, stream: int, event: int) -> None:
        """What is put into the stream from now on runs after the event; the host does not wait."""
        ...

    def elapsed(self, start: int, end: int) -> float:
        """Seconds between two events that are done."""
        ...

    def load_module(self, image: bytes) -> int:
        """A cubin; also while a stream is capturing."""
        ...

    def unload_module(self, module: int) -> None:
        """Callable from any thread."""
        ...

    def function(self, module: int, name: str) -> int:
        """An entry point of a module."""
        ...

    def launch(self, function: int, launch: Launch, stream: int) -> None:
        """Queue a kernel; its parameters are copied now."""
        ...

    def begin_capture(self, stream: int) -> None:
        """From now on record what this thread puts into the stream, instead of running it."""
        ...

    def end_capture(self, stream: int) -> int:
        """Stop recording; an executable graph, uploaded. On an error the stream is usable again."""
        ...

    def abandon_capture(self, stream: int) -> None:
        """Stop recording and forget what was recorded; the stream is usable again."""
        ...

    def launch_graph(self, graph: int, stream: int) -> None:
        """Queue everything that was recorded."""
        ...

    def destroy_graph(self, graph: int) -> None:
        """A graph that is running is destroyed when it is done. Callable from any thread."""
        ...

    def context_of(self, address: int) -> int | None:
        """The context that owns device memory, or None where that cannot be said."""
        ...

    def is_own_context(self, context: int) -> bool:
        """Whether that is this driver's context."""
        ...

    def close(self) -> None:
        """Release the context. Callable from any thread."""
        ...
