"""The driver layer on the real cuda-bindings: every call on a fake libcuda, and what there may be none of."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fakes import fake_cuda

from sdrt.runtime.devices.gpu.bindings import CudaDriver, load_bindings
from sdrt.runtime.devices.gpu.device import CudaDevice
from sdrt.runtime.errors import BackendError, UsageError

GPU_TESTS = Path(__file__).with_name("test_gpu_device_gpu.py")
BINDINGS = "cuda.bindings.driver"

HELD_AT_EXIT = """
from sdrt.runtime.devices.gpu.device import CudaDevice
import numpy
device = CudaDevice()
buffer = device.zeros((4,), "float32")
device.upload(numpy.ones(4), buffer)
graph = device.capture(lambda: device.clear(buffer))
capsule = buffer.__dlpack__()
cycle = [device, buffer]
cycle.append(cycle)
print(device.download(buffer).sum())
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_cuda.build(tmp_path_factory.mktemp("libcuda"))


def _run(library: Path, *arguments: str, **settings: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=fake_cuda.environment(library, **settings),
        cwd=GPU_TESTS.parents[3],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    "settings",
    [{}, {"pools": 0, "capability": 87}],
    ids=["memory pools", "no memory pools, an untested GPU"],
)
def test_the_tests_for_a_gpu_pass_on_a_fake_libcuda(library: Path, settings: dict[str, int]) -> None:
    options = ["-q", "-p", "support.fakes.fake_cuda", "-p", "no:cacheprovider", "-m", "gpu"]
    result = _run(library, "-m", "pytest", *options, f"{GPU_TESTS}::TestOnDriver", **settings)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = re.search(r"(\d+) passed in", result.stdout)
    assert summary, result.stdout
    assert int(summary[1]) > 60


def test_a_process_may_end_with_everything_open(library: Path) -> None:
    result = _run(library, "-c", HELD_AT_EXIT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "4.0\n", "")


# What may be missing


@pytest.mark.parametrize(
    ("settings", "ordinal", "error", "message"),
    [
        (
            {"devices": 0},
            None,
            BackendError,
            r"cuInit failed: .*\(CUDA_ERROR_NO_DEVICE\); no NVIDIA GPU is vis",
        ),
        (
            {"version": 12040},
            None,
            BackendError,
            r"the NVIDIA driver supports CUDA 12\.4, but .* need CUDA 13\.0 or newer: update the driver, or"
            r".*cuda-compat-13-",
        ),
        ({"devices": 1}, 1, UsageError, "CUDA device 1 was asked for, but the visible ones are 0 alone"),
        ({"devices": 4}, 4, UsageError, "CUDA device 4 was asked for, but the visible ones are 0 to 3"),
        ({"devices": 4}, -1, UsageError, "CUDA device -1 was asked for, but the visible ones are 0 to 3"),
    ],
)
def test_a_gpu_that_cannot_be_had_says_why(
    library: Path, settings: dict[str, int], ordinal: int | None, error: type[Exception], message: str
) -> None:
    program = f"""
from sdrt.runtime.devices.gpu.device import CudaDevice
from sdrt.runtime.errors import SdrtError
try:
    CudaDevice({ordinal})
except SdrtError as error:
    print(type(error).__mro__[:2], error)
"""
    result = _run(library, "-c", program, **settings)
    assert result.returncode == 0, result.stderr
    assert error.__name__ in result.stdout
    assert re.search(message, result.stdout), result.stdout


def _raising(error: Exception) -> Callable[..., Any]:
    def function(*_arguments: object) -> Any:
        raise error

    return function


def test_without_bindings_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, BINDINGS, None)
    with pytest.raises(
        BackendError, match=r"pip install 'sdrt\[rtx\]', 'sdrt\[tensorrt\]' or 'sdrt\[cuda\]'"
    ):
        CudaDevice()


def test_without_a_driver_the_message_says_how_a_container_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = RuntimeError('Failure finding "libcuda.so.1"')
    monkeypatch.setattr(f"{BINDINGS}.cuDriverGetVersion", _raising(missing))
    with pytest.raises(BackendError, match=r"no NVIDIA driver can be loaded .*libcuda.*--gpus all") as caught:
        CudaDevice()
    assert caught.value.exit_status == 7


def test_bindings_of_cuda_12_are_content_with_a_driver_of_cuda_12(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import driver

    success = driver.CUresult.CUDA_SUCCESS
    monkeypatch.setattr(driver, "CUDA_VERSION", 12090)
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (success, 12020))
    monkeypatch.setattr(driver, "cuInit", lambda flags: (success,))
    assert load_bindings() is driver


def test_an_unknown_error_of_the_driver_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import driver

    results = driver.CUresult
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (results.CUDA_SUCCESS, driver.CUDA_VERSION))
    monkeypatch.setattr(driver, "cuInit", lambda flags: (results.CUDA_ERROR_SYSTEM_NOT_READY,))
    monkeypatch.setattr(driver, "cuGetErrorString", lambda error: (results.CUDA_SUCCESS, b"not ready"))
    with pytest.raises(BackendError, match=r"cuInit failed: not ready \(CUDA_ERROR_SYSTEM_NOT_READY\)$"):
        CudaDriver()
