"""The TensorRT executor: on a fake library for every path, against the real one for every name."""

from __future__ import annotations

import enum
import gc
import inspect
import re
import shutil
import sys
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx.numpy_helper
import pytest
from support.checkpoints.engine_bundles import UNET_SIZES, add_engine, engine_key
from support.fakes import fake_tensorrt
from support.fakes.fake_tensorrt import fake_plan
from support.fakes.recording import RecordingDriver, recording_device
from support.runs.cache_runs import flip_byte

from sdrt.kernels.cache import read_kept
from sdrt.runtime.backends.executor import replayable
from sdrt.runtime.backends.onnxruntime_cpu.executor import OnnxRuntimeExecutor
from sdrt.runtime.backends.trt.errors import explain
from sdrt.runtime.backends.trt.executor import TensorRTExecutor
from sdrt.runtime.backends.trt.library import import_tensorrt
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.devices.gpu.device import CudaDevice
from sdrt.runtime.errors import BackendError, BundleError, DeviceMemoryError, UsageError

AXES = {"rows": 2, "latent_height": 16, "latent_width": 16, "context": 77}


class Bench:
    """A bundle with a U-Net engine, a fake TensorRT, and a device on host memory."""

    def __init__(self, bundle: Bundle, driver: RecordingDriver, trt: Any, flavour: str) -> None:
        self.bundle, self.driver, self.trt, self.flavour = bundle, driver, trt, flavour
        self.device: CudaDevice = recording_device(driver)
        self.spec = bundle.component("unet").spec

    def add(self, *sizes: Any, component: str = "unet", **facts: Any) -> Path:
        key_changes = facts.pop("key", {})
        key = engine_key(self.bundle, component, *sizes, flavour=self.flavour, **key_changes)
        plan = fake_plan(self.bundle.component(component).spec, **{"profiles": len(sizes) or 1, **facts})
        return add_engine(self.bundle, key, plan)

    def load(self, component: str = "unet", **options: Any) -> TensorRTExecutor:
        return TensorRTExecutor(self.bundle, component, self.device, self.flavour, **options)

    def buffers(self, **axes: int) -> tuple[dict[str, Any], dict[str, Any]]:
        sizes = {**AXES, **axes}
        inputs, outputs = (
            {entry.name: self.device.zeros(entry.concrete(sizes), entry.dtype) for entry in entries}
            for entries in (self.spec.inputs, self.spec.outputs)
        )
        return inputs, outputs

    def calls(self, name: str) -> list[list[Any]]:
        return [arguments for called, *arguments in self.trt.log if called == name]


