"""The ``cuda`` device: everything is queued in one stream of one GPU, and the host waits only for results."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sdrt.kernels import check_finite, guidance_rescale, guided_step, image_to_uint8, philox_normal
from sdrt.kernels.compile import cubin
from sdrt.kernels.guided_step import StepBuffers
from sdrt.kernels.launch import Launch
from sdrt.runtime.devices.device import checked_view
from sdrt.runtime.devices.gpu.arrays import DeviceArray
from sdrt.runtime.devices.gpu.driver import DeviceFacts, Driver, OutOfMemoryError
from sdrt.runtime.devices.gpu.graph import Graph
from sdrt.runtime.devices.gpu.interop import foreign_array, stream_handle
from sdrt.runtime.devices.gpu.kernel_modules import KernelModules
from sdrt.runtime.devices.gpu.staging import DownloadBuffer, UploadRing
from sdrt.runtime.devices.gpu.stream import Owned, Stream
from sdrt.runtime.devices.gpu.timer import CudaTimer
from sdrt.runtime.errors import BackendError, DeviceMemoryError, UsageError


class CudaDevice:
    """One GPU, one stream (`sdrt.runtime.devices.device.Device`).

    Several threads may load executors on it at once; drawing is for one thread at a time.

    Attributes:
        name: The device's name, such as ``cuda:0``.
        facts: The facts that are asked about the GPU once.
        stream: The handle of the stream that everything is queued in, for executors.
    """

    def __init__(
        self,
        ordinal: int | None = None,
        *,
        stream: object = None,
        driver: Driver | None = None,
        compiler: Callable[[str, str], bytes] = cubin,
    ) -> None:
        """Open a GPU.

        Args:
            ordinal: Its number among the visible ones; by default the stream's, or 0.
            stream: A caller's stream (`stream_handle` says which kinds), which must outlive the device and
                its buffers; by default a new one, which does not synchronise with the default stream. Its
                context is used; otherwise it is the GPU's primary context, which other libraries use too.
            driver: The driver; by default the real one.
            compiler: Gives the cubin of a kernel's module for an architecture.

        Raises:
            BackendError: No bindings, no driver, a driver too old, or no GPU.
            UsageError: There is no such GPU, or the stream cannot be used.
        """
        handle = 0 if stream is None else stream_handle(stream)
        driver = driver or _open_driver(ordinal, handle)
        driver.make_current()
        own = Stream(driver, handle, keep=stream)
        own.hold()
        self._stream: Stream | None = own
        self.facts: DeviceFacts = driver.facts
        self.name = f"cuda:{self.facts.ordinal}"
        self.stream = own.handle
        self._kernels = KernelModules(own, compiler)
        self._uploads = UploadRing(own)
        self._downloads = DownloadBuffer(own)
        self._scratch: DeviceArray | None = None
        self._lock = threading.RLock()  # for what is made lazily or gone round in: staging, kernels, scratch

    def _open(self, *, recordable: bool = False) -> Stream:
        """The stream, with its context current in this thread.

        Args:
            recordable: What follows may become part of a graph.
        """
        stream = self._stream
        if stream is None:
            raise BackendError(f"the device {self.name} was closed: load the pipeline again")
        if stream.capturing and not recordable:
            raise UsageError(
                "work that is recorded may launch kernels, copy and clear on the device, and no more"
            )
        stream.driver.make_current()
        return stream

    def make_current(self) -> None:
        """Make the GPU's context current in this thread, for libraries that need it so."""
        self._open(recordable=True)

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes of the GPU, whoever uses it."""
        return self._open(recordable=True).driver.memory_info()

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """See `Device.zeros`."""
        stream = self._open()
        nbytes = max(math.prod(shape) * np.dtype(dtype).itemsize, 1)  # the driver gives no empty memory
        driver, handle = stream.driver, stream.handle
        owner = Owned(stream, self._allocate(stream, nbytes), lambda address: driver.free(address, handle))
        driver.fill_zero(owner.handle, nbytes, handle)
        return DeviceArray(stream, owner, owner.handle, shape, dtype)

    def _allocate(self, stream: Stream, nbytes: int) -> int:
        driver = stream.driver
        try:
            return driver.allocate(nbytes, stream.handle)
        except OutOfMemoryError:
            # Memory whose release is queued, or that the driver keeps for reuse, may do.
            driver.synchronize_stream(stream.handle)
            driver.trim()
        try:
            return driver.allocate(nbytes, stream.handle)
        except OutOfMemoryError as error:
            raise self._memory_error(driver, f"{_mib(nbytes)} more are needed") from error

    def _memory_error(self, driver: Driver, needed: str) -> DeviceMemoryError:
        free, total = driver.memory_info()
        return DeviceMemoryError(
            f"{self.name} ({self.facts.name}) has too little memory: {needed}, {_mib(free)} of {_mib(total)} "
            "are free; draw fewer or smaller pictures at once, or end other programs on the GPU"
        )

    def view(self, buffer: DeviceArray, offset: int, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """See `Device.view`."""
        checked_view(buffer, offset, shape, np.dtype(dtype))
        return buffer.part(offset, shape, dtype)

    def scratch(self, nbytes: int) -> DeviceArray:
        """Working memory that everything in the stream may share, of at least ``nbytes``; uint8.

        A larger request gets new memory; who holds the former goes on with it.
        """
        with self._lock:
            if self._scratch is None or self._scratch.nbytes < nbytes:
                self._scratch = None  # may free it before the larger one is allocated
                self._scratch = self.zeros((nbytes,), np.uint8)
            return self._scratch

    def upload(self, array: NDArray[Any], buffer: DeviceArray) -> None:
        """See `Device.upload`."""
        self._open()
        array = np.asarray(array)
        if array.shape != _device_array(buffer).shape:
            raise UsageError(f"an array of shape {list(array.shape)} was given for {buffer!r}")
        with self._lock:
            self._uploads.copy(array, buffer)

    def clear(self, buffer: DeviceArray) -> None:
        """See `Device.clear`."""
        stream = self._open(recordable=True)
        if _device_array(buffer).nbytes:
            stream.driver.fill_zero(buffer.address, buffer.nbytes, stream.handle)

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """See `Device.copy`."""
        stream = self._open(recordable=True)
        if _device_array(source).shape != _device_array(target).shape or source.dtype != target.dtype:
            raise UsageError(
                f"{source!r} was given to copy into {target!r}: shape and dtype must be the same"
            )
        if source.nbytes:
            stream.driver.copy_on_device(target.address, source.address, source.nbytes, stream.handle)

    def from_cuda_array(self, array: Any) -> DeviceArray:
        """See `Device.from_cuda_array`."""
        return foreign_array(self._open(), array)

    def download(self, buffer: DeviceArray) -> NDArray[Any]:
        """See `Device.download`."""
        self._open()
        with self._lock:
            return self._downloads.copy(_device_array(buffer))

    def prepare_input(self, buffers: StepBuffers) -> None:
        """See `Device.prepare_input`."""
        self._launch(guided_step.launch_prepare_input(buffers))

    def guidance_rescale(self, buffers: StepBuffers) -> None:
        """See `Device.guidance_rescale`."""
        self._launch(guidance_rescale.launch(buffers))

    def guided_step(self, buffers: StepBuffers) -> None:
        """See `Device.guided_step`."""
        self._launch(guided_step.launch(buffers))

    def philox_normal(
        self,
        noise: DeviceArray,
        seeds: DeviceArray,
        counter: DeviceArray | None = None,
        draws: DeviceArray | None = None,
    ) -> None:
        """See `Device.philox_normal`."""
        self._launch(philox_normal.launch(noise, seeds, counter, draws))

    def check_finite(self, buffer: DeviceArray, fault: DeviceArray) -> None:
        """See `Device.check_finite`."""
        self._launch(check_finite.launch(buffer, fault))

    def image_to_uint8(self, image: DeviceArray, pixels: DeviceArray) -> None:
        """See `Device.image_to_uint8`."""
        self._launch(image_to_uint8.launch(image, pixels))

    def _launch(self, launch: Launch) -> None:
        stream = self._open(recordable=True)
        with self._lock:
            function = self._kernels.function(launch.module, launch.entry)
        stream.driver.launch(function, launch, stream.handle)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Device.capture`.

        Raises:
            BackendError: Something in ``work`` cannot be captured; the device stays usable.
            DeviceMemoryError: There is no room for the graph; the device stays usable.
        """
        stream = self._open(recordable=True)
        try:
            return Graph(stream, work, check=self._open)
        except OutOfMemoryError as error:
            needed = "a graph was recorded for which there is no room"
            raise self._memory_error(stream.driver, needed) from error

    def timer(self) -> CudaTimer:
        """See `Device.timer`."""
        return CudaTimer(self._open())

    def synchronize(self) -> None:
        """See `Device.synchronize`."""
        stream = self._open()
        stream.driver.synchronize_stream(stream.handle)

    def close(self) -> None:
        """Wait for the stream and give back what the device itself holds.

        Buffers that are still referred to are freed with their last reference, and the stream and the context
        with the last of those.
        """
        stream, self._stream = self._stream, None
        if stream is None:
            return
        stream.driver.make_current()
        try:
            stream.driver.synchronize_stream(stream.handle)
        finally:
            del self._kernels, self._uploads, self._downloads
            self._scratch = None
            stream.release()

    def __enter__(self) -> CudaDevice:
        """The device itself; closed at the end of the block."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close."""
        self.close()

    def __del__(self) -> None:
        """Let go of the stream; nobody is told of errors here."""
        stream = getattr(self, "_stream", None)
        if stream is not None:
            stream.give_back(stream.release)


def _open_driver(ordinal: int | None, stream: int) -> Driver:
    from sdrt.runtime.devices.gpu.bindings import CudaDriver

    return CudaDriver(ordinal, stream or None)


def _device_array(buffer: object) -> DeviceArray:
    if not isinstance(buffer, DeviceArray):
        raise UsageError(f"a {type(buffer).__name__} was given: a buffer of the device is wanted")
    return buffer


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"
