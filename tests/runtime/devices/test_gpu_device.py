"""The `cuda` device on the recording driver: what it does, and how often it asks the driver for what."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from support.fakes.recording import RecordingDriver, recording_device
from support.runs.device_behaviour import DeviceBehaviour, OpenDevice

from sdrt.kernels.compile import KernelError
from sdrt.runtime.devices.gpu.arrays import DeviceArray
from sdrt.runtime.devices.gpu.device import CudaDevice
from sdrt.runtime.devices.gpu.driver import CudaError, OutOfMemoryError
from sdrt.runtime.devices.gpu.kernel_modules import architecture
from sdrt.runtime.devices.gpu.staging import RING_BYTES
from sdrt.runtime.errors import BackendError, DeviceMemoryError


@pytest.fixture
def driver() -> Iterator[RecordingDriver]:
    """A driver that must have got everything back in the end, and never in the wrong moment."""
    driver = RecordingDriver()
    yield driver
    gc.collect()
    driver.run_all()
    assert driver.faults == []
    assert driver.live == {}
    assert driver.opened == 0


@pytest.fixture
def open_device(driver: RecordingDriver) -> OpenDevice:
    def open_device(*, stream: object = None) -> CudaDevice:
        return recording_device(driver, stream=stream)

    return open_device


class TestOnRecordingDriver(DeviceBehaviour):
    """On host memory."""


@pytest.fixture
def device(open_device: OpenDevice) -> Iterator[CudaDevice]:
    with open_device() as device:
        yield device


def _since(driver: RecordingDriver, before: Counter[str]) -> dict[str, int]:
    return dict(driver.counts - before)


def test_uploads_wait_only_for_room_in_the_staging_memory(
    device: CudaDevice, driver: RecordingDriver
) -> None:
    array = np.zeros(1 << 16, np.uint8)
    buffer = device.zeros(array.shape, "uint8")
    before = driver.counts.copy()
    fitting = RING_BYTES // array.nbytes
    for _ in range(fitting):
        device.upload(array, buffer)
    assert _since(driver, before) == {"pinned_allocations": 1, "uploads": fitting, "event_records": fitting}
    device.upload(array, buffer)
    assert _since(driver, before)["waits"] == 1


def test_staging_memory_is_used_again_once_its_copies_have_run(
    device: CudaDevice, driver: RecordingDriver
) -> None:
    array = np.zeros(RING_BYTES // 8, np.uint8)
    buffer = device.zeros(array.shape, "uint8")
    for _ in range(100):
        device.upload(array, buffer)
        driver.run_all()
    assert driver.counts["waits"] == 0
    assert driver.live["events"] <= 3


def test_a_download_waits_once_and_keeps_its_staging_memory(
    device: CudaDevice, driver: RecordingDriver
) -> None:
    large, small = device.zeros((1 << 20,), "float32"), device.zeros((10,), "float32")
    before = driver.counts.copy()
    device.download(large)
    assert _since(driver, before) == {"pinned_allocations": 1, "downloads": 1, "waits": 1}
    before = driver.counts.copy()
    device.download(small)
    device.download(large)
    assert _since(driver, before) == {"downloads": 2, "waits": 2}


def test_a_graph_is_one_launch_and_nothing_else(device: CudaDevice, driver: RecordingDriver) -> None:
    source, target = device.zeros((8,), "float32"), device.zeros((8,), "float32")
    fault = device.zeros((1,), "int32")

    def work() -> None:
        device.copy(source, target)
        device.check_finite(target, fault)

    before = driver.counts.copy()
    graph = device.capture(work)
    assert _since(driver, before) == {
        "captures": 1,
        "modules_loaded": 1,  # allowed while recording
        "recorded_device_copies": 1,
        "recorded_kernel_launches": 1,
    }
    before = driver.counts.copy()
    for _ in range(50):
        graph()
    assert _since(driver, before) == {"graph_launches": 50}


def test_a_kernel_is_loaded_once(device: CudaDevice, driver: RecordingDriver) -> None:
    fault = device.zeros((1,), "int32")
    for dtype in ("float16", "float32"):
        buffer = device.zeros((8,), dtype)
        for _ in range(3):
            device.check_finite(buffer, fault)
    assert driver.counts["modules_loaded"] == 1
    assert driver.counts["kernel_launches"] == 6


def test_allocating_and_freeing_leaves_nothing(device: CudaDevice, driver: RecordingDriver) -> None:
    device.download(device.zeros((100,), "float32"))  # makes the staging memory
    gc.collect()
    driver.run_all()
    live, used = driver.live, driver.used
    for index in range(200):
        shape = (index + 1, 1000)
        buffer, view = device.zeros(shape, "float32"), device.scratch(1000)
        device.upload(np.zeros(shape), buffer)
        graph = device.capture(lambda buffer=buffer: device.clear(buffer))  # type: ignore[misc]
        graph()
        timer = device.timer()
        timer.mark("all")
        del buffer, graph, timer
        driver.run_all()
    assert driver.live == {**live, "allocations": 1, "pinned": 2, "events": driver.live["events"]}
    assert driver.live["events"] <= 3  # the ring's
    assert driver.used == used + view.nbytes


def test_memory_whose_release_is_queued_is_waited_for() -> None:
    driver = RecordingDriver(memory=10 << 20)
    with recording_device(driver) as device:
        for _ in range(3):
            buffer = device.zeros((6 << 20,), "uint8")
            del buffer
            gc.collect()
        assert driver.counts["waits"] == 2


def test_a_failed_allocation_says_how_much_was_wanted(
    open_device: OpenDevice, driver: RecordingDriver
) -> None:
    with open_device() as device:
        held = device.zeros((24 << 20,), "uint8")
        with pytest.raises(DeviceMemoryError) as caught:
            device.zeros((300, 1 << 20), "float32")
        assert str(caught.value) == (
            "cuda:0 (Recording GPU) has too little memory: 1,200 MiB more are needed, 1,000 MiB of 1,024 MiB "
            "are free; draw fewer or smaller pictures at once, or end other programs on the GPU"
        )
        assert caught.value.exit_status == 7
        assert held.nbytes == 24 << 20


def test_a_graph_without_room_is_an_error_and_the_device_goes_on(
    device: CudaDevice, driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = device.zeros((4,), "float32")
    end_capture = driver.end_capture

    def no_room(stream: int) -> int:
        driver.destroy_graph(end_capture(stream))
        raise OutOfMemoryError("cuGraphInstantiate", "CUDA_ERROR_OUT_OF_MEMORY", "out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "end_capture", no_room)
        with pytest.raises(
            DeviceMemoryError, match=r"a graph was recorded.* 1,024 MiB of 1,024 MiB are free"
        ):
            device.capture(lambda: device.clear(buffer))
    device.upload(np.ones(4), buffer)
    device.capture(lambda: device.clear(buffer))()
    assert not device.download(buffer).any()


def test_a_kernel_that_cannot_be_compiled_is_named_and_the_rest_works(driver: RecordingDriver) -> None:
    def compiler(module: str, architecture: str) -> bytes:
        if module == "check_finite":
            raise KernelError(f"NVRTC cannot compile {module}.cu for {architecture}:\nline 3: a semicolon")
        return b"code"

    driver.opened += 1
    with CudaDevice(driver=driver, compiler=compiler) as device:
        fault, noise = device.zeros((1,), "int32"), device.zeros((1, 4), "float32")
        with pytest.raises(BackendError, match=r"check_finite.*Recording GPU.*sm_90:\nline 3: a semicolon"):
            device.check_finite(noise, fault)
        with pytest.raises(BackendError, match="check_finite"):
            device.capture(lambda: device.check_finite(noise, fault))
        device.philox_normal(noise, device.zeros((1,), "uint64"))
        assert device.download(noise).all()


def test_the_real_compiler_refuses_a_gpu_that_it_does_not_know() -> None:
    driver = RecordingDriver(compute_capability=(3, 5))
    driver.opened += 1
    with CudaDevice(driver=driver) as device:
        fault = device.zeros((1,), "int32")
        with pytest.raises(BackendError, match=r"check_finite.*compiles nothing for sm_35"):
            device.check_finite(device.zeros((4,), "float32"), fault)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), "sm_75"),
        ((8, 0), "sm_80"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 1), "sm_120"),
        ((7, 0), "sm_70"),
        ((13, 0), "sm_130"),
    ],
)
def test_a_gpu_gets_the_newest_code_that_it_runs(capability: tuple[int, int], expected: str) -> None:
    assert architecture(capability) == expected


def test_a_forgotten_device_gives_everything_back(driver: RecordingDriver) -> None:
    device = recording_device(driver)
    buffer = device.zeros((4,), "float32")
    device.upload(np.ones(4), buffer)
    device.download(buffer)
    cycle: list[object] = [device, buffer]
    cycle.append(cycle)
    del device, buffer, cycle  # the fixture looks


def test_what_outlives_its_device_stays_usable(open_device: OpenDevice, driver: RecordingDriver) -> None:
    with open_device() as device:
        buffer = device.zeros((4,), "float32")
        device.upload(np.ones(4), buffer)
    assert np.from_dlpack(buffer).tolist() == [1, 1, 1, 1]
    assert driver.opened == 1
    del buffer
    assert driver.opened == 0


def test_work_that_the_driver_refuses_to_record_is_an_error_of_the_backend(
    device: CudaDevice, driver: RecordingDriver
) -> None:
    def wait_behind_the_devices_back() -> None:
        with pytest.raises(CudaError):
            driver.synchronize_stream(device.stream)

    with pytest.raises(BackendError, match="cannot be captured"):
        device.capture(wait_behind_the_devices_back)
    device.synchronize()


def test_the_collector_waits_until_a_capture_has_ended(device: CudaDevice) -> None:
    """It might give back what another library has, which a capture does not survive."""
    seen: list[bool] = []
    device.capture(lambda: seen.append(gc.isenabled()))
    assert (seen, gc.isenabled()) == ([False], True)
    with pytest.raises(ZeroDivisionError):
        device.capture(lambda: seen.append(1 // 0 == 0))
    assert gc.isenabled()


def test_what_dies_as_a_capture_begins_is_freed_after_it(
    device: CudaDevice, driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [device.zeros((4,), "float32")]
    begin = driver.begin_capture

    def begin_and_forget(stream: int) -> None:
        begin(stream)
        held.clear()  # as the collector might, or another thread

    monkeypatch.setattr(driver, "begin_capture", begin_and_forget)
    device.capture(lambda: None)
    device.synchronize()
    assert driver.used == 0  # and the fixture looks for frees inside of captures


def test_a_capture_that_cannot_begin_leaves_the_device_usable(
    device: CudaDevice, driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(stream: int) -> None:
        raise CudaError("cuStreamBeginCapture", "CUDA_ERROR_ILLEGAL_STATE", f"stream {stream} is busy")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "begin_capture", refuse)
        with pytest.raises(CudaError, match="is busy"):
            device.capture(lambda: None)
    assert device.download(device.zeros((2,), "int32")).tolist() == [0, 0]


def test_memory_that_was_freed_is_not_read_in_silence(device: CudaDevice) -> None:
    buffer, target = device.zeros((4,), "float32"), device.zeros((4,), "float32")
    view = DeviceArray(device._stream, None, buffer.address, (4,), "float32")  # type: ignore[arg-type]
    del buffer
    gc.collect()
    device.copy(view, target)
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        device.synchronize()