@pytest.fixture(params=["tensorrt-rtx", "tensorrt"])
def bench(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> Bench:
    return make_bench(request.param, tmp_path, tiny_bundle, monkeypatch)


@pytest.fixture
def rtx(tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return make_bench("tensorrt-rtx", tmp_path, tiny_bundle, monkeypatch)


def make_bench(flavour: str, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "cache"))
    driver = RecordingDriver(compute_capability=(8, 9))
    trt = fake_tensorrt.fake_tensorrt(driver, rtx=flavour == "tensorrt-rtx")
    monkeypatch.setitem(sys.modules, trt.__name__, trt)
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    (tmp_path / "bundle").mkdir()
    return Bench(Bundle(tmp_path / "bundle", Bundle.open(tiny, verify=False).manifest), driver, trt, flavour)


def test_same_numbers_as_on_the_cpu(bench: Bench, tiny_bundle: Path) -> None:
    """Shapes, dtypes and addresses are what they should be: the fake computes on the memory it is told of."""
    model = tiny_bundle / "unet" / "model.onnx"
    bench.add(model=model)
    inputs, outputs = bench.buffers()
    evaluate = bench.load().bind(inputs, outputs)
    generator = np.random.default_rng(0)
    host_in = {name: np.zeros(buffer.shape, buffer.dtype) for name, buffer in inputs.items()}
    host_out = {name: np.zeros(buffer.shape, buffer.dtype) for name, buffer in outputs.items()}
    reference = OnnxRuntimeExecutor(model, bench.spec).bind(host_in, host_out)
    for _ in range(2):
        for name, array in host_in.items():
            array[...] = generator.standard_normal(array.shape)
            bench.device.upload(array, inputs[name])
        evaluate()
        reference()
        result = bench.device.download(outputs["noise_pred"])
        assert np.isfinite(result).all()
        assert result.any()
        np.testing.assert_array_equal(result, host_out["noise_pred"])


def test_call_only_enqueues(bench: Bench) -> None:
    bench.add()
    evaluate = bench.load().bind(*bench.buffers())
    before = bench.driver.counts.copy()
    evaluate()
    evaluate()
    assert bench.driver.counts - before == {"executor_calls": 2}
    assert bench.calls("execute_async_v3") == [[bench.device.stream]] * 2


def test_calls_can_be_captured(bench: Bench) -> None:
    bench.add()
    executor = bench.load()
    inputs, outputs = bench.buffers()
    evaluate = executor.bind(inputs, outputs)
    assert executor.capturable
    evaluate()
    replay = bench.device.capture(evaluate)
    bench.device.upload(np.ones(inputs["sample"].shape, np.float32), inputs["sample"])
    replay()
    assert (bench.device.download(outputs["noise_pred"]) == inputs["sample"].size).all()


def test_library_that_says_it_cannot_be_captured(rtx: Bench) -> None:
    rtx.add()
    rtx.trt.capturable = False
    executor = rtx.load()
    evaluate = executor.bind(*rtx.buffers())
    assert replayable(rtx.device, evaluate, [executor]) is evaluate
    assert not executor.capturable
    assert len(rtx.calls("execute_async_v3")) == 1
    assert rtx.driver.counts["captures"] == 0


def test_library_is_asked_when_it_knows(rtx: Bench) -> None:
    """Before the first run its kernels may not be compiled."""
    rtx.add()
    rtx.trt.capturable = False
    executor = rtx.load()
    evaluate = executor.bind(*rtx.buffers())
    rtx.trt.capturable = True
    replayable(rtx.device, evaluate, [executor])()
    assert rtx.driver.counts["graph_launches"] == 1


def test_call_in_another_thread(bench: Bench) -> None:
    """TensorRT works on the GPU whose context is current, by default on the first one."""
    bench.add()
    evaluate = bench.load().bind(*bench.buffers())
    with ThreadPoolExecutor(1) as pool:
        pool.submit(evaluate).result()


def test_scratch_is_shared_and_grows(bench: Bench) -> None:
    bench.add(memory=1000)
    executor = bench.load()
    first = executor.bind(*bench.buffers(rows=1))
    second = executor.bind(*bench.buffers(rows=1))
    first()
    second()
    larger = executor.bind(*bench.buffers(rows=4))
    larger()
    (one, size_one), (two, _), (three, size_three) = bench.calls("set_device_memory")
    assert (size_one, size_three) == (1000, 4000)
    assert one == two != three
    first()  # its memory is still there: on memory that was freed the recording driver fails
    bench.device.synchronize()
    assert not bench.driver.faults


def test_bindings_made_together_share_the_largest_scratch(bench: Bench) -> None:
    bench.add(memory=1 << 20)
    executor = bench.load()
    small, large = (executor.bind(*bench.buffers(rows=rows)) for rows in (1, 4))
    used = bench.driver.used
    small()
    large()
    (one, size_one), (two, size_two) = bench.calls("set_device_memory")
    assert (one, size_one, size_two) == (two, 1 << 20, 4 << 20)
    assert bench.driver.used == used


def test_engine_without_scratch(bench: Bench) -> None:
    bench.add(memory=0)
    bench.load().bind(*bench.buffers())()
    assert bench.calls("set_device_memory") == []


def test_contexts_get_memory_of_ours_only(bench: Bench) -> None:
    bench.add()
    bench.load().bind(*bench.buffers())
    strategy = bench.trt.ExecutionContextAllocationStrategy.USER_MANAGED
    (how,) = bench.calls("create_execution_context")[0]
    if bench.flavour == "tensorrt":
        assert how == strategy
        return
    assert bench.calls("set_execution_context_allocation_strategy") == [[strategy]]
    assert how.cuda_graph_strategy == bench.trt.CudaGraphStrategy.DISABLED
    eager = bench.trt.DynamicShapesKernelSpecializationStrategy.EAGER
    assert how.dynamic_shapes_kernel_specialization_strategy == eager


def test_profile_is_chosen_by_the_shape(bench: Bench) -> None:
    profiles = [{**UNET_SIZES, "rows": (1, optimum, 4)} for optimum in (1, 4)]
    bench.add(*profiles)
    executor = bench.load()
    for rows in (1, 4):
        executor.bind(*bench.buffers(rows=rows))
    stream = bench.device.stream
    assert bench.calls("set_optimization_profile_async") == [[0, stream], [1, stream]]


def test_outputs_that_nobody_wants_have_an_address(bench: Bench) -> None:
    bench.add({"batch": (1, 1, 4)}, component="text_encoder")
    spec = bench.bundle.component("text_encoder").spec
    inputs = {
        entry.name: bench.device.zeros(entry.concrete({"batch": 1}), entry.dtype) for entry in spec.inputs
    }
    wanted = bench.device.zeros(spec.outputs[0].concrete({"batch": 1}), spec.outputs[0].dtype)
    bench.load("text_encoder").bind(inputs, {spec.outputs[0].name: wanted})()
    addresses = dict(map(tuple, bench.calls("set_tensor_address")))
    assert set(addresses) == {*inputs, "last_hidden_state", "penultimate_hidden_state"}
    assert len(set(addresses.values())) == 5


def test_engines_for_several_sizes(bench: Bench) -> None:
    small = bench.add({**UNET_SIZES, "rows": (1, 1, 2)})
    large = bench.add({**UNET_SIZES, "rows": (4, 4, 4)})
    executor = bench.load()
    executor.bind(*bench.buffers(rows=2))
    before = len(bench.calls("deserialize_cuda_engine"))
    executor.bind(*bench.buffers(rows=4))
    executor.bind(*bench.buffers(rows=4))
    assert len(bench.calls("deserialize_cuda_engine")) == before + 1  # each engine once
    with pytest.raises(BackendError, match="asked for is rows 3") as caught:
        executor.bind(*bench.buffers(rows=3))
    assert all(folder.name in str(caught.value) for folder in (small, large))
    executor.bind(*bench.buffers(rows=2))()  # the next request works


def test_engine_that_nothing_uses_any_more_is_freed(bench: Bench) -> None:
    bench.add({**UNET_SIZES, "rows": (1, 1, 2)})
    bench.add({**UNET_SIZES, "rows": (4, 4, 4)})
    executor = bench.load()
    binding = executor.bind(*bench.buffers(rows=2))
    engine = weakref.ref(executor._latest)
    executor.bind(*bench.buffers(rows=4))
    assert engine() is not None  # of the binding
    del binding
    assert engine() is None


def test_two_executors_share_one_device(bench: Bench) -> None:
    bench.add()
    bench.add({"batch": (1, 1, 4)}, component="text_encoder")
    bench.load()
    bench.load("text_encoder")
    bench.load().bind(*bench.buffers())()


@pytest.mark.parametrize(
    ("tensor", "fields", "words"),
    [
        ("sample", {"dtype": "HALF"}, r"has sample as HALF\[-1, 4, -1, -1\], the component's is float32"),
        ("noise_pred", {"dtype": "BF16"}, "has noise_pred as BF16"),
        ("sample", {"shape": ["rows", 9, "latent_height", "latent_width"]}, r"has sample as FLOAT\[-1, 9"),
        ("sample", {"shape": ["rows", 4]}, r"has sample as FLOAT\[-1, 4\]"),
        ("sample", {"format": "CHW32"}, "wants sample in the layout CHW32"),
        ("timestep", {"location": "HOST"}, "wants timestep in host memory"),
        ("timestep", {"mode": None}, "has the inputs sample, encoder_hidden_states and outputs noise_pred"),
        ("timestep", {"mode": "OUTPUT"}, "has the inputs sample, encoder_hidden_states and outputs timestep"),
    ],
)
def test_engine_of_something_else(bench: Bench, tensor: str, fields: dict[str, Any], words: str) -> None:
    """A binding of another dtype would give NaN, and no error."""
    folder = bench.add(tensors={tensor: fields})
    with pytest.raises(BackendError, match=words) as caught:
        bench.load()
    message = str(caught.value)
    assert message.startswith(f"engines/{folder.name} is no engine of this unet: ")
    assert f"remove it and build it again: sd-export {bench.bundle.path} --engine {bench.flavour}" in message


def test_plan_with_other_profiles_than_its_manifest_says(bench: Bench) -> None:
    bench.add(profiles=2)
    with pytest.raises(BackendError, match="it has 2 optimization profiles"):
        bench.load()


REAL_WORDS = (
    "IRuntime::deserializeCudaEngine: Error Code 1: Cuda Runtime (In ScopedCudaStream at "
    "/_src/common/dispatch/cudaResources.cpp:25 (cudaError 35: CUDA driver version is insufficient for CUDA "
    "runtime version))"
)
UNSUPPORTED = (
    "IRuntime::deserializeCudaEngine: Error Code 4: API Usage Error (The engine was not built for compute "
    "capability 9.0. In parsePlan at /_src/runtime/dispatch/runtime.cpp:780)"
)


def test_engine_that_the_library_refuses(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    folder = bench.add()
    bench.trt.faults["deserialize_cuda_engine"] = UNSUPPORTED
    bench.trt.diagnosis = 2
    with pytest.raises(BackendError) as caught:
        bench.load()
    flags = " [UNSUPPORTED_CC]" if bench.flavour == "tensorrt-rtx" else ""
    assert str(caught.value).startswith(
        f"{bench.flavour} 1.7.1.116 refuses engines/{folder.name} on Recording GPU (compute capability 8.9)"
        f"{flags}: API Usage Error (The engine was not built for compute capability 9.0); build it again: "
        f"sd-export {bench.bundle.path}"
    )
    assert type(caught.value) is BackendError
    assert capfd.readouterr() == ("", "")  # TensorRT's own chatter is not for the terminal
    bench.trt.faults.clear()
    bench.load().bind(*bench.buffers())()


def test_library_that_does_not_start(bench: Bench) -> None:
    bench.add()
    bench.trt.faults["Runtime"] = "CUDA initialization failure with error: 35"
    with pytest.raises(
        BackendError, match=r"1\.7\.1\.116 does not start \(pybind11.*\): CUDA initialization"
    ):
        bench.load()


def test_context_lives_as_long_as_the_engine(bench: Bench) -> None:
    """What TensorRT holds on the GPU is freed when its objects die, and that needs the context."""
    bench.add()
    executor = bench.load()
    bench.device.close()
    assert bench.driver.opened == 1
    del executor
    gc.collect()
    assert bench.driver.opened == 0
    assert not bench.driver.faults


def test_weights_that_do_not_fit(bench: Bench) -> None:
    bench.add()
    bench.trt.faults["deserialize_cuda_engine"] = (
        "[defaultAllocator.cpp::allocate::48] Error Code 1: Cuda Runtime (In allocate at "
        "/_src/x.cpp:48 (cudaError 2: out of memory))"
    )
    with pytest.raises(
        DeviceMemoryError, match=r"the GPU's memory is too small \(0 MiB are needed, \d+"
    ) as caught:
        bench.load()
    assert "MiB are free, out of memory (cudaError 2)" in str(caught.value)


def test_allocation_that_fails_by_its_code(bench: Bench) -> None:
    bench.add()
    executor = bench.load()
    bench.trt.faults["create_execution_context"] = ("no room for 3 GB", "FAILED_ALLOCATION")
    with pytest.raises(DeviceMemoryError, match=r"no execution context .*MiB are free, no room for 3 GB"):
        executor.bind(*bench.buffers())


def test_scratch_that_does_not_fit(bench: Bench) -> None:
    bench.add(memory=1 << 29)  # rows 2: the whole of the GPU
    executor = bench.load()
    with pytest.raises(DeviceMemoryError, match="1,024 MiB more are needed"):
        executor.bind(*bench.buffers(rows=2))
    executor.bind(*bench.buffers(rows=1))()  # the process survives and the next request works


@pytest.mark.parametrize(
    ("method", "fault", "words"),
    [
        ("create_execution_context", "no luck", "no execution context for engines/.*: no luck"),
        ("set_optimization_profile_async", "no luck", "TensorRT refuses the optimization profile 0: no luck"),
        (
            "set_input_shape",
            "outside of the profile",
            r"refuses sample of shape \[2, 4, 16, 16\]; the engine admits \[1, 4, 1, 1\] to \[4, 4, 4, 4\]: "
            "outside of the profile",
        ),
        ("set_input_shape", "", "refuses sample .*: TensorRT gives no reason"),
        ("infer_shapes", ["sample"], "wants a shape for sample"),
        ("infer_shapes", RuntimeError("odd\nlines"), r"cannot infer the shapes \(odd\)"),
        ("set_tensor_address", "not aligned", "refuses the address of sample: not aligned"),
    ],
)
def test_binding_that_is_refused(bench: Bench, method: str, fault: Any, words: str) -> None:
    bench.add()
    executor = bench.load()
    bench.trt.faults[method] = fault
    with pytest.raises(BackendError, match=words) as caught:
        executor.bind(*bench.buffers())
    assert "\n" not in str(caught.value)
    bench.trt.faults.clear()
    executor.bind(*bench.buffers())()


def test_enqueue_that_fails(bench: Bench) -> None:
    bench.add()
    evaluate = bench.load().bind(*bench.buffers())
    bench.trt.faults["execute_async_v3"] = "Error Code 1: Myelin (no kernel)"
    with pytest.raises(
        BackendError, match=r"engines/.*: the unet failed: Error Code 1: Myelin \(no kernel\)"
    ):
        evaluate()
    bench.trt.faults.clear()
    evaluate()  # what failed before is not said again
    bench.trt.faults["execute_async_v3"] = ""
    with pytest.raises(BackendError, match="the unet failed: TensorRT gives no reason"):
        evaluate()


def test_words_of_a_call_that_went_well_are_not_blamed(bench: Bench) -> None:
    bench.add()
    executor = bench.load()
    evaluate = executor.bind(*bench.buffers())
    executor._log.recorder.report_error(bench.trt.ErrorCodeTRT.UNSPECIFIED_ERROR, "an old story")
    executor.bind(*bench.buffers())
    bench.trt.faults["execute_async_v3"] = "the true cause"
    with pytest.raises(BackendError, match="the unet failed: the true cause"):
        evaluate()


def test_output_of_another_size_than_its_buffer(bench: Bench) -> None:
    bench.add()
    inputs, outputs = bench.buffers()
    outputs["noise_pred"] = bench.device.zeros((2, 4, 16, 8), "float32")
    with pytest.raises(UsageError, match="latent_width is 8, another buffer of the call has 16"):
        bench.load().bind(inputs, outputs)


def test_decoder_gives_what_its_factor_says(bench: Bench) -> None:
    """The height of the image is no size that an input has: TensorRT is asked for it."""
    sizes = {"batch": (1, 1, 4), "latent_height": (8, 8, 16), "latent_width": (8, 8, 16)}
    bench.add(sizes, component="vae_decoder", factor=2)
    latents = bench.device.zeros((1, 4, 8, 8), "float32")
    executor = bench.load("vae_decoder")
    executor.bind({"latents": latents}, {"image": bench.device.zeros((1, 3, 16, 16), "float32")})()
    with pytest.raises(
        BackendError, match=r"image comes out as \[1, 3, 16, 16\], the buffer is \[1, 3, 16, 32\]"
    ):
        executor.bind({"latents": latents}, {"image": bench.device.zeros((1, 3, 16, 32), "float32")})


def _without(mapping: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda device, inputs: _without(inputs, "timestep"), "needs a buffer for its input timestep"),
        (lambda device, inputs: {**inputs, "x": inputs["sample"]}, "has no input x, only sample"),
        (
            lambda device, inputs: {**inputs, "timestep": device.zeros((2,), "float16")},
            r"unet\.timestep is float32\['rows'\], given float16\[2\]",
        ),
        (
            lambda device, inputs: {**inputs, "sample": device.zeros((2, 5, 16, 16), "float32")},
            "axis 1 is 4, given 5",
        ),
    ],
)
def test_buffers_that_do_not_fit(bench: Bench, change: Any, words: str) -> None:
    bench.add()
    inputs, outputs = bench.buffers()
    with pytest.raises(UsageError, match=words):
        bench.load().bind(change(bench.device, inputs), outputs)


