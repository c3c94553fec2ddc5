"""OpenVINO on the CPU: the numbers of ONNX Runtime, and nothing of a call before in those of the next."""

from __future__ import annotations

import gc
import itertools
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.runs.cache_runs import flip_byte, source_of
from support.runs.openvino_runs import assert_close, buffers, expected, openvino

from sdrt.runtime.backends.openvino_cpu import models as openvino_models
from sdrt.runtime.backends.openvino_cpu.executor import OpenVinoExecutor
from sdrt.runtime.backends.openvino_cpu.library import import_openvino
from sdrt.runtime.backends.openvino_cpu.models import Kept
from sdrt.runtime.bundle import verified_files
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.prepared_folder import RECORD_NAME, Source
from sdrt.runtime.errors import BackendError, BundleError
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.system.c_library import signal_stack
from tolerances import TASK_RUN

SHORT: dict[str, Any] = {"num_inference_steps": 3, "seed": 1, "output_type": "numpy"}


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, verify=False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino-cpu"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_unet(tiny: Bundle, rows: int, threads: int) -> None:
    """Whole, and as two streams where rows and threads are even."""
    inputs, outputs = buffers(tiny, rows=rows)
    openvino(tiny, threads=threads).bind(inputs, outputs)()
    assert_close(outputs, expected(tiny, inputs, outputs))


@pytest.mark.parametrize(
    ("component", "axes"),
    [
        ("text_encoder", {}),
        ("text_encoder", {"batch": 2}),
        ("vae_decoder", {}),
        ("vae_decoder", {"batch": 2, "latent_width": 8, "width": 16}),
        ("vae_encoder", {"batch": 3}),
        ("unet", {"latent_height": 16, "context": 154}),
    ],
)
def test_components_and_shapes(tiny: Bundle, component: str, axes: dict[str, int]) -> None:
    inputs, outputs = buffers(tiny, component, **axes)
    openvino(tiny, component, threads=2).bind(inputs, outputs)()
    assert_close(outputs, expected(tiny, inputs, outputs, component))


def test_output_that_nobody_wants(tiny: Bundle) -> None:
    inputs, outputs = buffers(tiny, "text_encoder")
    wanted = expected(tiny, inputs, outputs, "text_encoder")
    outputs.pop("penultimate_hidden_state")
    openvino(tiny, "text_encoder").bind(inputs, outputs)()
    assert_close(outputs, {"last_hidden_state": wanted["last_hidden_state"]})


# --- what is not computed at every call


@pytest.mark.parametrize("rows", [1, 2])
def test_inputs_that_are_changed_in_place(tiny: Bundle, rows: int) -> None:
    """Contexts and timesteps that come back, one row of a context, and a timestep by the least step."""
    inputs, outputs = buffers(tiny, rows=rows)
    others, _ = buffers(tiny, rows=rows, seed=1)
    evaluate = openvino(tiny, threads=2).bind(inputs, outputs)
    first = {name: array.copy() for name, array in inputs.items()}
    changes: list[tuple[str, Any]] = [
        ("encoder_hidden_states", others["encoder_hidden_states"]),
        ("timestep", others["timestep"]),
        ("timestep", first["timestep"]),
        ("encoder_hidden_states", first["encoder_hidden_states"]),
        ("sample", others["sample"]),
    ]
    seen = []
    for name, array in changes:
        inputs[name][...] = array
        evaluate()
        assert_close(outputs, expected(tiny, inputs, outputs))
        seen.append(outputs["noise_pred"].copy())
    assert not any(np.array_equal(one, other) for one, other in itertools.pairwise(seen))
    inputs["encoder_hidden_states"][-1, -1, -1] += 1.0
    evaluate()
    assert_close(outputs, expected(tiny, inputs, outputs))
    assert not np.array_equal(outputs["noise_pred"], seen[-1])


