"""The real `CudaDevice` on a driver that keeps device memory on the host, for tests without a GPU.

The sampling loop and the pipeline run on it, the kernels in their host build, and everything is counted: see
`RecordingDriver.counts`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support.fakes.recording_driver import COUNTED, RecordingDriver

from sdrt.runtime.backends.executor import Executor
from sdrt.runtime.bundle.families.record import ComponentSpec
from sdrt.runtime.devices.gpu.arrays import DeviceArray
from sdrt.runtime.devices.gpu.device import CudaDevice

__all__ = ["COUNTED", "RecordedExecutor", "RecordingDriver", "as_numpy", "recording_device"]


class RecordedExecutor:
    """An executor of NumPy arrays as one of the recording driver: a call goes into the stream."""

    def __init__(self, executor: Executor, device: CudaDevice, driver: RecordingDriver) -> None:
        """``executor`` computes when the stream runs."""
        self._executor = executor
        self.spec: ComponentSpec = executor.spec
        self.capturable, self.generation = True, 0
        self._stream = device.stream
        self._driver = driver
        self._device = device

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Callable[[], None]:
        """See `Executor.bind`; the buffers are the device's."""
        evaluate = self._executor.bind(
            {name: as_numpy(buffer) for name, buffer in inputs.items()},
            {name: as_numpy(buffer) for name, buffer in outputs.items()},
        )
        kept = (inputs, outputs)  # the NumPy arrays do not keep the memory

        def call() -> None:
            assert kept
            self._device.make_current()
            self._driver.enqueue(self._stream, evaluate)

        return call

    def replace_weights(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """See `Executor.replace_weights`; the calls in the stream are bound to the other executor."""
        self._executor.replace_weights(weights)

    def close(self) -> None:
        """See `Executor.close`."""
        self._executor.close()


def recording_device(driver: RecordingDriver | None = None, *, stream: object = None) -> CudaDevice:
    """A `CudaDevice` on a recording driver; nothing is compiled for a GPU."""
    driver = driver or RecordingDriver()
    driver.opened += 1
    return CudaDevice(
        driver=driver,
        stream=stream,
        compiler=lambda module, architecture: f"{module} for {architecture}".encode(),
    )


def as_numpy(buffer: DeviceArray) -> NDArray[Any]:
    """The memory of a buffer on a recording driver, with what has run so far; does not keep it."""
    memory = memoryview((ctypes.c_uint8 * buffer.nbytes).from_address(buffer.address)).cast("B")
    return np.frombuffer(memory, buffer.dtype).reshape(buffer.shape)