def test_no_engine(bench: Bench) -> None:
    with pytest.raises(
        BackendError, match=f"the bundle has no {bench.flavour} engine of its unet; build one"
    ):
        bench.load()


def test_damaged_engine(bench: Bench) -> None:
    folder = bench.add()
    plan = folder / "model.plan"
    data = bytearray(plan.read_bytes())
    data[5] ^= 1
    plan.write_bytes(data)
    with pytest.raises(BundleError, match="altered or damaged; remove that folder and build it again"):
        bench.load()
    assert bench.calls("deserialize_cuda_engine") == []  # TensorRT never sees it


def test_engine_for_the_bundles_default_size_comes_first(bench: Bench) -> None:
    defaults, factor = bench.bundle.manifest.defaults, bench.bundle.manifest.latents.factor
    side = defaults.height // factor
    other = {"latent_height": (side * 2,) * 3, "latent_width": (side * 2,) * 3}
    default = {"latent_height": (side,) * 3, "latent_width": (side,) * 3}
    bench.add({"rows": (1, 1, 1), **other})
    wanted = bench.add({"rows": (2, 2, 2), **default})
    assert bench.load()._latest.engine.folder == wanted


def test_runtime_cache_is_kept(rtx: Bench, tmp_path: Path) -> None:
    folder = rtx.add()
    executor = rtx.load()
    assert rtx.calls("deserialize") == []
    evaluate = executor.bind(*rtx.buffers())
    evaluate()
    (cache,) = (tmp_path / "cache" / "tensorrt-rtx").iterdir()  # after the first run, which compiles
    assert read_kept("tensorrt-rtx", cache.name, 100) == b"compiled kernels"
    written = cache.stat().st_mtime_ns
    executor.close()
    assert cache.stat().st_mtime_ns == written  # nothing new, nothing written
    rtx.trt.cache = b"more kernels"
    executor.close()
    assert read_kept("tensorrt-rtx", cache.name, 100) == b"more kernels"
    rtx.load()
    assert rtx.calls("deserialize") == [[b"more kernels"]]
    flip_byte(cache, 3)  # the library would be given what nobody has compiled
    rtx.load()
    assert len(rtx.calls("deserialize")) == 1
    # Another plan, another cache.
    shutil.rmtree(folder)
    rtx.add(memory=8)
    rtx.load().bind(*rtx.buffers())()
    assert len(list((tmp_path / "cache" / "tensorrt-rtx").iterdir())) == 2