def test_two_bindings_in_turns(tiny: Bundle) -> None:
    """They share what is compiled and the timesteps that were seen, and nothing else."""
    executor = openvino(tiny, threads=2)
    bound = []
    for seed in (0, 1):
        inputs, outputs = buffers(tiny, seed=seed)
        bound.append((inputs, outputs, executor.bind(inputs, outputs)))
    for _ in range(3):
        for inputs, outputs, evaluate in bound:
            outputs["noise_pred"].fill(0)
            evaluate()
            assert_close(outputs, expected(tiny, inputs, outputs))


def part_runs(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Filled with the inputs of each part that really runs."""
    from sdrt.runtime.backends.openvino_cpu import executor as executor_openvino

    runs: list[Sequence[str]] = []
    real = executor_openvino._BoundPart

    class Counting(real):  # type: ignore[misc, valid-type]
        def __init__(self, ov: Any, part: Any, inputs: Any) -> None:
            super().__init__(ov, part, inputs)
            request = vars(self)["_request"]

            class Request:
                def start_async(self) -> None:
                    runs.append(part.inputs)
                    request.start_async()

                def wait(self) -> None:
                    request.wait()

            self._request = Request()

    monkeypatch.setattr(executor_openvino, "_BoundPart", Counting)
    return runs


def test_what_is_computed_once(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = part_runs(monkeypatch)
    inputs, outputs = buffers(tiny)
    evaluate = openvino(tiny, threads=2).bind(inputs, outputs)
    for picture in range(2):
        for timestep in (900.0, 500.0, 100.5):
            inputs["timestep"][...] = timestep
            evaluate()
        inputs["encoder_hidden_states"] += 1.0
        assert runs.count(("timestep",)) == 3  # the second stream, and the second picture, know them
        assert runs.count(("encoder_hidden_states",)) == 2 * (picture + 1)


def test_most_of_a_unet_runs_at_every_call(tiny: Bundle) -> None:
    """Of what is cut out no result is larger than what it saves, nor is anything a mere copy of an input."""
    ov = import_openvino()
    file = openvino_models.ModelFile(ov, *_unet_file(tiny), None)
    sizes = tuple((name, array.shape) for name, array in buffers(tiny, rows=1)[0].items())
    compiled = file.compiled(openvino_models.CompileTarget(sizes, 1, 1))
    context, time_ = compiled.parts
    assert (context.inputs, time_.inputs) == (("encoder_hidden_states",), ("timestep",))
    attentions = 8  # of the tiny U-Net: four blocks, two of them with attention, some with two layers
    assert len(context.results) % 2 == 0
    assert 0 < len(context.results) <= 2 * attentions
    assert {port.get_any_name() for port in compiled.main.inputs} == {
        "sample",
        *context.results,
        *time_.results,
    }


def _unet_file(bundle: Bundle) -> tuple[Path, Any]:
    part = bundle.component("unet")
    return bundle.path / part.model, part.spec


def test_kept_results_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_models, "MOST_KEPT", 24)
    monkeypatch.setattr(openvino_models, "SMALL_INPUTS", 2)
    kept = Kept()
    array = np.zeros(1)
    for key in (b"a", b"b", b"c"):
        kept.put(key, array + ord(key))
    assert kept.get(b"a") is not None  # asked for: b is the oldest now
    kept.put(b"d", array)
    kept.put(b"long", array)
    assert [kept.get(key) is not None for key in (b"a", b"b", b"c", b"d", b"long")] == [
        True,
        False,
        True,
        True,
        False,
    ]
    found = kept.get(b"c")
    assert found is not None
    assert found[0] == ord(b"c")


# --- compiled models that are kept from run to run


def test_compiled_once(cache: Path, tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tiny)
    inputs, outputs = buffers(tiny)
    openvino(tiny, source=source, threads=2).bind(inputs, outputs)()
    wanted = outputs["noise_pred"].copy()
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(openvino_models.ModelFile, "read", lambda self: pytest.fail("the graph was read"))
    outputs["noise_pred"].fill(0)
    openvino(tiny, source=source, threads=2).bind(inputs, outputs)()
    np.testing.assert_array_equal(outputs["noise_pred"], wanted)


def test_a_place_for_all_that_decides_what_is_compiled(
    cache: Path, tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tiny)
    ov = import_openvino()

    other_weights = replace(source, files=(*source.files[:-1], replace(source.files[-1], sha256="0" * 64)))

    def place(threads: int = 2, rows: int = 1, source: Source = source) -> Path:
        file = openvino_models.ModelFile(ov, *_unet_file(tiny), source)
        sizes = tuple((name, array.shape) for name, array in buffers(tiny, rows=rows)[0].items())
        return file._place(source, openvino_models.CompileTarget(sizes, 1, threads)).path

    places = [
        place(),
        place(threads=1),
        place(rows=2),
        place(source=other_weights),
    ]
    monkeypatch.setattr(ov, "get_version", lambda: "another")
    places.append(place())
    monkeypatch.setattr("sdrt.runtime.bundle.prepared_folder.cpu_identity", lambda: ("x86_64", "another CPU"))
    places.append(place())
    assert len(set(places)) == len(places)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file: Path) -> None:
    flip_byte(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [_cut, _flip])
@pytest.mark.parametrize("name", [openvino_models.MAIN, openvino_models.LAYOUT, "part-0.blob", RECORD_NAME])
def test_damaged_ones_are_compiled_anew(
    cache: Path, tiny: Bundle, name: str, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified_files, "SETTLED_SECONDS", 0.0)  # what was hashed is remembered
    source = source_of(tiny)
    inputs, outputs = buffers(tiny)
    openvino(tiny, source=source).bind(inputs, outputs)()
    wanted = outputs["noise_pred"].copy()
    (folder,) = cache.iterdir()
    damage(folder / name)
    damaged = (folder / name).read_bytes()
    openvino(tiny, source=source).bind(inputs, outputs)()
    np.testing.assert_array_equal(outputs["noise_pred"], wanted)
    assert (folder / name).read_bytes() != damaged
    assert [file.name for file in cache.iterdir()] == [folder.name]


def test_without_verified_files_there_is_no_cache(cache: Path, tiny: Bundle) -> None:
    inputs, outputs = buffers(tiny)
    openvino(tiny).bind(inputs, outputs)()
    assert not cache.exists()


def test_large_models_are_not_kept(cache: Path, tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_models, "MOST_BYTES", 1000)
    inputs, outputs = buffers(tiny)
    openvino(tiny, source=source_of(tiny)).bind(inputs, outputs)()
    assert outputs["noise_pred"].any()
    assert not cache.exists()


def test_altered_weights_are_never_drawn_as_the_kept_ones(
    cache: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(tiny_bundle, tmp_path / "copied"))
    monkeypatch.setattr(verified_files, "SETTLED_SECONDS", 0.0)
    with Pipeline.load(copied, backend="openvino-cpu") as pipeline:
        wanted = pipeline("x", **SHORT).latents
    kept = len(list(cache.iterdir()))
    assert kept == 3
    weights = copied / "unet/model.onnx.data"
    weights.write_bytes(np.frombuffer(weights.read_bytes(), np.float32)[::-1].tobytes())
    with Pipeline.load(copied, backend="openvino-cpu", verify=False) as pipeline:
        assert not np.array_equal(pipeline("x", **SHORT).latents, wanted)
    assert len(list(cache.iterdir())) == kept
    with pytest.raises(BundleError, match="altered or damaged"):
        Pipeline.load(copied, backend="openvino-cpu")


# --- what is refused


def test_graph_that_is_refused(tmp_path: Path, tiny: Bundle) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"OpenVINO refuses .*model\.onnx: ") as caught:
        OpenVinoExecutor(model, tiny.component("unet").spec)
    assert "\n" not in str(caught.value)
    assert "Exception from" not in str(caught.value)


def test_shape_that_the_graph_does_not_admit(tiny: Bundle) -> None:
    inputs, outputs = buffers(tiny, latent_width=3)  # halved and doubled again it is 4
    with pytest.raises(BackendError, match=r"OpenVINO cannot compile .*: ") as caught:
        openvino(tiny).bind(inputs, outputs)
    assert "\n" not in str(caught.value)


def test_openvino_that_is_not_installed(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(
        BackendError, match=r"openvino-cpu needs the package .*pip install 'sdrt\[openvino\]'"
    ):
        openvino(tiny)


def waiting_for(tiny: Bundle, on_wait: Callable[[int, int], None]) -> tuple[Callable[[], None], list[int]]:
    """A call on two streams of stand-ins, and their numbers as they are waited for.

    ``on_wait`` gets the number of a stream, and how many waits there were with this one.
    """
    evaluate: Any = openvino(tiny, threads=2).bind(*buffers(tiny))
    waited: list[int] = []

    class Request:
        def __init__(self, number: int) -> None:
            self.number = number

        def start_async(self) -> None: ...

        def wait(self) -> None:
            waited.append(self.number)
            on_wait(self.number, len(waited))

    for number, stream in enumerate(evaluate._streams):
        stream.request = Request(number)
    return evaluate, waited


@pytest.mark.parametrize("fails", [0, 1])
def test_a_stream_that_fails(tiny: Bundle, fails: int) -> None:
    """Its error is told when both have ended: until then they write into the buffers."""

    def on_wait(number: int, _waits: int) -> None:
        if number == fails:
            raise RuntimeError("Exception from src/inference/src/cpp/infer_request.cpp:244:\nit broke")

    evaluate, waited = waiting_for(tiny, on_wait)
    with pytest.raises(BackendError, match=r"^unet failed: it broke$"):
        evaluate()
    assert waited == [0, 1]


def test_an_interrupt_between_two_streams(tiny: Bundle) -> None:
    """The next call finds both at rest."""

    def on_wait(_number: int, waits: int) -> None:
        if waits == 1:
            raise KeyboardInterrupt

    evaluate, waited = waiting_for(tiny, on_wait)
    with pytest.raises(KeyboardInterrupt):
        evaluate()
    assert waited == [0, 0, 1]


# --- whole pictures


def test_a_picture(tiny_bundle: Path) -> None:
    """Of the other backend of the CPU, guided for a part of the steps, more than one at a time."""
    drawn = {}
    for backend in ("onnxruntime-cpu", "openvino-cpu"):
        with Pipeline.load(tiny_bundle, backend=backend, threads=2) as pipeline:
            first = pipeline(["x", "y"], guidance_interval=(0.0, 0.7), **SHORT)
            pipeline("z", **{**SHORT, "num_inference_steps": 4})
            again = pipeline(["x", "y"], guidance_interval=(0.0, 0.7), **SHORT)
        np.testing.assert_array_equal(first.latents, again.latents)
        drawn[backend] = first
    one, other = (drawn[backend].latents for backend in ("onnxruntime-cpu", "openvino-cpu"))
    assert np.abs(one - other).max() < TASK_RUN * np.abs(one).max()
    pictures = [np.stack(drawn[backend].images).astype(int) for backend in drawn]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_signals_are_handled_where_they_were(tiny: Bundle) -> None:
    """OpenVINO gives the thread that compiles a signal stack, and frees it with the model."""
    before = signal_stack()
    for rows in (1, 2):
        ov = import_openvino()
        file = openvino_models.ModelFile(ov, *_unet_file(tiny), None)
        sizes = tuple((name, array.shape) for name, array in buffers(tiny, rows=rows)[0].items())
        compiled = file.compiled(openvino_models.CompileTarget(sizes, 1, 1))
        del file, compiled
        gc.collect()
        after = signal_stack()
        assert (after.sp, after.flags, after.size) == (before.sp, before.flags, before.size)
