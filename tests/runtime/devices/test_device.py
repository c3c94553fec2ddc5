"""The device protocol and the host's."""

from __future__ import annotations

import numpy as np
import pytest

from sdrt.kernels.philox import philox_normal
from sdrt.kernels.philox_normal import NO_DRAW
from sdrt.runtime.devices.device import Device
from sdrt.runtime.devices.gpu.device import CudaDevice
from sdrt.runtime.devices.host import HostDevice
from sdrt.runtime.errors import UsageError


def test_the_devices_keep_the_protocol() -> None:
    devices: list[type[Device]] = [HostDevice, CudaDevice]  # mypy compares the signatures
    for device in devices:
        missing = {name for name in vars(Device) if not name.startswith("_")} - set(dir(device))
        assert not missing


def test_the_host_converts_as_same_kind() -> None:
    device = HostDevice()
    buffer = device.zeros((2, 2), "float16")
    device.upload(np.arange(4.0).reshape(2, 2), buffer)
    assert buffer.dtype == np.float16
    assert buffer.tolist() == [[0, 1], [2, 3]]
    with pytest.raises(TypeError, match="same_kind"):
        device.upload(np.zeros((2, 2)), device.zeros((2, 2), "int32"))


def test_a_download_is_a_copy() -> None:
    device = HostDevice()
    buffer = device.zeros((3,), "float32")
    result = device.download(buffer)
    device.upload(np.ones(3), buffer)
    assert result.tolist() == [0, 0, 0]


def test_copy_and_clear() -> None:
    device = HostDevice()
    source, target = device.zeros((3,), "float32"), device.zeros((3,), "float32")
    device.upload(np.arange(3.0), source)
    device.copy(source, target)
    device.clear(source)
    assert (source.tolist(), target.tolist()) == ([0, 0, 0], [0, 1, 2])


def test_a_view_is_the_same_memory() -> None:
    device = HostDevice()
    whole = device.zeros((4, 16), "uint8")
    part = device.view(whole, 24, (2, 3), "float32")
    device.upload(np.arange(6.0).reshape(2, 3), part)
    assert whole.reshape(-1)[24:48].view(np.float32).tolist() == [0, 1, 2, 3, 4, 5]
    device.clear(whole)
    assert not part.any()


@pytest.mark.parametrize(
    ("offset", "shape", "dtype", "message"),
    [
        (2, (1,), "float32", "offset is 2: a multiple of 4, the bytes of a float32"),
        (-4, (1,), "float32", "offset is -4"),
        (0, (17,), "float32", "a view of 68 bytes at 0 leaves its buffer of 64 bytes"),
        (64, (1,), "uint8", "a view of 1 bytes at 64 leaves its buffer of 64 bytes"),
    ],
)
def test_a_view_outside_its_buffer_is_refused(
    offset: int, shape: tuple[int, ...], dtype: str, message: str
) -> None:
    device = HostDevice()
    with pytest.raises(UsageError, match=message):
        device.view(device.zeros((64,), "uint8"), offset, shape, dtype)


def test_a_view_of_numbers_is_refused() -> None:
    device = HostDevice()
    with pytest.raises(UsageError, match="a view of a float32 buffer was asked for: only uint8"):
        device.view(device.zeros((16,), "float32"), 0, (4,), "float32")


def test_noise_is_the_rows_draw_of_each_seed() -> None:
    device = HostDevice()
    noise, seeds = device.zeros((2, 3, 4), "float32"), np.array([5, 2**63 + 1], np.uint64)
    draws = np.array([0, NO_DRAW, 7], np.int32)
    device.philox_normal(noise, seeds, np.array([2], np.int32), draws)
    for none in (1, 3):  # a row without noise, and after the last
        device.philox_normal(noise, seeds, np.array([none], np.int32), draws)
    for image, seed in zip(noise, seeds, strict=True):
        np.testing.assert_array_equal(image, philox_normal((3, 4), int(seed), offset=7))
    device.philox_normal(noise, seeds)
    np.testing.assert_array_equal(noise[0], philox_normal((3, 4), 5))


def test_a_fault_stays() -> None:
    device = HostDevice()
    buffer, fault = device.zeros((2, 2), "float32"), device.zeros((1,), "int32")
    device.check_finite(buffer, fault)
    assert fault.tolist() == [0]
    buffer[1, 0] = np.inf
    device.check_finite(buffer, fault)
    buffer[1, 0] = 0
    device.check_finite(buffer, fault)
    assert fault.tolist() == [1]


def test_pixels_go_into_a_buffer() -> None:
    device = HostDevice()
    image, pixels = device.zeros((1, 3, 2, 2), "float16"), device.zeros((1, 2, 2, 3), "uint8")
    image[0, 1] = 1
    image[0, 2] = -1
    device.image_to_uint8(image, pixels)
    assert pixels[0, 1, 1].tolist() == [128, 255, 0]


def test_work_of_the_host_is_its_own_graph() -> None:
    def work() -> None:
        calls.append(1)

    calls: list[int] = []
    device = HostDevice()
    graph = device.capture(work)
    assert calls == []
    graph()
    device.synchronize()
    assert calls == [1]


def test_the_hosts_timer_adds_up_stages_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("sdrt.runtime.devices.host.time.perf_counter", lambda: next(clock))
    timer = HostDevice().timer()
    timer.mark("step")
    timer.mark("decode")
    timer.mark("step")
    assert timer.seconds() == {"step": 1.0 + 4.0, "decode": 2.0}


def test_a_host_device_can_be_closed_again() -> None:
    device = HostDevice()
    device.close()
    device.close()
