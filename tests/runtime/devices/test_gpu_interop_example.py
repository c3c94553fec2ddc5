"""The example for PyCUDA, with a stand-in for PyCUDA and the pipeline on a recording device."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.fakes.recording import RecordingDriver, as_numpy, recording_device

import sdrt.runtime
from sdrt.runtime.devices.gpu.device import CudaDevice

EXAMPLE = Path(__file__).parents[3] / "examples" / "pycuda_interop.py"
STREAM = 0x55AA1230


class _GPUArray:
    """What the example uses of ``pycuda.gpuarray.GPUArray``, in main memory."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], *, gpudata: int, base: object) -> None:
        self.shape, self.dtype, self.gpudata, self.base = shape, dtype, gpudata, base

    @classmethod
    def of(cls, array: NDArray[Any]) -> _GPUArray:
        return cls(array.shape, array.dtype, gpudata=array.ctypes.data, base=array)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "strides": np.empty(self.shape, self.dtype).strides,
            "data": (self.gpudata, False),
            "typestr": self.dtype.str,
            "stream": None,
            "version": 3,
        }

    def memory(self) -> NDArray[Any]:
        return as_numpy(SimpleNamespace(**vars(self), address=self.gpudata, nbytes=self.nbytes))  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def get(self) -> NDArray[Any]:
        return self.memory().copy()


class _Stream:
    handle = STREAM

    def __init__(self, driver: RecordingDriver) -> None:
        self._driver = driver

    def synchronize(self) -> None:
        self._driver.synchronize_stream(STREAM)


class _Pipeline:
    """A pipeline that makes pixels of its latents on the device, and nothing more."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device

    def __enter__(self) -> _Pipeline:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._device.close()

    def initial_latents(self, seed: int) -> NDArray[np.float32]:
        return np.full((1, 3, 2, 2), 0.5 + seed, np.float32)

    def __call__(self, prompt: str, *, latents: _GPUArray, output_type: str) -> Any:
        assert (prompt, output_type) == ("an apple", "device")
        device = self._device
        taken = device.from_cuda_array(latents)
        pixels = device.zeros((1, 2, 2, 3), "uint8")
        device.image_to_uint8(taken, pixels)
        return SimpleNamespace(images=pixels)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, RecordingDriver]:
    """The example's module, which finds the stand-ins, and the driver below them."""
    driver = RecordingDriver()
    streams: list[_Stream] = []

    def queued(work: Callable[[NDArray[Any]], None]) -> Callable[..., None]:
        def kernel(array: _GPUArray, *_arguments: object, stream: _Stream) -> None:
            driver.make_current()
            driver.enqueue(stream.handle, lambda: work(array.memory()), "foreign_kernels")

        return kernel

    kernels = {
        "soften": queued(lambda array: np.multiply(array, np.float32(0.95), out=array)),
        "invert": queued(lambda array: np.subtract(255, array, out=array)),
    }

    def to_gpu_async(array: NDArray[Any], *, stream: _Stream) -> _GPUArray:
        assert stream is streams[0]
        driver.register(array.ctypes.data, array.nbytes)
        return _GPUArray.of(array)

    def load(bundle: str, *, backend: str, stream: object) -> _Pipeline:
        assert bundle == "bundle"
        return _Pipeline(recording_device(driver, stream=stream))

    def new_stream() -> _Stream:
        streams.append(_Stream(driver))
        return streams[0]

    modules: dict[str, dict[str, Any]] = {
        "pycuda": {},
        "pycuda.autoprimaryctx": {},
        "pycuda.driver": {"Stream": new_stream},
        "pycuda.gpuarray": {"GPUArray": _GPUArray, "to_gpu_async": to_gpu_async},
        "pycuda.elementwise": {"ElementwiseKernel": lambda arguments, code, name: kernels[name]},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    monkeypatch.setattr(sdrt.runtime, "Pipeline", SimpleNamespace(load=load))
    return _module(), driver


def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pycuda_interop", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_is_imported_without_pycuda() -> None:
    assert "pycuda" not in sys.modules
    assert callable(_module().draw)
    assert "pycuda" not in sys.modules


def test_the_example_says_how_it_is_called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pycuda_interop.py"])
    assert _module().main() == 2
    assert "usage: pycuda_interop.py BUNDLE PROMPT PICTURE.png" in capsys.readouterr().err


def test_latents_go_in_and_pictures_come_out_on_the_device(
    example: tuple[ModuleType, RecordingDriver], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, driver = example
    target = tmp_path / "apple.png"
    monkeypatch.setattr(sys, "argv", ["pycuda_interop.py", "bundle", "an apple", str(target)])
    assert module.main() == 0
    softened = np.float32(0.5) * np.float32(0.95)
    inverted = 255 - round(255 * (float(softened) / 2 + 0.5))
    assert np.asarray(Image.open(target)).tolist() == [[[inverted] * 3] * 2] * 2
    copies = {name: driver.counts[name] for name in ("uploads", "downloads", "device_copies")}
    assert copies == {"uploads": 0, "downloads": 0, "device_copies": 0}
    assert driver.counts["foreign_kernels"] == 2