def test_runtime_cache_is_kept_without_close(rtx: Bench, tmp_path: Path) -> None:
    rtx.add()
    executor = rtx.load()
    executor.bind(*rtx.buffers())()
    rtx.trt.cache = b"compiled meanwhile"
    del executor
    (cache,) = (tmp_path / "cache" / "tensorrt-rtx").iterdir()
    assert read_kept("tensorrt-rtx", cache.name, 100) == b"compiled meanwhile"


def test_runtime_cache_that_cannot_be_written_is_no_error(
    rtx: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "file"))
    rtx.add()
    executor = rtx.load()
    executor.bind(*rtx.buffers())()
    executor.close()


@pytest.mark.parametrize(
    ("method", "fault"),
    [("deserialize", ""), ("serialize", ""), ("serialize", RuntimeError("the context is lost"))],
)
def test_runtime_cache_that_the_library_refuses_is_no_error(rtx: Bench, method: str, fault: Any) -> None:
    rtx.add()
    rtx.load().bind(*rtx.buffers())()
    rtx.trt.faults[method] = fault
    executor = rtx.load()
    executor.bind(*rtx.buffers())()
    executor.close()


WEIGHTS = {"conv.weight": 4, "conv.bias": 2}


def refittable_unet(bench: Bench, tiny: Path, *, together: bool = False) -> dict[str, Any]:
    """Add an engine that computes with the weights that it was given; return some that it has.

    Two of them TensorRT replaces only ``together``.
    """
    shutil.copytree(tiny / "unet", bench.bundle.path / "unet")
    model = bench.bundle.path / "unet/model.onnx"
    own = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(model).graph.initializer
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16) and len(tensor.dims) == 2
    }
    kinds = {np.dtype(np.float32): "FLOAT", np.dtype(np.float16): "HALF"}
    weights = {name: [kinds[array.dtype], array.size] for name, array in own.items()}
    pairs = [sorted(own)[:2]] if together else []
    bench.add(model=str(model), refittable=True, weights=weights, together=pairs)
    return own


