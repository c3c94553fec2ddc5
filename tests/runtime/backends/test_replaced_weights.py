"""Other weights in a component that is loaded, as a LoRA asks for: exactly, and without an export."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from support.runs.cache_runs import source_of
from support.runs.onnx_runs import with_weights

from sdrt.runtime.backends.executor import Executor
from sdrt.runtime.backends.onnxruntime_cpu.executor import OnnxRuntimeExecutor
from sdrt.runtime.backends.openvino_cpu.executor import OpenVinoExecutor
from sdrt.runtime.backends.openvino_cpu.models import ModelFile
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.errors import BackendError

Array = NDArray[Any]
Weights = dict[str, Array]
EMOJI: Final = Path(__file__).parents[3] / "models/emoji/bundle"
LARGEST: Final = 0.02  # what is added to a weight


@pytest.fixture(scope="module")
def emoji() -> Bundle:
    return Bundle.open(EMOJI, verify=False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Graphs are prepared once for the tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("SDRT_CACHE", str(folder))
        yield folder


def changed(
    bundle: Bundle, component: str, wanted: Callable[[str], bool] = lambda _: True, seed: int = 0
) -> Weights:
    """Initializer → its numbers and a little more, in float32, of those tensors of the checkpoint."""
    graph = onnx.load(bundle.path / component / "model.onnx")
    own = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    generator = np.random.default_rng(seed)
    tensors = json.loads((bundle.path / "weights.json").read_text())["tensors"]
    return {
        holder["initializer"]: own[holder["initializer"]].astype(np.float32)
        + generator.uniform(-LARGEST, LARGEST, holder["shape"]).astype(np.float32)
        for folder in tensors.values()
        for name, tensor in folder.items()
        for holder in tensor["held_by"]
        if holder["component"] == component and wanted(name)
    }


def merged(bundle: Bundle, component: str, weights: Mapping[str, Array], folder: Path) -> Path:
    """A graph that has these weights from the beginning."""
    return with_weights(bundle.path / component / "model.onnx", weights, folder / "merged.onnx")


class Bound:
    """A component's call on buffers of some rows."""

    def __init__(self, executor: Executor, rows: int = 1) -> None:
        axes = {"batch": rows, "rows": rows, "context": 77}
        axes |= {"latent_height": 16, "latent_width": 8, "height": 64, "width": 32}
        generator = np.random.default_rng(5)
        spec = executor.spec
        inputs = {s.name: generator.standard_normal(s.concrete(axes)).astype(s.dtype) for s in spec.inputs}
        self.outputs = {s.name: np.zeros(s.concrete(axes), s.dtype) for s in spec.outputs}
        self._call = executor.bind(inputs, self.outputs)

    def __call__(self) -> Array:
        self._call()
        return np.concatenate([array.reshape(-1) for array in self.outputs.values()])


def loaded(bundle: Bundle, component: str = "unet", *, prepared: bool = True) -> OnnxRuntimeExecutor:
    part = bundle.component(component)
    source = source_of(bundle, component) if prepared else None
    return OnnxRuntimeExecutor(bundle.path / part.model, part.spec, threads=2, source=source)


def attention(name: str) -> bool:
    return "attn" in name and name.endswith(".weight")


def everything(_name: str) -> bool:
    return True


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize(
    ("component", "wanted"),
    [("unet", attention), ("unet", everything), ("text_encoder", everything), ("vae_encoder", everything)],
)
def test_the_numbers_of_a_graph_that_was_exported_with_them(
    emoji: Bundle,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    component: str,
    wanted: Callable[[str], bool],
    prepared: bool,
) -> None:
    """Bit for bit: matrices, kernels in blocks of channels, biases, norms, embeddings."""
    weights = changed(emoji, component, wanted)
    assert len(weights) > 30
    executor = loaded(emoji, component, prepared=prepared)
    evaluate = Bound(executor)
    own = evaluate()
    with caplog.at_level(logging.INFO, "sdrt"):
        executor.replace_weights(weights)
    assert ("anew, with other weights" in caplog.text) == (not prepared)
    spec = emoji.component(component).spec
    exported = OnnxRuntimeExecutor(merged(emoji, component, weights, tmp_path), spec, threads=2)
    got = evaluate()
    assert not np.array_equal(got, own)
    np.testing.assert_array_equal(got, Bound(exported)())
    executor.replace_weights({})
    np.testing.assert_array_equal(evaluate(), own)


