"""What every `cuda` device does, whatever its driver: one class of tests for all of them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray
from support.runs.device_steps import assert_same, host_buffers, on_device

from sdrt.kernels.philox_normal import NO_DRAW
from sdrt.runtime.devices.gpu.arrays import DeviceArray
from sdrt.runtime.devices.gpu.device import CudaDevice
from sdrt.runtime.devices.gpu.staging import DOWNLOAD_BYTES, RING_BYTES
from sdrt.runtime.devices.host import HostDevice
from sdrt.runtime.errors import BackendError, DeviceMemoryError, UsageError
from tolerances import PHILOX_ON_GPU

SOME_BYTES = 4 << 20


class OpenDevice(Protocol):
    """Opens a device; several of one test share the GPU."""

    def __call__(self, *, stream: object = None) -> CudaDevice:
        """``stream`` as for `CudaDevice`."""
        ...


class DeviceBehaviour:
    """A subclass gives the fixture ``open_device``."""

    @pytest.fixture
    def device(self, open_device: OpenDevice) -> Iterator[CudaDevice]:
        with open_device() as device:
            yield device

    # Memory

    @pytest.mark.parametrize("shape", [(), (3,), (2, 0, 5), (2, 4, 8, 8)])
    @pytest.mark.parametrize("dtype", ["float16", "float32", "int32", "uint8", "uint64"])
    def test_a_new_buffer_holds_zeros(self, device: CudaDevice, shape: tuple[int, ...], dtype: str) -> None:
        result = device.download(device.zeros(shape, dtype))
        assert result.shape == shape
        assert result.dtype == dtype
        assert not result.any()

    def test_memory_of_a_dead_buffer_is_free_again(self, device: CudaDevice) -> None:
        def free_with_a_buffer() -> int:
            buffer = device.zeros((SOME_BYTES,), "uint8")
            device.synchronize()
            assert buffer.address
            return device.memory_info()[0]

        free = free_with_a_buffer()
        for _ in range(200):
            assert free - free_with_a_buffer() < 16 * SOME_BYTES  # a driver allocates in large pieces

    def test_what_does_not_fit_is_an_error_and_the_next_buffer_works(self, device: CudaDevice) -> None:
        free, total = device.memory_info()
        with pytest.raises(
            DeviceMemoryError, match=r"[\d,]+ MiB more are needed, [\d,]+ MiB of [\d,]+ MiB are"
        ):
            device.zeros((total * 2,), "uint8")
        assert device.download(device.zeros((4,), "float32")).tolist() == [0, 0, 0, 0]
        assert free

    def test_a_view_is_the_same_memory_and_keeps_it(self, device: CudaDevice) -> None:
        whole = device.zeros((64,), "uint8")
        part = device.view(whole, 16, (2, 3), "float32")
        device.upload(np.arange(6, dtype=np.float32).reshape(2, 3), part)
        assert device.download(whole)[16:40].view(np.float32).tolist() == [0, 1, 2, 3, 4, 5]
        del whole
        gc.collect()
        assert device.download(part).tolist() == [[0, 1, 2], [3, 4, 5]]

    @pytest.mark.parametrize(
        ("offset", "shape", "message"),
        [
            (2, (2,), "multiple of 4"),
            (-4, (2,), "multiple of 4"),
            (60, (2,), "leaves its buffer of 64 bytes"),
        ],
    )
    def test_a_view_outside_its_buffer_is_refused(
        self, device: CudaDevice, offset: int, shape: tuple[int, ...], message: str
    ) -> None:
        with pytest.raises(UsageError, match=message):
            device.view(device.zeros((64,), "uint8"), offset, shape, "float32")
        with pytest.raises(UsageError, match="only uint8"):
            device.view(device.zeros((64,), "float32"), 0, shape, "float32")

    def test_scratch_memory_is_shared_until_more_is_wanted(self, device: CudaDevice) -> None:
        first = device.scratch(1000)
        assert device.scratch(500).address == first.address
        larger = device.scratch(5000)
        assert larger.nbytes >= 5000
        assert device.scratch(1000).address == larger.address
        device.upload(np.full(1000, 7, np.uint8), first)  # who holds the former goes on with it
        assert device.download(first).tolist() == [7] * 1000

    # Copies

    @pytest.mark.parametrize(
        ("source", "target"),
        [("float64", "float32"), ("float32", "float16"), ("float16", "float32"), ("int64", "int32")],
    )
    def test_an_upload_converts_and_leaves_the_source_to_the_caller(
        self, device: CudaDevice, source: str, target: str
    ) -> None:
        array = np.arange(24).reshape(2, 3, 4).astype(source)
        buffer = device.zeros(array.shape, target)
        device.upload(array, buffer)
        array[:] = 99
        result = device.download(buffer)
        assert result.dtype == target
        assert result.ravel().tolist() == list(range(24))

    def test_an_upload_of_a_transposed_array_keeps_its_order(self, device: CudaDevice) -> None:
        array = np.arange(6, dtype=np.float32).reshape(2, 3).T
        buffer = device.zeros((3, 2), "float32")
        device.upload(array, buffer)
        np.testing.assert_array_equal(device.download(buffer), array)

    def test_what_does_not_fit_a_buffer_is_refused(self, device: CudaDevice) -> None:
        buffer = device.zeros((4,), "int32")
        with pytest.raises(UsageError, match=r"shape \[3\] was given"):
            device.upload(np.zeros(3, np.int32), buffer)
        with pytest.raises(TypeError, match="same_kind"):
            device.upload(np.zeros(4, np.float32), buffer)
        with pytest.raises(UsageError, match="shape and dtype must be the same"):
            device.copy(buffer, device.zeros((4,), "float32"))
        with pytest.raises(UsageError, match="a ndarray was given"):
            device.download(np.zeros(4))  # type: ignore[arg-type]
        assert device.download(buffer).tolist() == [0, 0, 0, 0]

    def test_arrays_larger_than_the_staging_memory_arrive(self, device: CudaDevice) -> None:
        array = np.random.default_rng(0).integers(
            0, 256, max(2 * RING_BYTES, DOWNLOAD_BYTES) + 12345, np.uint8
        )
        buffer = device.zeros(array.shape, "uint8")
        device.upload(array, buffer)
        np.testing.assert_array_equal(device.download(buffer), array)

    def test_uploads_that_go_round_the_ring_do_not_overwrite_each_other(self, device: CudaDevice) -> None:
        sizes = np.random.default_rng(0).integers(1, RING_BYTES // 3, 40)
        buffers = [device.zeros((size,), "uint8") for size in sizes]
        array = np.empty(sizes.max(), np.uint8)
        for index, buffer in enumerate(buffers):
            array.fill(index)
            device.upload(array[: buffer.size], buffer)
        for index, buffer in enumerate(buffers):
            assert (device.download(buffer) == index).all()

    def test_copy_and_clear_happen_on_the_device(self, device: CudaDevice) -> None:
        source, target = device.zeros((2, 3), "float32"), device.zeros((2, 3), "float32")
        device.upload(np.arange(6.0).reshape(2, 3), source)
        device.copy(source, target)
        device.clear(source)
        assert device.download(target).tolist() == [[0, 1, 2], [3, 4, 5]]
        assert not device.download(source).any()
        empty = device.zeros((0,), "float32")
        device.copy(empty, empty)
        device.clear(empty)

    # Kernels

    @pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
    @pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_steps_are_those_of_the_host(
        self, device: CudaDevice, dtype: str, guided: bool, masked: bool
    ) -> None:
        host = host_buffers(dtype, guided=guided, masked=masked)
        buffers = on_device(device, host)
        reference = HostDevice()
        device.prepare_input(buffers)
        reference.prepare_input(host)
        assert_same(device, buffers, host)
        for _ in range(4):  # one more than there are rows
            if guided:
                device.guidance_rescale(buffers)
                reference.guidance_rescale(host)
            device.guided_step(buffers)
            reference.guided_step(host)
            assert_same(device, buffers, host)

    @pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
    def test_a_step_writes_one_half_or_both_whatever_it_reads(self, device: CudaDevice, guided: bool) -> None:
        host = host_buffers("float16", guided=guided, halves=1 if guided else 2)
        buffers = on_device(device, host)
        device.guided_step(buffers)
        HostDevice().guided_step(host)
        assert_same(device, buffers, host)

    def test_noise_is_that_of_the_host(self, device: CudaDevice) -> None:
        shape = (2, 4, 8, 8)
        seeds, row = np.array([3, 2**40 + 1], np.uint64), np.array([2], np.int32)
        noise, expected = device.zeros(shape, "float32"), np.empty(shape, np.float32)
        for of_row in ((), (row, np.array([1, NO_DRAW, 7], np.int32)), (row, np.full(3, NO_DRAW, np.int32))):
            given = []
            for array in (seeds, *of_row):
                given.append(device.zeros(array.shape, array.dtype))
                device.upload(array, given[-1])
            device.philox_normal(noise, *given)
            HostDevice().philox_normal(expected, seeds, *of_row)
            np.testing.assert_allclose(device.download(noise), expected, rtol=0, atol=PHILOX_ON_GPU)

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    @pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
    def test_a_fault_is_noted_and_stays(self, device: CudaDevice, dtype: str, wrong: float) -> None:
        buffer, fault = device.zeros((1, 3, 7, 5), dtype), device.zeros((1,), "int32")
        device.check_finite(buffer, fault)
        assert device.download(fault).tolist() == [0]
        array = np.zeros(buffer.shape, dtype)
        array[0, 2, 6, 4] = wrong
        device.upload(array, buffer)
        device.check_finite(buffer, fault)
        device.clear(buffer)
        device.check_finite(buffer, fault)
        assert device.download(fault).tolist() == [1]

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_pixels_are_those_of_the_host(self, device: CudaDevice, dtype: str) -> None:
        array = np.random.default_rng(0).normal(0, 0.8, (2, 3, 6, 5)).astype(dtype)
        image, pixels = device.zeros(array.shape, dtype), device.zeros((2, 6, 5, 3), "uint8")
        device.upload(array, image)
        device.image_to_uint8(image, pixels)
        expected = np.empty((2, 6, 5, 3), np.uint8)
        HostDevice().image_to_uint8(array, expected)
        np.testing.assert_array_equal(device.download(pixels), expected)

    # Graphs

    def test_a_graph_runs_only_when_it_is_called_and_reads_what_is_there_then(
        self, device: CudaDevice
    ) -> None:
        buffers = on_device(device, host_buffers("float16", guided=True))
        host = host_buffers("float16", guided=True)
        graph = device.capture(lambda: device.guided_step(buffers))
        assert_same(device, buffers, host)
        for _ in range(3):
            graph()
            HostDevice().guided_step(host)
        assert_same(device, buffers, host)

    def test_a_graph_keeps_the_buffers_of_its_work(self, device: CudaDevice) -> None:
        target = device.zeros((1 << 16,), "uint8")

        def recorded() -> Callable[[], None]:
            source = device.zeros((1 << 16,), "uint8")
            device.upload(np.full(1 << 16, 5, np.uint8), source)
            return device.capture(lambda: device.copy(source, target))

        graph = recorded()
        gc.collect()
        others = [device.zeros((1 << 16,), "uint8") for _ in range(4)]
        graph()
        assert (device.download(target) == 5).all()
        assert len(others) == 4

    def test_what_dies_during_a_capture_is_freed_afterwards(self, device: CudaDevice) -> None:
        held = [device.zeros((1 << 20,), "uint8") for _ in range(3)]
        counter = device.zeros((4,), "int32")

        def work() -> None:
            held.clear()
            gc.collect()
            device.clear(counter)

        graph = device.capture(work)
        device.upload(np.ones(4, np.int32), counter)
        graph()
        graph()
        assert device.download(counter).tolist() == [0, 0, 0, 0]

    def test_an_error_while_recording_leaves_the_device_usable(self, device: CudaDevice) -> None:
        buffer = device.zeros((4,), "int32")

        def failing() -> None:
            device.clear(buffer)
            raise KeyError("the work's own")

        with pytest.raises(KeyError, match="own"):
            device.capture(failing)
        device.upload(np.ones(4, np.int32), buffer)
        graph = device.capture(lambda: device.clear(buffer))
        assert device.download(buffer).tolist() == [1, 1, 1, 1]
        graph()
        assert device.download(buffer).tolist() == [0, 0, 0, 0]

    @pytest.mark.parametrize(
        "what", ["zeros", "upload", "download", "synchronize", "timer", "mark", "capture"]
    )
    def test_what_would_wait_or_allocate_cannot_be_recorded(self, device: CudaDevice, what: str) -> None:
        buffer, timer = device.zeros((4,), "float32"), device.timer()
        forbidden: dict[str, Callable[[], Any]] = {
            "zeros": lambda: device.zeros((1,), "float32"),
            "upload": lambda: device.upload(np.ones(4, np.float32), buffer),
            "download": lambda: device.download(buffer),
            "synchronize": device.synchronize,
            "timer": device.timer,
            "mark": lambda: timer.mark("step"),
            "capture": lambda: device.capture(lambda: None),
        }
        with pytest.raises(UsageError, match="record"):
            device.capture(forbidden[what])
        device.upload(np.ones(4, np.float32), buffer)
        assert device.download(buffer).tolist() == [1, 1, 1, 1]

    # Time

    def test_a_timer_adds_up_stages_of_one_name(self, device: CudaDevice) -> None:
        buffer = device.zeros((1 << 20,), "float32")
        timer = device.timer()
        timer.mark("nothing")
        for _ in range(3):
            device.clear(buffer)
            timer.mark("clear")
        seconds = timer.seconds()
        assert list(seconds) == ["nothing", "clear"]
        assert all(0 <= value < 5 for value in seconds.values())
        timer.mark("more")
        assert list(timer.seconds()) == ["nothing", "clear", "more"]

    # Life

    def test_a_closed_device_says_so_and_closing_it_again_is_no_error(self, device: CudaDevice) -> None:
        buffer = device.zeros((4,), "float32")
        graph = device.capture(lambda: device.clear(buffer))
        device.close()
        device.close()
        uses: list[Callable[[], Any]] = [
            lambda: device.zeros((1,), "float32"),
            lambda: device.download(buffer),
            lambda: device.upload(np.zeros(4), buffer),
            device.synchronize,
            device.make_current,
            graph,
        ]
        for use in uses:
            with pytest.raises(BackendError, match=r"cuda:0 was closed: load the pipeline again"):
                use()

    def test_another_thread_may_go_on_with_the_device(self, device: CudaDevice) -> None:
        buffer = device.zeros((4,), "float32")
        results: list[NDArray[Any]] = []

        def work() -> None:
            device.upload(np.ones(4), buffer)
            results.append(device.download(buffer))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert [result.tolist() for result in results] == [[1, 1, 1, 1]]

    def test_a_buffer_may_die_in_another_thread(self, device: CudaDevice) -> None:
        free, _ = device.memory_info()
        for _ in range(40):
            held = [device.zeros((SOME_BYTES,), "uint8")]
            thread = threading.Thread(target=held.clear)
            thread.start()
            thread.join()
            device.synchronize()
            assert free - device.memory_info()[0] < 16 * SOME_BYTES

    # Other libraries

    def test_a_callers_stream_is_used_and_left_alone(
        self, device: CudaDevice, open_device: OpenDevice
    ) -> None:
        with open_device(stream=device.stream) as second:
            assert second.stream == device.stream
            buffer = second.zeros((4,), "float32")
            second.upload(np.ones(4), buffer)
            graph = second.capture(lambda: second.clear(buffer))
            graph()
            assert second.download(buffer).tolist() == [0, 0, 0, 0]
        device.synchronize()

    @pytest.mark.parametrize("protocol", ["__cuda_array_interface__", "__dlpack__"])
    def test_an_array_of_another_stream_is_read_after_it_was_written(
        self, device: CudaDevice, open_device: OpenDevice, protocol: str
    ) -> None:
        with open_device() as producer:
            assert producer.stream != device.stream
            written = producer.zeros((1 << 22,), "float32")
            result = device.zeros(written.shape, "float32")
            source = np.arange(written.size, dtype=np.float32)
            producer.upload(source, written)
            taken = device.from_cuda_array(_OneProtocol(written, protocol))
            assert (taken.shape, taken.dtype) == (written.shape, written.dtype)
            assert taken.address == written.address
            device.copy(taken, result)
            np.testing.assert_array_equal(device.download(result), source)

    def test_what_another_library_gave_is_kept_as_long_as_it_is_used(
        self, device: CudaDevice, open_device: OpenDevice
    ) -> None:
        with open_device() as producer:
            written = producer.zeros((1 << 16,), "float32")
            producer.upload(np.full(written.shape, 3.0), written)
            producer.synchronize()
            taken = device.from_cuda_array(_OneProtocol(written, "__dlpack__"))
            del written
            gc.collect()
            others = [producer.zeros((1 << 16,), "float32") for _ in range(4)]
            producer.synchronize()
            assert (device.download(taken) == 3).all()
            assert len(others) == 4


class _OneProtocol:
    """A device array that shows only one of its two protocols."""

    def __init__(self, array: DeviceArray, protocol: str) -> None:
        if protocol == "__dlpack__":
            self.__dlpack__ = array.__dlpack__
            self.__dlpack_device__ = array.__dlpack_device__
        else:
            self.__cuda_array_interface__ = array.__cuda_array_interface__
            self._kept = array