def test_replaced_weights(bench: Bench, tiny_bundle: Path) -> None:
    """By refit: in and out again, in a call that was bound and recorded before."""
    own = refittable_unet(bench, tiny_bundle)
    first, second, *_ = sorted(own)
    executor = bench.load()
    inputs, outputs = bench.buffers()
    bench.device.upload(np.ones(inputs["sample"].shape, np.float32), inputs["sample"])
    evaluate = replayable(bench.device, executor.bind(inputs, outputs), [executor])
    seen: dict[str, Any] = {}
    for name, weights in (
        ("none", {}),
        ("one", {first: own[first] + own[first].dtype.type(0.1)}),
        ("other", {second: np.asfortranarray(own[second] * own[second].dtype.type(2))}),
        ("one", {first: own[first] + own[first].dtype.type(0.1)}),
        ("none", {}),
    ):
        executor.replace_weights(weights)
        for _ in range(3):  # as it is, recorded anew, replayed
            bench.device.clear(outputs["noise_pred"])
            evaluate()
            got = bench.device.download(outputs["noise_pred"])
            np.testing.assert_array_equal(got, seen.setdefault(name, got))
    assert len({array.tobytes() for array in seen.values()}) == 3


def test_replaced_weights_in_an_engine_that_is_loaded_later(bench: Bench) -> None:
    bench.add({**UNET_SIZES, "rows": (1, 2, 2)}, refittable=True, weights=WEIGHTS)
    bench.add({**UNET_SIZES, "rows": (4, 4, 4)}, refittable=True, weights=WEIGHTS)
    executor = bench.load()
    executor.bind(*bench.buffers(rows=2))
    weight = np.arange(4, dtype=np.float32).reshape(2, 2).T
    executor.replace_weights({"conv.weight": weight})
    executor.bind(*bench.buffers(rows=4))
    given = bench.calls("set_named_weights")
    assert [name for name, _ in given] == ["conv.weight"] * 2
    for _, array in given:
        np.testing.assert_array_equal(array, weight.ravel())
    assert bench.calls("refit_cuda_engine_async") == [[bench.device.stream]] * 2