@pytest.mark.usefixtures("cache")
def test_in_and_out_again(emoji: Bundle) -> None:
    """A set replaces the one before, whatever that named; bindings made before and after have it."""
    one, other = changed(emoji, "unet", attention), changed(emoji, "unet", lambda name: ".conv1." in name, 1)
    assert not one.keys() & other.keys()
    executor = loaded(emoji)
    before = [Bound(executor, rows) for rows in (2, 3)]  # in halves, and whole
    seen: dict[str, list[Array]] = {"none": [call() for call in before]}
    for name, weights in (("one", one), ("other", other), ("one", one), ("none", {}), ("other", other)):
        executor.replace_weights(weights)
        got = [call() for call in before]
        for first, second in zip(seen.setdefault(name, got), got, strict=True):
            np.testing.assert_array_equal(first, second)
        for rows, first in zip((2, 3), got, strict=True):
            np.testing.assert_array_equal(Bound(executor, rows)(), first)
    for index in range(2):
        assert len({results[index].tobytes() for results in seen.values()}) == len(seen)


def test_what_cannot_be_loaded_changes_nothing(emoji: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for what is bound afterwards."""
    executor = loaded(emoji, "text_encoder", prepared=False)
    call = Bound(executor)
    executor.replace_weights(changed(emoji, "text_encoder", attention))
    wanted = call()

    def fail(_threads: int) -> None:
        raise BackendError("no room")

    monkeypatch.setattr(executor, "_load", fail)
    with pytest.raises(BackendError, match="no room"):
        executor.replace_weights({})
    for bound in (call, Bound(executor)):
        np.testing.assert_array_equal(bound(), wanted)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("component", ["text_encoder", "unet"])
def test_openvino(emoji: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, component: str) -> None:
    """As compiled from a graph that was exported with them; in and out again, before and after a binding."""
    one, other = changed(emoji, component), changed(emoji, component, attention, 1)
    part = emoji.component(component)
    source = source_of(emoji, component)
    executor = OpenVinoExecutor(emoji.path / part.model, part.spec, threads=2, source=source)
    evaluate = Bound(executor)
    own = evaluate()
    executor.replace_weights(one)
    got = evaluate()
    exported = OpenVinoExecutor(merged(emoji, component, one, tmp_path), part.spec, threads=2)
    np.testing.assert_array_equal(got, Bound(exported)())
    executor.replace_weights(other)
    assert len({own.tobytes(), got.tobytes(), evaluate().tobytes()}) == 3
    compiled: list[object] = []
    monkeypatch.setattr(ModelFile, "compiled", lambda *given: compiled.append(given))  # sets that it knows
    executor.replace_weights(one)
    np.testing.assert_array_equal(evaluate(), got)
    with pytest.raises(BackendError, match="has no initializer 'nothing'"):
        executor.replace_weights({"nothing": np.zeros(1, np.float32)})
    np.testing.assert_array_equal(evaluate(), got)
    executor.replace_weights({})
    np.testing.assert_array_equal(evaluate(), own)
    assert not compiled
    monkeypatch.undo()
    executor.replace_weights(changed(emoji, component, attention, 2))
    del evaluate  # with the last binding what was compiled goes, too
    gc.collect()
    executor.replace_weights(one)
    np.testing.assert_array_equal(Bound(executor)(), got)


@pytest.mark.usefixtures("cache")
def test_calls_outlive_the_executor_and_the_arrays(emoji: Bundle) -> None:
    executor = loaded(emoji)
    executor.replace_weights(changed(emoji, "unet", everything))
    evaluate = Bound(executor)
    first = evaluate()
    del executor
    gc.collect()
    np.testing.assert_array_equal(evaluate(), first)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"val_0000": np.zeros(3, np.float32)}, "has no initializer 'val_0000'; the bundle's weight map"),
        ({"model.conv_in.bias": np.zeros(3, np.float32)}, r"is float32\[48\], given float32\[3\]"),
        ({"model.conv_in.bias": np.zeros(48, np.float16)}, r"is float32\[48\], given float16\[48\]"),
    ],
)
def test_weights_that_the_graph_does_not_have(emoji: Bundle, weights: Weights, words: str) -> None:
    """An error, and the weights are as they were."""
    executor = loaded(emoji)
    evaluate = Bound(executor)
    executor.replace_weights(changed(emoji, "unet", attention))
    before = evaluate()
    with pytest.raises(BackendError, match=words):
        executor.replace_weights(weights)
    np.testing.assert_array_equal(evaluate(), before)
