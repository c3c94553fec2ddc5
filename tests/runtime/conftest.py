"""A folder to work in, and engines for the tests that need a GPU: built once for each backend."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.errors import BackendError

GPU_BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session", params=GPU_BACKENDS)
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """A backend whose library is installed; one that is not is skipped with the reason."""
    from sdrt.runtime.backends.onnxruntime_cuda.library import import_with_cuda
    from sdrt.runtime.backends.trt.library import import_tensorrt

    name: str = request.param
    try:
        if name == "onnxruntime-cuda":
            import_with_cuda()
        else:
            import_tensorrt(name)
    except BackendError as error:
        pytest.skip(str(error))
    return name


@pytest.fixture(scope="session")
def engine_bundle(gpu_backend: str, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with engines of that backend for this GPU. Read only."""
    from sdrt.export.cli.main import main
    from sdrt.runtime.devices.gpu.discovery import find_gpu

    folder = tmp_path_factory.mktemp("engines") / "bundle"
    shutil.copytree(tiny_bundle, folder)
    options = ["--batch", "1..2", "--height", "16..32", "--width", "16..32", "--quiet"]
    if gpu_backend == "tensorrt-rtx":
        options += ["--compute-capability", "current"]
    status = main([str(folder), "--engine", gpu_backend, *options])
    gpu = find_gpu()
    if status and gpu_backend == "tensorrt-rtx" and gpu.capability[0] == 9:
        pytest.skip(f"TensorRT for RTX builds no engine for {gpu}; its error stands above")
    assert status == 0
    return Bundle.open(folder, verify=False)
