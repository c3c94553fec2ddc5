"""The `Driver` protocol on cuda-bindings, and what stops it: no bindings, no driver, an old one, no GPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

from sdrt.kernels.launch import Launch
from sdrt.runtime.devices.gpu.driver import CudaError, DeviceFacts, OutOfMemoryError
from sdrt.runtime.errors import BackendError, UsageError


def load_bindings() -> Any:
    """The module ``cuda.bindings.driver`` of an installation that has a driver new enough for it.

    Raises:
        BackendError: cuda-bindings is not installed, or there is no driver, or it is too old, or no GPU.
    """
    try:
        import cuda.bindings.driver as api  # 0.12 s that the host device need not spend
    except ImportError as error:
        raise BackendError(
            f"CUDA cannot be used from Python ({error}): pip install 'sdrt[rtx]', 'sdrt[tensorrt]' or "
            "'sdrt[cuda]', each of which brings cuda-bindings"
        ) from error
    try:
        version = _checked(api, "cuDriverGetVersion")
    except RuntimeError as error:  # what cuda-bindings raises where libcuda or a function of it is missing
        raise BackendError(
            f"no NVIDIA driver can be loaded ({error}): install the driver; in a container, give it the GPU "
            "(docker run --gpus all); without a GPU use --backend onnxruntime-cpu"
        ) from error
    if version // 1000 < api.CUDA_VERSION // 1000:
        raise BackendError(
            f"the NVIDIA driver supports CUDA {_dotted(version)}, but cuda-bindings and the kernels that are "
            f"compiled need CUDA {api.CUDA_VERSION // 1000}.0 or newer: update the driver, or on a "
            f"data-centre GPU install the package cuda-compat-{api.CUDA_VERSION // 1000}-"
            f"{api.CUDA_VERSION % 1000 // 10} and put its folder into LD_LIBRARY_PATH"
        )
    _checked(api, "cuInit", 0)
    return api


class CudaDriver:
    """The `Driver` protocol on cuda-bindings; see there for the methods."""

    dlpack_device_type = 2  # kDLCUDA

    def __init__(self, ordinal: int | None = None, stream: int | None = None) -> None:
        """Open a GPU.

        Args:
            ordinal: Its number among the visible ones; by default the stream's, or 0.
            stream: A caller's stream, whose context is then used; otherwise it is the GPU's primary context,
                which PyTorch, CuPy and the CUDA runtime use as well. It must be a live stream.

        Raises:
            BackendError: No bindings, no driver, a driver too old, or no GPU.
            UsageError: There is no such GPU, or the stream is on another one.
        """
        self._api = api = load_bindings()
        count = self._call("cuDeviceGetCount")
        if ordinal is not None and not 0 <= ordinal < count:
            raise UsageError(
                f"CUDA device {ordinal} was asked for, but the visible ones are {_numbers(count)}"
            )
        if not count:
            raise CudaError("cuDeviceGetCount", "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected")
        self._retained: Any = None
        if stream is None:
            device = self._call("cuDeviceGet", ordinal or 0)
            self._context = self._call("cuDevicePrimaryCtxRetain", device)
            self._retained = device
            self.make_current()
        else:
            self._context = self._call("cuStreamGetCtx", stream)
            self.make_current()
            device = self._call("cuCtxGetDevice")
            if ordinal not in (None, int(device)):
                raise UsageError(f"CUDA device {ordinal} was asked for, but the stream is on {int(device)}")
        self.facts = self._facts(device)
        self._pool = self._call("cuDeviceGetMemPool", device) if self.facts.memory_pools else None
        self._launch_graph: Callable[[int, int], Any] = api.cuGraphLaunch

    def _call(self, function: str, *arguments: Any) -> Any:
        return _checked(self._api, function, *arguments)

    def _facts(self, device: Any) -> DeviceFacts:
        attributes = self._api.CUdevice_attribute

        def attribute(name: str) -> int:
            return int(
                self._call("cuDeviceGetAttribute", getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{name}"), device)
            )

        name: bytes = self._call("cuDeviceGetName", 256, device)
        return DeviceFacts(
            ordinal=int(device),
            name=name.split(b"\0")[0].decode(),
            compute_capability=(
                attribute("COMPUTE_CAPABILITY_MAJOR"),
                attribute("COMPUTE_CAPABILITY_MINOR"),
            ),
            memory_pools=bool(attribute("MEMORY_POOLS_SUPPORTED")),
        )

    def _give_back(self, function: str, *arguments: Any) -> None:
        """Call from a finaliser: in any thread, and also when the process or its context is going away.

        After a fault on the GPU every call fails, and the fault itself was raised where it was found; when
        the process ends, the driver has freed everything. A finaliser has nobody to tell.
        """
        if self._context is None:
            return
        with contextlib.suppress(CudaError):
            self._call("cuCtxPushCurrent", self._context)
            try:
                self._call(function, *arguments)
            finally:
                self._call("cuCtxPopCurrent")

    def make_current(self) -> None:
        self._call("cuCtxSetCurrent", self._context)

    def memory_info(self) -> tuple[int, int]:
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def allocate(self, nbytes: int, stream: int) -> int:
        if self.facts.memory_pools:
            return int(self._call("cuMemAllocAsync", nbytes, stream))
        return int(self._call("cuMemAlloc", nbytes))

    def free(self, address: int, stream: int) -> None:
        if self.facts.memory_pools:
            self._give_back("cuMemFreeAsync", address, stream)
        else:
            self._give_back("cuMemFree", address)  # waits for the GPU itself

    def trim(self) -> None:
        if self._pool is not None:
            self._call("cuMemPoolTrimTo", self._pool, 0)

    def allocate_pinned(self, nbytes: int) -> int:
        return int(self._call("cuMemHostAlloc", nbytes, 0))

    def free_pinned(self, address: int, stream: int) -> None:
        self._give_back("cuStreamSynchronize", stream)
        self._give_back("cuMemFreeHost", address)

    def fill_zero(self, address: int, nbytes: int, stream: int) -> None:
        self._call("cuMemsetD8Async", address, 0, nbytes, stream)

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._call("cuMemcpyHtoDAsync", target, source, nbytes, stream)

    def copy_to_host(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._call("cuMemcpyDtoHAsync", target, source, nbytes, stream)

    def copy_on_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._call("cuMemcpyDtoDAsync", target, source, nbytes, stream)

    def create_stream(self) -> int:
        return int(self._call("cuStreamCreate", int(self._api.CUstream_flags.CU_STREAM_NON_BLOCKING)))

    def destroy_stream(self, stream: int) -> None:
        self._give_back("cuStreamDestroy", stream)

    def synchronize_stream(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def create_event(self, *, timing: bool) -> int:
        flags = self._api.CUevent_flags
        return int(
            self._call(
                "cuEventCreate", int(flags.CU_EVENT_DEFAULT if timing else flags.CU_EVENT_DISABLE_TIMING)
            )
        )

    def destroy_event(self, event: int) -> None:
        self._give_back("cuEventDestroy", event)

    def record_event(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", event, stream)

    def event_done(self, event: int) -> bool:
        (error,) = self._api.cuEventQuery(event)
        if error == self._api.CUresult.CUDA_ERROR_NOT_READY:
            return False
        _raise_for(self._api, "cuEventQuery", error)
        return True

    def synchronize_event(self, event: int) -> None:
        self._call("cuEventSynchronize", event)

    def wait_event(self, stream: int, event: int) -> None:
        self._call("cuStreamWaitEvent", stream, event, 0)

    def elapsed(self, start: int, end: int) -> float:
        return float(self._call("cuEventElapsedTime", start, end)) / 1e3  # milliseconds

    @contextlib.contextmanager
    def _relaxed(self) -> Iterator[None]:
        """Loading is among the calls that end a capture; a thread in relaxed mode may do it all the same."""
        modes = self._api.CUstreamCaptureMode
        before = self._call("cuThreadExchangeStreamCaptureMode", modes.CU_STREAM_CAPTURE_MODE_RELAXED)
        try:
            yield
        finally:
            self._call("cuThreadExchangeStreamCaptureMode", before)

    def load_module(self, image: bytes) -> int:
        with self._relaxed():
            return int(self._call("cuModuleLoadData", image))

    def unload_module(self, module: int) -> None:
        self._give_back("cuModuleUnload", module)

    def function(self, module: int, name: str) -> int:
        with self._relaxed():  # drivers load a module's functions when they are first asked for
            return int(self._call("cuModuleGetFunction", module, name.encode()))

    def launch(self, function: int, launch: Launch, stream: int) -> None:
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(launch.params))
        self._call(
            "cuLaunchKernel",
            function,
            *(launch.grid, 1, 1),
            *(launch.block, 1, 1),
            0,  # bytes of dynamic shared memory
            stream,
            ctypes.addressof(pointers),
            0,
        )

    def begin_capture(self, stream: int) -> None:
        # Relaxed: what other threads do with the GPU (load a module, allocate) must not end it, nor what
        # ONNX Runtime does beside queueing kernels.
        mode = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._call("cuStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        graph = self._call("cuStreamEndCapture", stream)
        try:
            executable = int(self._call("cuGraphInstantiate", graph, 0))
        finally:
            self._call("cuGraphDestroy", graph)
        try:
            self._call("cuGraphUpload", executable, stream)  # else the first launch would have to do it
        except CudaError:
            self.destroy_graph(executable)
            raise
        return executable

    def abandon_capture(self, stream: int) -> None:
        error, graph = self._api.cuStreamEndCapture(stream)
        if not error and int(graph):
            self._call("cuGraphDestroy", graph)

    def launch_graph(self, graph: int, stream: int) -> None:
        (error,) = self._launch_graph(graph, stream)
        if error:
            _raise_for(self._api, "cuGraphLaunch", error)

    def destroy_graph(self, graph: int) -> None:
        self._give_back("cuGraphExecDestroy", graph)

    def context_of(self, address: int) -> int | None:
        attribute = self._api.CUpointer_attribute.CU_POINTER_ATTRIBUTE_CONTEXT
        try:
            context = self._call("cuPointerGetAttribute", attribute, address)
        except CudaError:
            return None
        return int(context) or None  # memory of a pool belongs to no context

    def is_own_context(self, context: int) -> bool:
        return context == int(self._context)

    def close(self) -> None:
        if self._context is not None and self._retained is not None:
            with contextlib.suppress(CudaError):  # the driver may be shutting down
                self._call("cuDevicePrimaryCtxRelease", self._retained)
        self._context = None


def _checked(api: Any, function: str, *arguments: Any) -> Any:
    """Call a driver function; its one result, a tuple of several, or None."""
    error, *results = getattr(api, function)(*arguments)
    if error:
        _raise_for(api, function, error)
    return results[0] if len(results) == 1 else tuple(results) or None


def _raise_for(api: Any, function: str, error: Any) -> None:
    if not error:
        return
    _, text = api.cuGetErrorString(error)
    code = getattr(error, "name", str(error))
    kind = OutOfMemoryError if code == "CUDA_ERROR_OUT_OF_MEMORY" else CudaError
    raise kind(function, code, text.decode() if text else "unknown error")


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _numbers(count: int) -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    allowed = f" (CUDA_VISIBLE_DEVICES is {visible!r})" if visible is not None else ""
    return (f"0 to {count - 1}" if count > 1 else "0 alone" if count else "none") + allowed
