"""Which backend is taken, why, and what is said where one cannot run."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.checkpoints.engine_bundles import add_engine, engine_key
from support.fakes.fake_onnxruntime_cuda import fake_onnxruntime
from support.fakes.fake_tensorrt import fake_plan, fake_tensorrt
from support.fakes.recording import RecordingDriver, recording_device

from sdrt.runtime.backends import cpu_backends
from sdrt.runtime.backends.backend import BACKENDS, RequestShape
from sdrt.runtime.backends.registry import AUTO, Choice, choose_backend, load_executor, open_device
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.families.record import Precision
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.devices.gpu import discovery
from sdrt.runtime.devices.gpu.discovery import Gpu, find_gpu
from sdrt.runtime.devices.host import HostDevice
from sdrt.runtime.errors import BackendError, UsageError
from sdrt.runtime.pipeline import Pipeline

ADA = Gpu(0, "NVIDIA RTX 4090", (8, 9))
SIZES = {
    "text_encoder": {"batch": (1, 1, 4)},
    "unet": {"rows": (1, 2, 4), "latent_height": (8, 8, 16), "latent_width": (8, 8, 16)},
    "vae_decoder": {"batch": (1, 1, 2), "latent_height": (8, 8, 16), "latent_width": (8, 8, 16)},
}
HAS_GPU = Path("/dev/nvidiactl").exists()
without_gpu = pytest.mark.skipif(HAS_GPU, reason="what is tested is the lack of a GPU")


@pytest.fixture
def bundle(tmp_path: Path, tiny_bundle: Path) -> Bundle:
    return in_precision(tmp_path, Bundle.open(tiny_bundle, verify=False).manifest, "fp16")


def in_precision(tmp_path: Path, manifest: Manifest, precision: Precision) -> Bundle:
    (tmp_path / "bundle").mkdir(exist_ok=True)
    parts = {name: replace(part, precision=precision) for name, part in manifest.components.items()}
    return Bundle(tmp_path / "bundle", replace(manifest, components=parts))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> RecordingDriver:
    """A GPU with every library; the bundle has no engines yet."""
    driver = RecordingDriver(compute_capability=(8, 9))
    monkeypatch.setattr(discovery, "find_gpu", lambda index: ADA)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(driver, rtx=False))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", fake_tensorrt(driver))
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake_onnxruntime(driver))
    return driver


def add_engines(bundle: Bundle, flavour: str, *, leave_out: str = "", **changes: Any) -> None:
    for component, sizes in SIZES.items():
        if component != leave_out:
            key = engine_key(bundle, component, sizes, flavour=flavour, **changes)
            add_engine(bundle, key, fake_plan(bundle.component(component).spec))


def refused(bundle: Bundle, name: str = AUTO, **options: Any) -> str:
    with pytest.raises(BackendError) as caught:
        choose_backend(bundle, name, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_order() -> None:
    of_gpus, of_cpus = ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda"], ["onnxruntime-cpu", "openvino-cpu"]
    assert list(BACKENDS) == [*of_gpus, *of_cpus]
    assert AUTO == "auto"
    assert AUTO not in BACKENDS


@without_gpu
def test_auto_without_a_gpu(bundle: Bundle) -> None:
    choice = choose_backend(bundle)
    assert (choice.name, choice.gpu) == ("onnxruntime-cpu", None)
    against, in_favour = choice.reasons
    assert against.startswith("tensorrt, tensorrt-rtx, onnxruntime-cuda: no NVIDIA driver: libcuda.so.1")
    assert in_favour == "onnxruntime-cpu: onnxruntime is installed"


@without_gpu
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda"])
def test_named_backend_without_a_gpu(bundle: Bundle, name: str) -> None:
    message = refused(bundle, name)
    assert message.startswith(f"the backend {name} cannot run here: no NVIDIA driver: libcuda.so.1")
    assert "docker run --gpus all" in message


@without_gpu
def test_probing_without_a_gpu_is_fast_and_imports_nothing(bundle: Bundle, tiny_bundle: Path) -> None:
    code = f"""
    import json, sys, time
    from sdrt.runtime.backends.registry import choose_backend
    from sdrt.runtime.bundle.bundle import Bundle
    bundle = Bundle.open({str(tiny_bundle)!r}, verify=False)
    before = set(sys.modules)
    started = time.perf_counter()
    choose_backend(bundle)
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    seconds, loaded = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    # No engine library, and of ours only the records: no executor, and no backend after the one that fits.
    assert not {"numpy", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx_bindings"} & set(loaded)
    assert not [
        name for name in loaded if name.endswith((".executor", ".engine_search")) or "openvino" in name
    ]
    assert seconds < 0.1  # 8 ms, most of it imports, when nothing else runs


def test_unknown_backend(bundle: Bundle) -> None:
    with pytest.raises(
        UsageError, match="unknown backend 'cuda'; there is auto, tensorrt, tensorrt-rtx, onnx"
    ):
        choose_backend(bundle, "cuda")
    with pytest.raises(UsageError, match="unknown backend 'auto'; there is tensorrt"):
        load_executor(bundle, "unet", backend="auto", device=HostDevice())


@pytest.mark.parametrize(
    ("flavours", "taken"),
    [
        (("tensorrt", "tensorrt-rtx"), "tensorrt"),
        (("tensorrt-rtx",), "tensorrt-rtx"),
        ((), "onnxruntime-cuda"),
    ],
)
def test_auto_takes_the_first_that_fits(
    bundle: Bundle, gpu: RecordingDriver, flavours: tuple[str, ...], taken: str
) -> None:
    for flavour in flavours:
        add_engines(bundle, flavour)
    choice = choose_backend(bundle)
    assert (choice.name, choice.gpu) == (taken, ADA)
    assert [reason.partition(":")[0] for reason in choice.reasons] == [
        name for name in BACKENDS if list(BACKENDS).index(name) <= list(BACKENDS).index(taken)
    ]
    for reason in choice.reasons[:-1]:
        assert "build one: sd-export" in reason
    assert "NVIDIA RTX 4090 (compute capability 8.9)" in choice.reasons[-1]


def test_plain_graphs_in_fp32_do_not_run_on_cuda(
    bundle: Bundle, gpu: RecordingDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their group norms are written out as the CPU wants them; `auto` goes on to the CPU."""
    wide = in_precision(tmp_path, bundle.manifest, "fp32")
    message = refused(wide, "onnxruntime-cuda")
    assert "the unet's plain graph, since the bundle has no onnxruntime-cuda engine of its unet" in message
    assert (
        f"build one: sd-export {wide.path} --engine onnxruntime-cuda; in fp32 that has operators" in message
    )
    monkeypatch.setattr(cpu_backends, "find_spec", lambda name: object())
    choice = choose_backend(wide)
    assert (choice.name, choice.gpu) == ("onnxruntime-cpu", None)
    assert "in fp32 that has operators" in choice.reasons[2]
    add_engines(wide, "onnxruntime-cuda", flavour_version="1.32.0", targets=())
    assert choose_backend(wide).name == "onnxruntime-cuda"


def test_one_missing_engine_is_enough(bundle: Bundle, gpu: RecordingDriver) -> None:
    add_engines(bundle, "tensorrt", leave_out="vae_decoder")
    message = refused(bundle, "tensorrt")
    assert message.startswith(
        "the backend tensorrt cannot run here: the bundle has no tensorrt engine of its vae_decoder; "
    )


def test_engines_must_admit_what_will_be_asked(bundle: Bundle, gpu: RecordingDriver) -> None:
    add_engines(bundle, "tensorrt")
    choose_backend(bundle, "tensorrt", RequestShape(2, 32, 32))
    message = refused(bundle, "tensorrt", request_shape=RequestShape(1, 64, 32))
    assert "it admits rows 1..4 (two per image under guidance), height 16..32, width 16..32" in message
    assert "asked for is rows 2 (two per image under guidance), height 64, width 32" in message
    assert message.endswith(f"sd-export {bundle.path} --engine tensorrt --batch 1 --height 64 --width 32")
    assert "asked for is rows 6" in refused(bundle, "tensorrt", request_shape=RequestShape(3, 32, 32))
    assert "asked for is batch 4" in refused(
        bundle, "tensorrt", request_shape=RequestShape(4, 32, 32, guided=False)
    )
    # `auto` goes on to one that draws it, and says why.
    choice = choose_backend(bundle, AUTO, RequestShape(1, 64, 32))
    assert choice.name == "onnxruntime-cuda"
    assert "height 64" in choice.reasons[0]


def test_what_the_library_says_of_this_gpu_counts(bundle: Bundle, gpu: RecordingDriver) -> None:
    """An engine for 8.0 and newer need not run on every newer GPU."""
    add_engines(bundle, "tensorrt-rtx")
    assert choose_backend(bundle).name == "tensorrt-rtx"
    library: Any = sys.modules["tensorrt_rtx_bindings"]
    library.diagnosis = 2
    message = refused(bundle, "tensorrt-rtx")
    assert f"does not run on {ADA}: UNSUPPORTED_CC; its targets are" in message
    choice = choose_backend(bundle)
    assert choice.name == "onnxruntime-cuda"
    assert "UNSUPPORTED_CC" in choice.reasons[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"flavour_version": "1.6.0"}, "it is for tensorrt-rtx 1.6.0, 1.7.1.116 is installed"),
        ({"targets": ("8.6",)}, "it runs on compute capability 8.6, this GPU has 8.9"),
        ({"component_sha256": "0" * 64}, "it was built from another text_encoder"),
    ],
)
def test_engines_for_something_else(
    bundle: Bundle, gpu: RecordingDriver, changes: dict[str, Any], words: str
) -> None:
    add_engines(bundle, "tensorrt-rtx", **changes)
    assert words in refused(bundle, "tensorrt-rtx")


@pytest.mark.parametrize(
    ("module", "name", "hint"),
    [
        ("tensorrt", "tensorrt", "pip install 'sdrt[tensorrt]'"),
        ("tensorrt_rtx_bindings", "tensorrt-rtx", "pip install 'sdrt[rtx]'"),
        ("onnxruntime", "onnxruntime-cuda", "pip install 'sdrt[cuda]'"),
    ],
)
def test_library_is_missing(
    bundle: Bundle,
    gpu: RecordingDriver,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    name: str,
    hint: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert hint in refused(bundle, name)


def test_onnxruntime_for_the_cpu_on_a_gpu(
    bundle: Bundle, gpu: RecordingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.modules["onnxruntime"].providers = ["CPUExecutionProvider"]  # type: ignore[attr-defined]
    assert "pip uninstall onnxruntime" in refused(bundle, "onnxruntime-cuda")
    monkeypatch.setattr(cpu_backends, "find_spec", lambda name: object())
    choice = choose_backend(bundle)
    assert choice.name == "onnxruntime-cpu"
    assert choice.gpu is None
    assert len(choice.reasons) == 4


def test_cuda_says_which_graphs_it_runs(bundle: Bundle, gpu: RecordingDriver) -> None:
    key = engine_key(
        bundle, "unet", SIZES["unet"], flavour="onnxruntime-cuda", flavour_version="1.32.0", targets=()
    )
    folder = add_engine(bundle, key, b"a graph", "model.onnx")
    (reason,) = choose_backend(bundle, "onnxruntime-cuda").reasons
    assert f"the unet's graph rewritten for CUDA (engines/{folder.name})" in reason
    assert "the vae_decoder's plain graph, since the bundle has no onnxruntime-cuda engine" in reason


def test_nothing_can_run(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu(index: int) -> Gpu:
        raise BackendError("no NVIDIA GPU is visible")

    monkeypatch.setattr(discovery, "find_gpu", no_gpu)
    monkeypatch.setattr(cpu_backends, "find_spec", lambda name: None)
    assert refused(bundle) == (
        "no backend can run this bundle here: tensorrt, tensorrt-rtx, onnxruntime-cuda: no NVIDIA GPU is "
        "visible | onnxruntime-cpu: the package onnxruntime is not installed: pip install 'sdrt[cpu]' | "
        "openvino-cpu: the package openvino is not installed: pip install 'sdrt[openvino]'"
    )
    assert refused(bundle, "onnxruntime-cpu").startswith(
        "the backend onnxruntime-cpu cannot run here: the pack"
    )


@without_gpu
def test_auto_without_onnxruntime(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backends, "find_spec", lambda name: None if name == "onnxruntime" else name)
    choice = choose_backend(bundle)
    assert choice.name == "openvino-cpu"
    assert choice.reasons[-1] == "openvino-cpu: openvino is installed"


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "openvino-cpu"])
def test_bfloat16_on_the_cpu(bundle_copy: Path, backend: str) -> None:
    file = bundle_copy / "manifest.json"
    document = json.loads(file.read_text())
    part = document["components"]["vae_decoder"]
    part["precision"] = "bf16"
    for entry in part["inputs"] + part["outputs"]:
        entry["dtype"] = "bfloat16"
    file.write_text(json.dumps(document))
    bundle = Bundle.open(bundle_copy, verify=False)
    assert "no bfloat16 arithmetic on the CPU; export with --dtype fp32" in refused(bundle, backend)
    with pytest.raises(BackendError, match="no bfloat16"):
        load_executor(bundle, "vae_decoder", backend=backend, device=HostDevice())
    load_executor(bundle, "unet", backend=backend, device=HostDevice())


def test_executors_of_each_backend(bundle: Bundle, gpu: RecordingDriver, tiny_bundle: Path) -> None:
    for flavour in ("tensorrt", "tensorrt-rtx"):
        add_engines(bundle, flavour)
    whole = Bundle.open(tiny_bundle, verify=False)
    with recording_device(gpu) as device:
        kinds = {
            name: type(load_executor(place, "unet", backend=name, device=on)).__name__
            for name, place, on in (
                ("tensorrt", bundle, device),
                ("tensorrt-rtx", bundle, device),
                ("onnxruntime-cuda", whole, device),
            )
        }
    assert kinds == {
        "tensorrt": "TensorRTExecutor",
        "tensorrt-rtx": "TensorRTExecutor",
        "onnxruntime-cuda": "OnnxRuntimeCudaExecutor",
    }


def test_executor_of_a_gpu_on_the_host(bundle: Bundle, gpu: RecordingDriver) -> None:
    with pytest.raises(UsageError, match="tensorrt runs on a CUDA device, given host: see open_device"):
        load_executor(bundle, "unet", backend="tensorrt", device=HostDevice())


def test_device_of_the_cpu() -> None:
    choice = Choice("onnxruntime-cpu", ())
    assert isinstance(open_device(choice), HostDevice)
    with pytest.raises(UsageError, match="onnxruntime-cpu runs on the CPU and takes no CUDA stream"):
        open_device(choice, stream=1234)


def test_device_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        "sdrt.runtime.devices.gpu.device.CudaDevice",
        lambda ordinal, *, stream: opened.append((ordinal, stream)),
    )
    choice = Choice("tensorrt", (), Gpu(1, "x", (9, 0)))
    open_device(choice)
    open_device(choice, stream=1234)
    assert opened == [(1, None), (None, 1234)]  # with a stream, the GPU is the stream's


def fake_bindings(*, count: int = 1, status: int = 0) -> Any:
    """``cuda.bindings.driver`` with one GPU, or an error."""
    code = SimpleNamespace(name="CUDA_ERROR_INVALID_DEVICE") if status else 0
    attributes = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=8, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=9
    )
    return SimpleNamespace(
        CUdevice_attribute=attributes,
        cuDeviceGet=lambda index: (code, index),
        cuDeviceGetName=lambda size, device: (code, b"NVIDIA RTX 4090" + b"\0" * 20),
        cuDeviceGetAttribute=lambda attribute, device: (code, attribute),
    )


def with_libcuda(monkeypatch: pytest.MonkeyPatch, bindings: Callable[[], Any]) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    module: Any = ModuleType("sdrt.runtime.devices.gpu.bindings")
    module.load_bindings = bindings
    monkeypatch.setitem(sys.modules, "sdrt.runtime.devices.gpu.bindings", module)


def test_gpu_is_found_without_opening_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_libcuda(monkeypatch, fake_bindings)
    assert find_gpu() == ADA
    assert str(find_gpu()) == "NVIDIA RTX 4090 (compute capability 8.9)"


def test_gpu_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with_libcuda(monkeypatch, lambda: fake_bindings(status=101))
    with pytest.raises(BackendError, match=r"GPU number 0 .* cuDeviceGet says CUDA_ERROR_INVALID_DEVICE"):
        find_gpu()


def test_driver_that_is_too_old(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> Any:
        raise BackendError("the NVIDIA driver supports CUDA 11.8, but 13.0 is needed")

    with_libcuda(monkeypatch, too_old)
    assert refused(bundle, "tensorrt") == (
        "the backend tensorrt cannot run here: the NVIDIA driver supports CUDA 11.8, but 13.0 is needed"
    )
    assert choose_backend(bundle).name == "onnxruntime-cpu"


def test_axes_of_a_request() -> None:
    assert RequestShape(3, 64, 128, chunks=2).axes(8, 77) == {
        "rows": 6,
        "batch": 3,
        "context": 154,
        "height": 64,
        "width": 128,
        "latent_height": 8,
        "latent_width": 16,
    }
    assert RequestShape(3, 64, 128, guided=False).axes(8, 77)["rows"] == 3


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_pipeline_on_engines_draws_what_the_cpu_draws(
    bundle_copy: Path, gpu: RecordingDriver, monkeypatch: pytest.MonkeyPatch, flavour: str
) -> None:
    """Search, loading in threads, bindings, graphs and the loop together; the fake computes with the ONNX."""
    bundle = Bundle.open(bundle_copy, verify=False)
    factor = bundle.manifest.latents.factor
    for component, sizes in SIZES.items():
        part = bundle.component(component)
        plan = fake_plan(part.spec, model=bundle.path / part.model, factor=factor)
        add_engine(bundle, engine_key(bundle, component, sizes, flavour=flavour), plan)
    monkeypatch.setattr("sdrt.runtime.pipeline.open_device", lambda *_: recording_device(gpu))
    options: dict[str, Any] = {"seed": 3, "num_inference_steps": 3, "height": 32, "width": 24}
    options |= {"num_images_per_prompt": 2, "output_type": "numpy", "sampler": "euler"}
    with Pipeline.load(bundle, backend=flavour) as pipeline:
        first = pipeline("a cat", **options)
        again = pipeline("a cat", **options)
    assert not gpu.faults
    monkeypatch.undo()
    with Pipeline.load(bundle, backend="onnxruntime-cpu") as pipeline:
        expected = pipeline("a cat", **options)
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.latents, expected.latents)
    np.testing.assert_array_equal(first.images, expected.images)
    assert first.images.std() > 1
