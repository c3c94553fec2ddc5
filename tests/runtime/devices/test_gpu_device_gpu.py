"""The `cuda` device on a GPU: the same promises, and company of other libraries in the process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.runs.device_behaviour import DeviceBehaviour, OpenDevice

from sdrt.runtime.devices.gpu.device import CudaDevice

pytestmark = pytest.mark.gpu


@pytest.fixture
def open_device() -> OpenDevice:
    def open_device(*, stream: object = None) -> CudaDevice:
        return CudaDevice(stream=stream)

    return open_device


class TestOnDriver(DeviceBehaviour):
    """On cuda-bindings."""


class TestBesidePyTorch:
    """One GPU, one process, two libraries."""

    @pytest.fixture
    def torch(self) -> Any:
        import torch

        assert torch.cuda.is_available(), "this PyTorch has no CUDA: install one that does"
        return torch

    @pytest.fixture
    def device(self) -> Iterator[CudaDevice]:
        with CudaDevice() as device:
            yield device

    @pytest.mark.parametrize("elements", [1 << 10, 1 << 26])
    def test_a_tensor_is_read_after_torch_has_written_it(
        self, device: CudaDevice, torch: Any, elements: int
    ) -> None:
        tensor = torch.zeros(elements, device="cuda")
        for _ in range(20):
            tensor += 1  # queued, not run
        taken = device.from_cuda_array(tensor)
        result = device.zeros((elements,), "float32")
        device.copy(taken, result)
        assert (device.download(result) == 20).all()

    def test_torch_reads_an_array_after_it_was_written(self, device: CudaDevice, torch: Any) -> None:
        buffer = device.zeros((1 << 26,), "float32")
        device.synchronize()
        device.upload(np.full(buffer.shape, 3, np.float32), buffer)
        tensor = torch.from_dlpack(buffer)
        assert tensor.data_ptr() == buffer.address
        assert tensor.device.type == "cuda"
        assert bool((tensor == 3).all())

    def test_torch_keeps_the_memory_of_an_array(self, device: CudaDevice, torch: Any) -> None:
        tensor = torch.from_dlpack(device.zeros((1 << 20,), "float32"))
        gc.collect()
        others = [device.zeros((1 << 20,), "float32") for _ in range(8)]
        for other in others:
            device.upload(np.ones(1 << 20, np.float32), other)
        device.synchronize()
        assert not bool(tensor.any())

    def test_a_stream_of_torch_is_used_and_recorded(self, torch: Any) -> None:
        stream = torch.cuda.Stream()
        with CudaDevice(stream=stream) as device, torch.cuda.stream(stream):
            assert device.stream == stream.cuda_stream
            buffer = device.zeros((1 << 20,), "float32")
            graph = device.capture(lambda: device.clear(buffer))
            tensor = torch.as_tensor(buffer, device="cuda")
            tensor += 5
            assert bool((tensor == 5).all())
            graph()
            assert not bool(tensor.any())

    def test_torch_goes_on_after_a_device_was_closed(self, torch: Any) -> None:
        tensor = torch.ones(1000, device="cuda")
        with CudaDevice() as device:
            device.zeros((1000,), "float32")
        gc.collect()
        assert float((tensor + 1).sum()) == 2000
