"""Streams and arrays of other libraries: what is taken, what is given, and in which order it runs."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.dlpack
from support.fakes.recording import RecordingDriver, as_numpy, recording_device

from sdrt.runtime.devices.gpu.device import CudaDevice
from sdrt.runtime.devices.gpu.driver import LEGACY_STREAM
from sdrt.runtime.devices.gpu.interop import stream_handle
from sdrt.runtime.devices.host import HostDevice
from sdrt.runtime.errors import UsageError

HANDLE = 0x55AA1230


@pytest.fixture
def driver() -> RecordingDriver:
    return RecordingDriver()


@pytest.fixture
def device(driver: RecordingDriver) -> Iterator[CudaDevice]:
    with recording_device(driver) as device:
        yield device


class _Protocol:
    """cuda.core's protocol."""

    def __init__(self, version: int, handle: int) -> None:
        self._answer = version, handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return self._answer


class _Attribute:
    def __init__(self, name: str, handle: object) -> None:
        setattr(self, name, handle)


class _CudaArray:
    """An array as Numba's protocol shows it; the memory is NumPy's."""

    def __init__(self, array: np.ndarray[Any, Any], **changed: object) -> None:
        self.array = array
        interface = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "strides": None,
            "version": 3,
        }
        self.__cuda_array_interface__ = interface | changed


class _DeviceTensor:
    """A tensor in CPU memory that notes which stream DLPack was asked for."""

    def __init__(self, tensor: torch.Tensor, device: tuple[int, int] = (1, 0)) -> None:
        self.tensor = tensor
        self.device = device
        self.streams: list[object] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: object = None) -> object:
        self.streams.append(stream)
        return self.tensor.__dlpack__()


# Streams


@pytest.mark.parametrize(
    "stream",
    [
        HANDLE,
        _Protocol(0, HANDLE),
        _Attribute("__cuda_stream__", (0, HANDLE)),
        _Attribute("handle", HANDLE),  # PyCUDA
        _Attribute("cuda_stream", HANDLE),  # PyTorch
        _Attribute("ptr", HANDLE),  # CuPy
    ],
    ids=["handle", "protocol", "protocol as an attribute", "PyCUDA", "PyTorch", "CuPy"],
)
def test_a_callers_stream_is_used(stream: object, driver: RecordingDriver) -> None:
    assert stream_handle(stream) == HANDLE
    with recording_device(driver, stream=stream) as device:
        assert device.stream == HANDLE
        assert device.zeros((2,), "float32").__cuda_array_interface__["stream"] == HANDLE
        assert "streams" not in driver.live  # none was made