def test_weights_that_are_replaced_only_together(bench: Bench, tiny_bundle: Path) -> None:
    """Those that do not change are given as the bundle has them."""
    own = refittable_unet(bench, tiny_bundle, together=True)
    one, two, *_ = sorted(own)
    executor = bench.load()
    executor.replace_weights({one: np.zeros_like(own[one])})
    (loaded,) = executor._loaded.values()
    refitted = loaded.cuda_engine._refitted
    assert set(refitted) == {one, two}
    np.testing.assert_array_equal(refitted[two], own[two].ravel())


@pytest.mark.parametrize(
    ("facts", "weights", "faults", "words"),
    [
        (
            {"refittable": False},
            {"conv.weight": 4},
            {},
            "was not built for that. Build one that can, .*: sd-export .* --refit$",
        ),
        ({}, {"lora": 4}, {}, "has no weights lora; there are 2, such as conv.bias, conv.weight"),
        ({}, {"conv.weight": 5}, {}, "the weights conv.weight are 4 of float32, given 5 of float32"),
        (
            {"weights": {"conv.weight": ["HALF", 4]}},
            {"conv.weight": 4},
            {},
            "4 of float16, given 4 of float32; export the bundle with --fp16",
        ),
        ({}, {"conv.weight": 4}, {"set_named_weights": "bad"}, "refuses new weights for conv.weight: bad"),
        ({}, {"conv.weight": 4}, {"refit_cuda_engine_async": "bad"}, "could not be given new weights: bad"),
    ],
    ids=["not refittable", "unknown", "size", "type", "refused", "failed"],
)
def test_weights_that_cannot_be_replaced(
    bench: Bench, facts: dict[str, Any], weights: Mapping[str, int], faults: dict[str, Any], words: str
) -> None:
    bench.add(**{"refittable": True, "weights": WEIGHTS, **facts})
    executor = bench.load()
    bench.trt.faults.update(faults)
    with pytest.raises(BackendError, match=words):
        executor.replace_weights({name: np.zeros(size, np.float32) for name, size in weights.items()})
    assert executor.generation == ("refit_cuda_engine_async" in faults)


