"""Every executor that this machine has against ONNX Runtime on the CPU, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.runs.repeats import assert_repeats

from sdrt.export.engines.compare import random_inputs, tolerance
from sdrt.runtime.backends.component_weights import ComponentWeights
from sdrt.runtime.backends.executor import Executor, replayable
from sdrt.runtime.backends.onnxruntime_cpu.executor import OnnxRuntimeExecutor
from sdrt.runtime.backends.onnxruntime_cuda.weight_inputs import matrices
from sdrt.runtime.backends.registry import choose_backend, load_executor, open_device
from sdrt.runtime.backends.trt.library import import_tensorrt
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.devices.gpu.device import CudaDevice
from sdrt.runtime.errors import BackendError

pytestmark = pytest.mark.gpu

SHAPES = ((2, 16, 16), (4, 32, 24), (1, 24, 32), (2, 16, 16))  # rows, pixels: there and back


@pytest.fixture
def device(gpu_backend: str, engine_bundle: Bundle) -> Iterator[CudaDevice]:
    opened = open_device(choose_backend(engine_bundle, gpu_backend))
    assert isinstance(opened, CudaDevice)
    with opened:
        yield opened


def sizes_of(engine_bundle: Bundle, rows: int, height: int, width: int) -> dict[str, int]:
    factor = engine_bundle.manifest.latents.factor
    return {
        "rows": rows,
        "batch": min(rows, 2),
        "context": 77,
        "height": height,
        "width": width,
        "latent_height": height // factor,
        "latent_width": width // factor,
    }


def bind(
    executor: Executor, device: Any, feeds: Mapping[str, Any], sizes: Mapping[str, int]
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The bound call, its inputs with the feeds in them, and its outputs."""
    inputs = {name: device.zeros(array.shape, array.dtype) for name, array in feeds.items()}
    outputs = {
        entry.name: device.zeros(entry.concrete(sizes), entry.dtype) for entry in executor.spec.outputs
    }
    for name, array in feeds.items():
        device.upload(array, inputs[name])
    return executor.bind(inputs, outputs), inputs, outputs


def on_cpu(engine_bundle: Bundle, component: str, feeds: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
    part = engine_bundle.component(component)
    outputs = {entry.name: np.zeros(entry.concrete(sizes), entry.dtype) for entry in part.spec.outputs}
    OnnxRuntimeExecutor(engine_bundle.path / part.model, part.spec).bind(feeds, outputs)()
    return outputs


def assert_close(engine_bundle: Bundle, component: str, found: Any, expected: Any) -> None:
    assert np.isfinite(found).all()
    error = np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64))
    assert error <= tolerance(engine_bundle, component)


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_same_as_on_the_cpu_for_every_shape(
    gpu_backend: str, engine_bundle: Bundle, device: CudaDevice, component: str
) -> None:
    executor = load_executor(engine_bundle, component, backend=gpu_backend, device=device)
    for shape in SHAPES:
        sizes = sizes_of(engine_bundle, *shape)
        feeds = random_inputs(engine_bundle, component, sizes)
        evaluate, _, outputs = bind(executor, device, feeds, sizes)
        evaluate()
        expected = on_cpu(engine_bundle, component, feeds, sizes)
        for name, buffer in outputs.items():
            assert_close(engine_bundle, component, device.download(buffer), expected[name])


def test_graph_gives_what_a_call_gives(gpu_backend: str, engine_bundle: Bundle, device: CudaDevice) -> None:
    executor = load_executor(engine_bundle, "unet", backend=gpu_backend, device=device)
    sizes = sizes_of(engine_bundle, 2, 16, 16)
    feeds = random_inputs(engine_bundle, "unet", sizes)
    evaluate, inputs, outputs = bind(executor, device, feeds, sizes)
    evaluate()
    assert executor.capturable
    replay = device.capture(evaluate)
    other = {name: array * 0.5 for name, array in feeds.items()}
    for name, array in other.items():
        device.upload(array.astype(feeds[name].dtype), inputs[name])
    evaluate()
    eager = device.download(outputs["noise_pred"])
    device.upload(np.zeros(eager.shape, eager.dtype), outputs["noise_pred"])
    replay()
    assert_repeats(
        gpu_backend, device.download(outputs["noise_pred"]), eager, tolerance(engine_bundle, "unet")
    )