@pytest.mark.parametrize("handle", [0, 1, 2])
@pytest.mark.parametrize("kind", ["handle", "protocol"])
def test_a_default_stream_is_refused(handle: int, kind: str, driver: RecordingDriver) -> None:
    stream: object = handle if kind == "handle" else _Protocol(0, handle)
    with pytest.raises(UsageError, match=r"default stream, which cannot be captured.*create one of your own"):
        recording_device(driver, stream=stream)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ("cuda:0", "the stream is a str"),
        (True, "the stream is a bool"),
        (1.5, "the stream is a float"),
        (-5, "a handle is positive"),
        (_Protocol(1, HANDLE), "version 1 of __cuda_stream__: 0 is known"),
    ],
)
def test_what_is_no_stream_is_refused(stream: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stream_handle(stream)


def test_a_callers_stream_is_kept_alive_with_the_buffers(driver: RecordingDriver) -> None:
    stream = _Attribute("handle", HANDLE)
    references = sys.getrefcount(stream)
    device = recording_device(driver, stream=stream)
    buffer = device.zeros((4,), "float32")
    device.close()
    assert sys.getrefcount(stream) > references
    del buffer
    assert sys.getrefcount(stream) == references


# Arrays that come in


def test_dlpack_is_asked_for_our_stream(device: CudaDevice) -> None:
    tensor = _DeviceTensor(torch.arange(6, dtype=torch.float16).reshape(2, 3))
    taken = device.from_cuda_array(tensor)
    assert tensor.streams == [device.stream]
    assert (taken.shape, taken.dtype.name) == ((2, 3), "float16")
    assert taken.address == tensor.tensor.data_ptr()
    assert as_numpy(taken).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_memory_that_came_in_by_dlpack_is_given_back_when_it_is_not_used_any_more(device: CudaDevice) -> None:
    array = np.arange(4, dtype=np.float32)
    references = sys.getrefcount(array)
    taken = device.from_cuda_array(_DeviceTensor(torch.from_numpy(array)))
    view = taken.part(4, (2,), "float32")
    del taken
    gc.collect()
    assert sys.getrefcount(array) > references
    assert as_numpy(view).tolist() == [1, 2]
    del view
    gc.collect()
    assert sys.getrefcount(array) == references


@pytest.mark.parametrize(
    ("given", "waited_for"),
    [
        ({"stream": HANDLE}, HANDLE),
        ({"stream": 1}, 1),
        ({"stream": None}, LEGACY_STREAM),
        ({}, LEGACY_STREAM),
    ],
    ids=["its stream", "the default stream", "PyCUDA", "version 2"],
)
def test_an_array_is_read_behind_its_stream(
    device: CudaDevice, driver: RecordingDriver, given: dict[str, object], waited_for: int
) -> None:
    array = np.zeros(4, np.float32)
    driver.register(array.ctypes.data, array.nbytes)
    target = device.zeros((4,), "float32")
    driver.make_current()
    driver.enqueue(waited_for, lambda: array.fill(7))  # queued there, not run
    device.copy(device.from_cuda_array(_CudaArray(array, **given)), target)
    assert driver.ordered == [(device.stream, waited_for)]
    assert device.download(target).tolist() == [7, 7, 7, 7]


def test_an_array_of_our_own_stream_needs_no_waiting(device: CudaDevice, driver: RecordingDriver) -> None:
    device.from_cuda_array(device.zeros((4,), "float32"))
    assert driver.ordered == []


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (_CudaArray(np.zeros((4, 4), np.float32), strides=(4, 16)), r"shape \[4, 4\] is not C-contiguous"),
        (_CudaArray(np.zeros(4, np.float32), stream=0), "stream 0, which the protocol forbids"),
        (_DeviceTensor(torch.zeros(4, 4).T), r"shape \[4, 4\] is not C-contiguous"),
        (_DeviceTensor(torch.zeros(4, dtype=torch.bfloat16)), "dtype code 4, 16 bits"),
        (_DeviceTensor(torch.zeros(4, requires_grad=True)), "_DeviceTensor cannot be taken"),
        (_DeviceTensor(torch.zeros(4), device=(1, 3)), "on GPU 3 was given, but the pipeline is on 0"),
        (_DeviceTensor(torch.zeros(4), device=(10, 0)), "memory of type 10 was given.*NumPy"),
        ([1, 2, 3], "a list was given: an array on the GPU is wanted"),
    ],
)
def test_what_cannot_be_taken_says_why(device: CudaDevice, array: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        device.from_cuda_array(array)


@pytest.mark.parametrize("strides", [(16, 4), (99, 4)], ids=["of C order", "of an axis of one"])
def test_strides_that_say_nothing_are_no_hindrance(device: CudaDevice, strides: tuple[int, ...]) -> None:
    shape = (4, 4) if strides[0] == 16 else (1, 4)
    taken = device.from_cuda_array(_CudaArray(np.ones(shape, np.float32), strides=strides))
    assert taken.shape == shape


def test_an_array_of_another_context_says_how_to_share_one(
    device: CudaDevice, driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "context_of", lambda address: 2)
    with pytest.raises(UsageError, match=r"another CUDA context.*stream=.*import pycuda\.autoprimaryctx"):
        device.from_cuda_array(_CudaArray(np.zeros(4, np.float32)))


def test_the_host_takes_no_array_of_a_gpu(device: CudaDevice) -> None:
    with pytest.raises(UsageError, match=r"a DeviceArray on a GPU was given, but.* draws on the host"):
        HostDevice().from_cuda_array(device.zeros((4,), "float32"))


# Arrays that go out


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32", "uint8", "uint64", "int64"])
@pytest.mark.parametrize("shape", [(2, 3), (5,), (2, 1, 3)])
def test_other_libraries_read_the_same_memory(device: CudaDevice, dtype: str, shape: tuple[int, ...]) -> None:
    buffer = device.zeros(shape, dtype)
    device.upload(np.arange(np.prod(shape)).reshape(shape).astype(dtype), buffer)
    device.synchronize()
    array, tensor = np.from_dlpack(buffer), torch.utils.dlpack.from_dlpack(buffer)
    assert array.dtype == dtype
    assert array.ctypes.data == tensor.data_ptr() == buffer.address
    assert array.tolist() == tensor.tolist() == np.arange(np.prod(shape)).reshape(shape).tolist()


def test_memory_that_went_out_is_kept_until_the_reader_is_done(
    device: CudaDevice, driver: RecordingDriver
) -> None:
    tensor = torch.utils.dlpack.from_dlpack(device.zeros((4,), "float32"))
    gc.collect()
    device.synchronize()
    assert driver.live["allocations"] == 1
    assert tensor.tolist() == [0, 0, 0, 0]
    del tensor
    gc.collect()
    device.synchronize()
    assert "allocations" not in driver.live


def test_a_capsule_that_nobody_reads_keeps_nothing(device: CudaDevice, driver: RecordingDriver) -> None:
    for _ in range(3):
        device.zeros((4,), "float32").__dlpack__()
    gc.collect()
    device.synchronize()
    assert "allocations" not in driver.live


@pytest.mark.parametrize(
    ("stream", "waiting"), [(None, [LEGACY_STREAM]), (1, [1]), (HANDLE, [HANDLE]), (-1, []), ("ours", [])]
)
def test_the_reader_of_a_capsule_waits_for_us(
    device: CudaDevice, driver: RecordingDriver, stream: Any, waiting: list[int]
) -> None:
    buffer = device.zeros((4,), "float32")
    buffer.__dlpack__(stream=device.stream if stream == "ours" else stream)
    assert driver.ordered == [(reader, device.stream) for reader in waiting]


def test_what_dlpack_cannot_say_is_an_error(device: CudaDevice) -> None:
    buffer = device.zeros((4,), "float32")
    with pytest.raises(BufferError, match="a copy was asked for"):
        buffer.__dlpack__(copy=True)
    with pytest.raises(BufferError, match=r"on device \(1, 0\), not on \(2, 0\)"):
        buffer.__dlpack__(dl_device=(2, 0))
    with pytest.raises(BufferError, match="DLPack has no bool"):
        device.zeros((4,), "bool").__dlpack__()


def test_the_array_interface_describes_the_memory(device: CudaDevice) -> None:
    buffer = device.zeros((2, 3), "float16")
    assert buffer.__cuda_array_interface__ == {
        "shape": (2, 3),
        "typestr": "<f2",
        "data": (buffer.address, False),
        "strides": None,
        "stream": device.stream,
        "version": 3,
    }
    assert (buffer.ndim, buffer.size, buffer.nbytes, len(buffer)) == (2, 6, 12, 2)
    assert repr(buffer) == f"DeviceArray([2, 3], float16, at {buffer.address:#x})"


def test_numpy_does_not_make_an_object_of_an_array_on_the_gpu(device: CudaDevice) -> None:
    with pytest.raises(TypeError, match="copy it to the host first"):
        np.asarray(device.zeros((4,), "float32"))
    with pytest.raises(TypeError, match="without axes"):
        len(device.zeros((), "float32"))


def test_a_used_capsule_is_refused(device: CudaDevice) -> None:
    class Twice(_DeviceTensor):
        capsule: object = None

        def __dlpack__(self, *, stream: object = None) -> object:
            self.capsule = self.capsule or self.tensor.__dlpack__()
            return self.capsule

    tensor = Twice(torch.zeros(4))
    kept = device.from_cuda_array(tensor)
    with pytest.raises(UsageError, match="was used before"):
        device.from_cuda_array(tensor)
    assert kept.shape == (4,)