def test_after_a_refit_that_failed_all_is_given_back(bench: Bench, tiny_bundle: Path) -> None:
    """Another engine may have had the weights by then."""
    own = refittable_unet(bench, tiny_bundle)
    first, second, *_ = sorted(own)
    executor = bench.load()
    executor.replace_weights({first: own[first] * own[first].dtype.type(2)})
    bench.trt.faults["refit_cuda_engine_async"] = "bad"
    with pytest.raises(BackendError):
        executor.replace_weights({second: own[second] * own[second].dtype.type(2)})
    bench.trt.faults.clear()
    executor.replace_weights({})
    given = bench.calls("set_named_weights")[-2:]
    assert {name for name, _ in given} == {first, second}
    for name, array in given:
        np.testing.assert_array_equal(array, own[name].ravel())


def test_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for flavour, module, extra in (
        ("tensorrt", "tensorrt", "tensorrt"),
        ("tensorrt-rtx", "tensorrt_rtx_bindings", "rtx"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
        with pytest.raises(
            BackendError, match=rf"{flavour} is not installed .*pip install 'sdrt\[{extra}\]'"
        ):
            import_tensorrt(flavour)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (REAL_WORDS, "CUDA driver version is insufficient for CUDA runtime version (cudaError 35)"),
        (UNSUPPORTED, "API Usage Error (The engine was not built for compute capability 9.0)"),
        ("plain\n  words", "plain words"),
    ],
)
def test_words_of_tensorrt(text: str, plain: str) -> None:
    assert explain(text) == plain


# Against the real library, which needs no GPU for this.

FAKES = {
    "Runtime": fake_tensorrt.RtxRuntime,
    "ICudaEngine": fake_tensorrt.RtxEngine,
    "IExecutionContext": fake_tensorrt.RtxContext,
    "IRuntimeConfig": fake_tensorrt.IRuntimeConfig,
    "IRuntimeCache": fake_tensorrt.IRuntimeCache,
    "Refitter": fake_tensorrt.Refitter,
    "ILogger": fake_tensorrt.ILogger,
}


def real_trt() -> Any:
    return import_tensorrt("tensorrt-rtx")


def argument_counts(function: Any) -> set[int]:
    """With how many arguments (without self) a function of the bindings can be called, by its docstring."""
    counts = set()
    signatures = re.findall(rf"^(?:\d+\. )?{function.__name__}\((.*)\) ->", function.__doc__, re.MULTILINE)
    for signature in signatures:
        if signature == "*args, **kwargs":
            continue
        arguments = [part for part in re.split(r", (?=\w+:)", signature) if not part.startswith("self:")]
        optional = sum(" = " in part for part in arguments)
        counts |= set(range(len(arguments) - optional, len(arguments) + 1))
    return counts


