"""Other weights on ONNX Runtime's CUDA provider: matrices by a copy, the rest by a graph that is loaded anew.

The fake provider computes on the CPU, where a matrix that is an input is not packed: last bits differ.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from support.checkpoints.engine_bundles import add_engine, engine_key
from support.fakes.fake_onnxruntime_cuda import fake_onnxruntime
from support.fakes.recording import RecordingDriver, recording_device
from support.runs.onnx_runs import with_weights
from support.runs.openvino_runs import assert_close, buffers

from sdrt.export.passes.pipeline import prepare_for_onnxruntime_cuda
from sdrt.runtime.backends.executor import replayable
from sdrt.runtime.backends.onnx_graph import read_graph
from sdrt.runtime.backends.onnxruntime_cpu.executor import OnnxRuntimeExecutor
from sdrt.runtime.backends.onnxruntime_cuda.executor import OnnxRuntimeCudaExecutor
from sdrt.runtime.backends.onnxruntime_cuda.weight_inputs import matrices
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.errors import BackendError

Array = NDArray[Any]
Weights = dict[str, Array]


class Bench:
    """The U-Net of a bundle on a fake CUDA provider, in a call that is bound and may be recorded."""

    def __init__(self, bundle: Bundle, ort: Any) -> None:
        self.bundle, self.ort = bundle, ort
        self.file = bundle.path / "unet/model.onnx"
        self.content = self.file.read_bytes()
        device = recording_device(ort.driver)
        self.executor = OnnxRuntimeCudaExecutor(bundle, "unet", device)
        self.inputs, outputs = buffers(bundle)
        on_device = [
            {name: device.zeros(array.shape, array.dtype) for name, array in arrays.items()}
            for arrays in (self.inputs, outputs)
        ]
        for name, array in self.inputs.items():
            device.upload(array, on_device[0][name])
        evaluate = replayable(device, self.executor.bind(*on_device), [self.executor])

        def call() -> Array:
            (result,) = on_device[1].values()
            device.clear(result)
            evaluate()
            return device.download(result)

        self.call: Callable[[], Array] = call

    def changed(self, seed: int, *, of_matrices: bool) -> Weights:
        """Some of the graph's weights, and a little more."""
        _, own = read_graph(self.content)
        generator = np.random.default_rng(seed)
        multiplied = {entry.initializer for entry in matrices(self.content)}
        names = [
            name
            for name, tensor in own.items()
            if (name in multiplied if of_matrices else len(tensor.shape) == 4)
        ]
        assert len(names) > 3
        return {
            name: own[name].read(self.file.parent).astype(np.float32)
            + generator.uniform(-0.02, 0.02, own[name].shape).astype(np.float32)
            for name in names
        }

    def exported(self, weights: Weights, folder: Path) -> Array:
        """What a graph gives that has these weights from the beginning."""
        graph = with_weights(self.file, weights, folder / "exported.onnx")
        outputs = buffers(self.bundle)[1]
        spec = self.bundle.component("unet").spec
        OnnxRuntimeExecutor(graph, spec).bind(self.inputs, outputs)()
        result: Array = outputs["noise_pred"]
        return result