def test_weights_in_and_out_again(gpu_backend: str, engine_bundle: Bundle, device: CudaDevice) -> None:
    """Of matrices; TensorRT's engines here were not built to be refitted, and say so."""
    executor = load_executor(engine_bundle, "unet", backend=gpu_backend, device=device)
    sizes = sizes_of(engine_bundle, 2, 16, 16)
    feeds = random_inputs(engine_bundle, "unet", sizes)
    evaluate, _, outputs = bind(executor, device, feeds, sizes)
    call = replayable(device, evaluate, [executor])
    own = ComponentWeights(engine_bundle, "unet")
    graph = (engine_bundle.path / engine_bundle.component("unet").model).read_bytes()
    names = [entry.initializer for entry in matrices(graph)]
    sets: dict[str, dict[str, Any]] = {"none": {}} | {
        str(factor): {name: (own.read(name) * factor).astype(own.read(name).dtype) for name in names}
        for factor in (1.25, 0.75)
    }
    if gpu_backend != "onnxruntime-cuda":
        with pytest.raises(BackendError, match="--refit"):
            executor.replace_weights(sets["1.25"])
        return
    seen: dict[str, Any] = {}
    for chosen in ("none", "1.25", "0.75", "1.25", "none"):
        executor.replace_weights(sets[chosen])
        for _ in range(3):  # as it is, recorded, replayed
            call()
        found = device.download(outputs["noise_pred"])
        assert_repeats(gpu_backend, found, seen.setdefault(chosen, found), tolerance(engine_bundle, "unet"))
    assert len({array.tobytes() for array in seen.values()}) == 3


def test_executors_share_scratch_and_stream(
    gpu_backend: str, engine_bundle: Bundle, device: CudaDevice
) -> None:
    """The decoder's run between two of the U-Net's leaves no trace in them."""
    sizes = sizes_of(engine_bundle, 2, 32, 32)
    unet, decoder = (
        load_executor(engine_bundle, name, backend=gpu_backend, device=device)
        for name in ("unet", "vae_decoder")
    )
    evaluate, _, outputs = bind(unet, device, random_inputs(engine_bundle, "unet", sizes), sizes)
    decode, _, _ = bind(decoder, device, random_inputs(engine_bundle, "vae_decoder", sizes), sizes)
    evaluate()
    alone = device.download(outputs["noise_pred"])
    decode()
    evaluate()
    decode()
    assert_repeats(
        gpu_backend, device.download(outputs["noise_pred"]), alone, tolerance(engine_bundle, "unet")
    )


def test_many_bindings_do_not_eat_memory(gpu_backend: str, engine_bundle: Bundle, device: CudaDevice) -> None:
    executor = load_executor(engine_bundle, "unet", backend=gpu_backend, device=device)
    sizes = sizes_of(engine_bundle, 2, 32, 32)
    feeds = random_inputs(engine_bundle, "unet", sizes)

    def once() -> int:
        evaluate, _, _ = bind(executor, device, feeds, sizes)
        evaluate()
        device.synchronize()
        return device.memory_info()[0]

    free = [once() for _ in range(40)]
    assert free[-1] >= free[9]  # the first ten fill the pools


def test_compiled_kernels_are_kept(
    gpu_backend: str,
    engine_bundle: Bundle,
    device: CudaDevice,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path))
    executor = load_executor(engine_bundle, "unet", backend=gpu_backend, device=device)
    sizes = sizes_of(engine_bundle, 2, 16, 16)
    evaluate, _, _ = bind(executor, device, random_inputs(engine_bundle, "unet", sizes), sizes)
    evaluate()
    executor.close()
    written = list(tmp_path.glob("tensorrt-rtx/*.cache"))
    assert len(written) == (gpu_backend == "tensorrt-rtx")
    assert all(file.stat().st_size for file in written)
    evaluate()
    device.synchronize()


def test_plan_that_is_cut_short_is_refused_by_the_library_too(
    gpu_backend: str, engine_bundle: Bundle, device: CudaDevice, tmp_path: Path
) -> None:
    """Without our own check of the hash: the process survives, and the next load works."""
    if gpu_backend == "onnxruntime-cuda":
        pytest.skip("its engine is a graph: test_onnxruntime.py has that on the CPU")
    trt = import_tensorrt(gpu_backend)
    from sdrt.runtime.backends.trt.errors import ErrorLog

    device.make_current()
    log = ErrorLog(trt)
    runtime = trt.Runtime(log.logger)
    runtime.error_recorder = log.recorder
    plan = next((engine_bundle.path / "engines").glob("*-unet-*/*.plan")).read_bytes()
    assert runtime.deserialize_cuda_engine(plan[:-100]) is None
    assert "\n" not in str(log.error("it is refused"))
    load_executor(engine_bundle, "unet", backend=gpu_backend, device=device)