@pytest.mark.parametrize("name", FAKES)
def test_every_name_of_the_fake_is_in_the_real_library(name: str) -> None:
    trt, fake = real_trt(), FAKES[name]
    real = getattr(trt, name)
    kinds = [kind for kind in fake.__mro__[:-1] if not kind.__name__.startswith("_")]
    own = {key for kind in kinds for key in vars(kind) if not key.startswith("_")}
    source = "".join(map(inspect.getsource, kinds))
    names = (own | set(re.findall(r"self\.([a-z]\w+)", source))) - {"module", "plan"}
    assert names <= set(dir(real)), names - set(dir(real))
    for key in own:
        if inspect.isfunction(getattr(fake, key)):
            given = len(inspect.signature(getattr(fake, key)).parameters) - 1
            assert given in argument_counts(getattr(real, key)), key


def test_every_enumeration_of_the_fake_is_in_the_real_library() -> None:
    trt, fake = real_trt(), fake_tensorrt.fake_tensorrt(RecordingDriver())
    kinds = [
        value for value in vars(fake).values() if inspect.isclass(value) and issubclass(value, enum.Enum)
    ]
    assert len(kinds) == 9
    for kind in kinds:
        real = getattr(trt, kind.__name__).__members__
        assert {member.name: int(real[member.name]) for member in kind} == {
            member.name: member.value for member in kind
        }


def test_other_names_are_in_the_real_library() -> None:
    trt = real_trt()
    assert trt.nptype(trt.DataType.HALF) is np.float16
    array = np.ones(3, np.float16)
    weights = trt.Weights(trt.DataType.HALF, array.ctypes.data, array.size)
    assert (weights.dtype, weights.size) == (trt.DataType.HALF, 3)
    assert (int(trt.ILogger.INTERNAL_ERROR), int(trt.ILogger.ERROR)) == (0, 1)
    assert re.fullmatch(r"\d+(\.\d+)+", trt.__version__)
    for name in ("report_error", "num_errors", "get_error_code", "get_error_desc", "has_overflowed", "clear"):
        assert hasattr(trt.IErrorRecorder, name)


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="what is tested is the lack of a GPU")
def test_real_library_without_a_gpu(
    tmp_path: Path, tiny_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """TensorRT for RTX itself deserialises: one clear line, and nothing on the terminal."""
    bundle = Bundle(tmp_path, Bundle.open(tiny_bundle, verify=False).manifest)
    version = real_trt().__version__
    device = recording_device(RecordingDriver(compute_capability=(8, 9)))
    add_engine(bundle, engine_key(bundle, flavour_version=version), tiny_rtx_plan())
    with pytest.raises(BackendError) as caught:
        TensorRTExecutor(bundle, "unet", device, "tensorrt-rtx")
    assert re.fullmatch(
        rf"tensorrt-rtx {re.escape(version)} refuses engines/\S+ on Recording GPU "
        r"\(compute capability 8\.9\): CUDA driver version is insufficient for CUDA runtime version "
        r"\(cudaError 35\); build it again: sd-export .*",
        str(caught.value),
    )
    assert capfd.readouterr() == ("", "")


def test_real_library_and_what_is_no_plan(tmp_path: Path, tiny_bundle: Path) -> None:
    bundle = Bundle(tmp_path, Bundle.open(tiny_bundle, verify=False).manifest)
    key = engine_key(bundle, flavour_version=real_trt().__version__)
    add_engine(bundle, replace(key), b"not a plan of TensorRT" * 100)
    device = recording_device(RecordingDriver(compute_capability=(8, 9)))
    with pytest.raises(
        BackendError, match=r"refuses engines/.*: Serialization \(Serialization assertion"
    ) as caught:
        TensorRTExecutor(bundle, "unet", device, "tensorrt-rtx")
    assert "/_src/" not in str(caught.value)
    assert "\n" not in str(caught.value)


def tiny_rtx_plan() -> bytes:
    """A real plan: y = x · 1, built without a GPU in a second."""
    trt = real_trt()

    class Silent(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, _severity: Any, _text: str) -> None:
            pass

    builder = trt.Builder(Silent())
    network = builder.create_network(0)
    source = network.add_input("x", trt.float16, (2, 4))
    ones = network.add_constant((4, 4), trt.Weights(np.ones((4, 4), np.float16))).get_output(0)
    none = trt.MatrixOperation.NONE
    network.mark_output(network.add_matrix_multiply(source, none, ones, none).get_output(0))
    return bytes(builder.build_serialized_network(network, builder.create_builder_config()))