@pytest.fixture(params=["rewritten", "plain"])
def bench(
    request: pytest.FixtureRequest, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Bench:
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"), verify=False)
    if request.param == "rewritten":
        model = onnx.load(bundle.path / "unet/model.onnx", load_external_data=False)
        model.producer_name = "rewritten"
        sizes = {"rows": (1, 2, 4), "latent_height": (8, 8, 16), "latent_width": (8, 16, 16)}
        key = {"flavour": "onnxruntime-cuda", "flavour_version": "1.32.0", "targets": ()}
        plan = model.SerializeToString()
        add_engine(bundle, engine_key(bundle, "unet", sizes, **key), plan, "model.onnx")
    ort = fake_onnxruntime(RecordingDriver())
    monkeypatch.setitem(sys.modules, "onnxruntime", ort)
    return Bench(bundle, ort)


def test_matrices_are_copied(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In and out again; once they are inputs nothing is loaded and nothing recorded."""
    one, other = (bench.changed(seed, of_matrices=True) for seed in (1, 2))
    del other[sorted(other)[0]]  # which is the graph's own again, then
    first = bench.call()
    bench.executor.replace_weights(one)
    seen = bench.call(), bench.call()
    sessions, generation = len(bench.ort.sessions), bench.executor.generation
    assert (sessions, generation) == (2, 1)
    recorded = bench.ort.driver.counts["captures"]
    for weights in (other, one, other):
        bench.executor.replace_weights(weights)
        got = bench.call()
        if weights is one:
            np.testing.assert_array_equal(got, seen[0])
            np.testing.assert_array_equal(got, seen[1])
    assert (len(bench.ort.sessions), bench.executor.generation) == (sessions, generation)
    assert bench.ort.driver.counts["captures"] == recorded
    bench.executor.replace_weights({})
    np.testing.assert_array_equal(bench.call(), first)
    monkeypatch.undo()
    for weights, found in ((one, seen[0]), (other, got)):
        wanted = bench.exported(weights, tmp_path)
        assert not np.array_equal(wanted, first)
        assert_close({"noise_pred": found}, {"noise_pred": wanted})


def test_what_is_no_matrix_is_loaded_anew(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices_, kernels = bench.changed(1, of_matrices=True), bench.changed(2, of_matrices=False)
    first = bench.call()
    both = {**matrices_, **kernels}
    bench.executor.replace_weights(both)
    seen = bench.call()
    np.testing.assert_array_equal(bench.call(), seen)
    assert bench.executor.generation == 1
    bench.executor.replace_weights(kernels)  # the matrices alone change
    assert bench.executor.generation == 1
    assert not np.array_equal(bench.call(), seen)
    bench.executor.replace_weights(matrices_)
    assert bench.executor.generation == 2
    bench.executor.replace_weights(both)
    np.testing.assert_array_equal(bench.call(), seen)
    bench.executor.replace_weights({})
    np.testing.assert_array_equal(bench.call(), first)
    monkeypatch.undo()
    assert_close({"noise_pred": seen}, {"noise_pred": bench.exported(both, tmp_path)})


def test_an_error_leaves_the_weights(bench: Bench) -> None:
    one, kernels = bench.changed(1, of_matrices=True), bench.changed(2, of_matrices=False)
    bench.executor.replace_weights(one)
    before = bench.call()
    with pytest.raises(BackendError, match="has no initializer 'nothing'"):
        bench.executor.replace_weights({"nothing": np.zeros(3, np.float32)})
    bench.ort.refusal = RuntimeError("no room")
    with pytest.raises(BackendError, match="no room"):
        bench.executor.replace_weights(kernels)
    np.testing.assert_array_equal(bench.call(), before)


def test_after_an_interrupt_the_same_weights_are_loaded(bench: Bench) -> None:
    """Not taken for what the graph holds already."""
    one = bench.changed(1, of_matrices=True)
    bench.executor.replace_weights(one)
    wanted = bench.call()
    bench.executor.replace_weights({})
    bench.ort.refusal = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        bench.executor.replace_weights(one)
    bench.ort.refusal = None
    bench.executor.replace_weights(one)
    np.testing.assert_array_equal(bench.call(), wanted)


def test_rewritten_graphs_name_their_weights_as_the_bundle_does(tiny_bundle: Path, tmp_path: Path) -> None:
    """So the weight map is theirs, too: what turns a kernel round is a node behind it."""
    import onnx_ir as ir

    for component in ("unet", "text_encoder", "vae_decoder"):
        plain = read_graph((tiny_bundle / component / "model.onnx").read_bytes())[1]
        model = ir.load(tiny_bundle / component / "model.onnx")
        prepare_for_onnxruntime_cuda(model, component, "fp32")
        ir.save(model, tmp_path / f"{component}.onnx")
        rewritten = read_graph((tmp_path / f"{component}.onnx").read_bytes())[1]
        floats = {name for name, tensor in plain.items() if tensor.dtype.startswith("float") and tensor.file}
        assert floats
        assert {name: plain[name] for name in floats} == {name: rewritten[name] for name in floats}
        assert component != "unet" or len(matrices((tmp_path / "unet.onnx").read_bytes())) > 10
