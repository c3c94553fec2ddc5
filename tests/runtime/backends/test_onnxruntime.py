"""ONNX Runtime on the CPU as it is, and on CUDA with the CPU provider in the place of the GPU's."""

from __future__ import annotations

import gc
import itertools
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from support.checkpoints.engine_bundles import add_engine, engine_key
from support.fakes.fake_onnxruntime_cuda import fake_onnxruntime
from support.fakes.recording import RecordingDriver, recording_device

from sdrt.runtime.backends.executor import check_buffer, check_buffers
from sdrt.runtime.backends.onnx_graph import read_graph
from sdrt.runtime.backends.onnxruntime_cpu.executor import OnnxRuntimeExecutor
from sdrt.runtime.backends.onnxruntime_cuda.executor import OnnxRuntimeCudaExecutor
from sdrt.runtime.backends.onnxruntime_cuda.graph_nodes import shape_nodes
from sdrt.runtime.backends.onnxruntime_cuda.library import import_with_cuda
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.families.record import Precision, TensorSpec
from sdrt.runtime.devices.gpu.device import CudaDevice
from sdrt.runtime.errors import BackendError, BundleError, DeviceMemoryError, UsageError

AXES = {"rows": 2, "latent_height": 8, "latent_width": 16, "context": 77}


def on_host(bundle: Bundle, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Random inputs of the tiny U-Net and empty outputs, in main memory."""
    spec = bundle.component("unet").spec
    generator = np.random.default_rng(seed)
    inputs = {
        entry.name: generator.standard_normal(entry.concrete(AXES)).astype(entry.dtype)
        for entry in spec.inputs
    }
    return inputs, {entry.name: np.zeros(entry.concrete(AXES), entry.dtype) for entry in spec.outputs}


def cpu_executor(bundle: Bundle, **options: Any) -> OnnxRuntimeExecutor:
    return OnnxRuntimeExecutor(bundle.path / "unet/model.onnx", bundle.component("unet").spec, **options)


def reference(bundle: Bundle, seed: int = 0) -> Any:
    inputs, outputs = on_host(bundle, seed)
    cpu_executor(bundle).bind(inputs, outputs)()
    return outputs["noise_pred"]


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, verify=False)


# On the CPU.


def test_same_as_an_ordinary_run(tiny: Bundle) -> None:
    inputs, _ = on_host(tiny)
    session = onnxruntime.InferenceSession(
        str(tiny.path / "unet/model.onnx"), providers=["CPUExecutionProvider"]
    )
    (expected,) = session.run(None, inputs)
    result = reference(tiny)
    assert result.any()
    np.testing.assert_array_equal(result, expected)


def test_binding_keeps_its_arrays(tiny: Bundle) -> None:
    """ONNX Runtime is told addresses only; a binding whose arrays went away would read freed memory."""
    executor = cpu_executor(tiny, threads=1)
    inputs, outputs = on_host(tiny)
    evaluate = executor.bind(inputs, outputs)
    result = outputs["noise_pred"]
    expected = reference(tiny)
    inputs.clear()
    outputs.clear()
    evaluate()
    np.testing.assert_allclose(result, expected, rtol=0, atol=0)
    assert not executor.capturable
    executor.close()
    evaluate()  # a binding outlives the close


def test_graph_that_is_refused(tmp_path: Path, tiny: Bundle) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"ONNX Runtime refuses .*model\.onnx: ") as caught:
        OnnxRuntimeExecutor(model, tiny.component("unet").spec)
    assert "\n" not in str(caught.value)


def test_onnxruntime_that_is_not_installed(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"onnxruntime-cpu needs the package .*pip install 'sdrt\[cpu\]'"):
        cpu_executor(tiny)
    with pytest.raises(BackendError, match=r"onnxruntime-cuda needs the package .*'sdrt\[cuda\]'"):
        import_with_cuda()


def test_run_that_fails(tiny: Bundle) -> None:
    executor = cpu_executor(tiny)
    inputs, outputs = on_host(tiny)
    odd = {**inputs, "sample": np.zeros((2, 4, 8, 3), np.float32)}  # halved and doubled again it is 4
    executor_outputs = {"noise_pred": np.zeros((2, 4, 8, 3), np.float32)}
    with pytest.raises(BackendError, match="unet failed: ") as caught:
        executor.bind(odd, executor_outputs)()
    assert "\n" not in str(caught.value)
    executor.bind(inputs, outputs)()


@pytest.mark.parametrize(
    ("buffer", "words"),
    [
        (
            np.zeros((2, 4), np.float16),
            r"x\.y is float32\['batch', 4\], given float16\[2, 4\]",
        ),
        (np.zeros((2, 4, 1), np.float32), "given float32"),
        (np.zeros((2, 5), np.float32), "axis 1 is 4, given 5"),
        (np.zeros((4, 2), np.float32).T, "must be C-contiguous"),
    ],
)
def test_check_buffer(buffer: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_buffer("x", TensorSpec("y", "float32", ("batch", 4)), buffer)


def test_bfloat16_buffer_of_a_device() -> None:
    """NumPy knows the type by no name of its own; devices give what has one."""
    spec = TensorSpec("y", "bfloat16", (2,))
    check_buffer("x", spec, SimpleNamespace(dtype="bfloat16", shape=(2,)))
    with pytest.raises(UsageError, match="given float16"):
        check_buffer("x", spec, SimpleNamespace(dtype="float16", shape=(2,)))


def test_axes_of_a_call(tiny: Bundle) -> None:
    inputs, outputs = on_host(tiny)
    assert check_buffers(tiny.component("unet").spec, inputs, outputs) == AXES
    outputs["noise_pred"] = outputs["noise_pred"][:1]
    with pytest.raises(UsageError, match="rows is 1, another buffer of the call has 2"):
        check_buffers(tiny.component("unet").spec, inputs, outputs)


# The reader of node names.


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_nodes_are_those_that_onnx_reads(tiny: Bundle, component: str) -> None:
    file = tiny.path / component / "model.onnx"
    graph = onnx.load(file, load_external_data=False).graph
    nodes, constants = read_graph(file.read_bytes())
    assert list(constants) == [tensor.name for tensor in graph.initializer]
    assert [(node.name, node.op_type, node.inputs, node.outputs) for node in nodes] == [
        (node.name, node.op_type, tuple(node.input), tuple(node.output)) for node in graph.node
    ]


def test_shape_nodes_are_those_of_whole_numbers(tiny: Bundle) -> None:
    """In these graphs int64 is for shapes; what else is int64 in a U-Net would be seen here."""
    file = tiny.path / "unet" / "model.onnx"
    model = onnx.shape_inference.infer_shapes(onnx.load(file, load_external_data=False))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    whole = {node.name for node in model.graph.node if types.get(node.output[0]) == onnx.TensorProto.INT64}
    assert shape_nodes(*read_graph(file.read_bytes())) == whole
    assert len(whole) > 3


@pytest.mark.parametrize("data", [b"\xff", b"\x3a\xff\x01", b"\x3b", b"\x3a\x02\x0a\x05"])
def test_bytes_that_are_no_graph(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"cut off|longer|wire type"):
        read_graph(data)


# On CUDA.


class Bench:
    """A device on host memory and a fake CUDA provider."""

    def __init__(self, bundle: Bundle, ort: Any, driver: RecordingDriver) -> None:
        self.bundle, self.ort, self.driver = bundle, ort, driver
        self.device: CudaDevice = recording_device(driver)

    def load(self, **options: Any) -> OnnxRuntimeCudaExecutor:
        return OnnxRuntimeCudaExecutor(self.bundle, "unet", self.device, **options)

    def bind(self, executor: OnnxRuntimeCudaExecutor, seed: int = 0) -> tuple[Callable[[], None], Any]:
        inputs, outputs = on_host(self.bundle, seed)
        on_device = [
            {name: self.device.zeros(array.shape, array.dtype) for name, array in arrays.items()}
            for arrays in (inputs, outputs)
        ]
        for name, array in inputs.items():
            self.device.upload(array, on_device[0][name])
        return executor.bind(*on_device), on_device[1]["noise_pred"]

    def rewritten(self, change: Callable[[Any], None] = lambda model: None, **key: Any) -> Path:
        """Add a rewritten graph: the plain one with other names of nodes, and without its weights' file."""
        model = onnx.load(self.bundle.path / "unet/model.onnx", load_external_data=False)
        model.producer_name = "rewritten"
        change(model)
        sizes = {"rows": (1, 2, 4), "latent_height": (8, 8, 16), "latent_width": (8, 16, 16)}
        changes = {"flavour": "onnxruntime-cuda", "flavour_version": "1.32.0", "targets": (), **key}
        return add_engine(
            self.bundle,
            engine_key(self.bundle, "unet", sizes, **changes),
            model.SerializeToString(),
            "model.onnx",
        )


@pytest.fixture
def bench(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    driver = RecordingDriver()
    ort = fake_onnxruntime(driver)
    monkeypatch.setitem(sys.modules, "onnxruntime", ort)
    return Bench(Bundle.open(tmp_path / "bundle", verify=False), ort, driver)


def test_cuda_same_numbers_as_on_the_cpu(
    bench: Bench, tiny: Bundle, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    executor = bench.load()
    evaluate, result = bench.bind(executor)
    evaluate()
    found = bench.device.download(result)
    monkeypatch.undo()
    np.testing.assert_array_equal(found, reference(tiny))
    assert not executor.capturable
    assert capfd.readouterr() == ("", "")


def test_cuda_graph_is_captured_where_it_was_rewritten(bench: Bench) -> None:
    """And replayed with what stands in its buffers then."""
    bench.rewritten()
    executor = bench.load()
    evaluate, result = bench.bind(executor)
    assert executor.capturable
    evaluate()
    eager = bench.device.download(result)
    replay = bench.device.capture(evaluate)
    bench.device.upload(np.zeros(result.shape, result.dtype), result)
    replay()
    np.testing.assert_array_equal(bench.device.download(result), eager)
    assert not bench.load(allow_cpu_nodes={"Conv"}).capturable


def test_loading_in_threads_leaves_standard_output_alone(bench: Bench) -> None:
    """The library's prints are caught; two threads that did so at once would restore each other's."""
    number, second = itertools.count(), threading.Event()

    def preload(directory: str | None = None) -> None:
        if next(number) == 0:
            second.wait(0.5)  # the first to come in leaves when the second is in, if it gets in
        else:
            second.set()
            time.sleep(0.1)

    bench.ort.preload_dlls = preload
    before = sys.stdout
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: bench.load(), range(2)))
    assert sys.stdout is before


def test_libraries_are_found_wherever_their_wheels_are(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime-gpu in one folder of Python's path, CUDA's wheels beside PyTorch in another."""
    folders = [tmp_path / "site" / "nvidia" / name / "lib" for name in ("cu13", "cudnn")]
    for folder in folders:
        folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "site")
    asked: list[str | None] = []
    bench.ort.preload_dlls = lambda directory=None: asked.append(directory)
    bench.load()
    assert asked[:3] == [None, *map(str, folders)]


def test_cuda_works_in_our_stream_and_does_not_wait(bench: Bench) -> None:
    evaluate, _ = bench.bind(bench.load())
    before = bench.driver.counts.copy()
    evaluate()
    assert bench.driver.counts - before == {"executor_calls": 1}
    (session,) = bench.ort.sessions
    assert session.provider_options["user_compute_stream"] == str(bench.device.stream)
    assert session.provider_options["device_id"] == "0"
    entry = "disable_synchronize_execution_providers"
    assert session.run_options.get_run_config_entry(entry) == "1"


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", "0"), ("fp16", "1")])
def test_tf32_is_barred_from_float32_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, precision: Precision, allowed: str
) -> None:
    part = bench.bundle.component("unet")
    monkeypatch.setattr(bench.bundle, "component", lambda name: replace(part, precision=precision))
    bench.load()
    assert bench.ort.sessions[0].provider_options["use_tf32"] == allowed


def test_build_for_the_cpu(bench: Bench) -> None:
    bench.ort.providers = ["AzureExecutionProvider", "CPUExecutionProvider"]
    with pytest.raises(
        BackendError, match=r"has no CUDAExecutionProvider, only Azure.*pip uninstall onnxruntime"
    ):
        bench.load()


def test_real_build_for_the_cpu() -> None:
    with pytest.raises(BackendError, match=r"has no CUDAExecutionProvider"):
        import_with_cuda()


def test_provider_that_does_not_load(bench: Bench) -> None:
    """ONNX Runtime says nothing and computes on the CPU."""
    bench.ort.loads = False
    with pytest.raises(
        BackendError, match=r"the CUDA provider of onnxruntime .* did not load, only CPU.*cudnn"
    ):
        bench.load()


def test_arithmetic_on_shapes_may_stay_on_the_cpu(bench: Bench) -> None:
    nodes = read_graph((bench.bundle.path / "unet/model.onnx").read_bytes())
    shapes = shape_nodes(*nodes)
    bench.ort.on_cpu = lambda node: node.name in shapes
    bench.load()


def test_node_on_the_cpu_is_an_error_unless_allowed(bench: Bench) -> None:
    bench.ort.on_cpu = lambda node: node.op_type == "Conv"
    with pytest.raises(BackendError) as caught:
        bench.load()
    nodes, _ = read_graph((bench.bundle.path / "unet/model.onnx").read_bytes())
    count = sum(node.op_type == "Conv" for node in nodes)
    message = str(caught.value)
    assert f"leaves {count} nodes of unet/model.onnx to the CPU: Conv node_conv2d, Conv " in message
    assert f" and {count - 5} more; each would copy its tensors to the host and back" in message
    assert f"Rewrite the graph (sd-export {bench.bundle.path} --engine onnxruntime-cuda)" in message
    bench.load(allow_cpu_nodes={"Conv"})


def test_operator_of_shapes_on_other_data_is_an_error(bench: Bench) -> None:
    """A missing kernel of Reshape is not hidden by the Reshape of a shape."""
    bench.ort.on_cpu = lambda node: node.op_type == "Reshape"
    with pytest.raises(BackendError, match="to the CPU: Reshape "):
        bench.load()


def test_rewritten_graph_is_used(bench: Bench, tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bench.rewritten()
    executor = bench.load()
    assert executor.about == f"the unet's graph rewritten for CUDA (engines/{folder.name})"
    evaluate, result = bench.bind(executor)
    evaluate()
    assert [type(session.graph) for session in bench.ort.sessions] == [bytes]  # and it is loaded once
    found = bench.device.download(result)
    monkeypatch.undo()
    np.testing.assert_array_equal(found, reference(tiny))  # the weights of the component's own folder


def test_rewritten_graph_that_does_not_fit_is_not_used_and_that_is_said(bench: Bench) -> None:
    bench.rewritten(component_sha256="ab" * 32)
    executor = bench.load()
    assert executor.about.startswith(
        "the unet's plain graph, since no onnxruntime-cuda engine of the unet fits: "
    )
    assert "it was built from another unet" in executor.about
    assert "; build one: sd-export " in executor.about
    assert isinstance(bench.ort.sessions[0].graph, str)


def test_no_rewritten_graph(bench: Bench) -> None:
    assert "since the bundle has no onnxruntime-cuda engine of its unet; build one" in bench.load().about


def test_plain_graph_for_a_size_that_the_rewritten_one_does_not_admit(bench: Bench) -> None:
    bench.rewritten()
    executor = bench.load()
    for height, kind in ((8, bytes), (24, str), (8, bytes)):
        sizes = {**AXES, "latent_height": height}
        buffers = [
            {entry.name: bench.device.zeros(entry.concrete(sizes), entry.dtype) for entry in entries}
            for entries in (executor.spec.inputs, executor.spec.outputs)
        ]
        executor.bind(*buffers)()
        assert type(bench.ort.sessions[-1].graph) is kind
    bench.device.synchronize()


def test_damaged_rewritten_graph(bench: Bench) -> None:
    folder = bench.rewritten()
    file = folder / "model.onnx"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        BundleError, match="altered or damaged; remove that folder and build it again: sd-export"
    ):
        bench.load()


def test_rewritten_graph_of_something_else(bench: Bench) -> None:
    def rename(model: Any) -> None:
        for node in model.graph.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    names[index] = "latents" if name == "sample" else name
        model.graph.input[0].name = "latents"

    bench.rewritten(rename)
    with pytest.raises(BundleError, match=r"sample should be .*, the graph has only latents"):
        bench.load()


def test_cuda_graph_that_is_refused(bench: Bench) -> None:
    bench.ort.refusal = RuntimeError("no kernel for Attention\nand more lines")
    with pytest.raises(BackendError, match=r"refuses unet/model.onnx on cuda:0: no kernel for Attention$"):
        bench.load()


@pytest.mark.parametrize(
    "words",
    [
        "Failed to allocate memory for requested buffer of size 8388608",
        "CUDA failure 2: out of memory ; GPU=0",
        "BFCArena::AllocateRawInternal: Available memory of 0 is smaller than requested bytes of 1",
    ],
)
def test_out_of_memory(bench: Bench, words: str) -> None:
    evaluate, _ = bench.bind(bench.load())
    bench.ort.failure = RuntimeError(words)
    with pytest.raises(
        DeviceMemoryError, match=r"the unet failed on cuda:0: .* of 1,024 MiB are free"
    ) as caught:
        evaluate()
    assert words in str(caught.value)
    bench.ort.failure = None
    evaluate()  # the next request works


def test_out_of_memory_in_a_context_that_is_lost(bench: Bench) -> None:
    evaluate, _ = bench.bind(bench.load())
    bench.ort.failure = RuntimeError("CUDA failure 2: out of memory")
    bench.device.close()
    with pytest.raises(DeviceMemoryError, match=r"\(the device cuda:0 was closed.*; CUDA failure 2: out"):
        evaluate()


def test_context_lives_as_long_as_the_session(bench: Bench) -> None:
    executor = bench.load()
    bench.device.close()
    assert bench.driver.opened == 1
    bench.ort.sessions.clear()
    del executor
    gc.collect()
    assert bench.driver.opened == 0
    assert not bench.driver.faults


def test_run_on_cuda_that_fails(bench: Bench) -> None:
    evaluate, _ = bench.bind(bench.load())
    bench.ort.failure = RuntimeError("CUDNN_STATUS_INTERNAL_ERROR")
    with pytest.raises(
        BackendError, match="the unet failed on cuda:0: CUDNN_STATUS_INTERNAL_ERROR"
    ) as caught:
        evaluate()
    assert type(caught.value) is BackendError


def test_buffer_that_does_not_fit(bench: Bench) -> None:
    executor = bench.load()
    with pytest.raises(UsageError, match="needs a buffer for its input sample"):
        executor.bind({}, {})
