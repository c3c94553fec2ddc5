"""The parity gate of engines, on a machine that has a GPU only in its imagination."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt.export.engines import compare as engine_compare
from sdrt.export.engines.compare import NO_GPU, compare_engine, random_inputs, tolerance
from sdrt.export.engines.options import EngineOptions
from sdrt.export.engines.writer import engine_key
from sdrt.runtime.backends.executor import Executor, FixedWeights
from sdrt.runtime.backends.registry import load_executor
from sdrt.runtime.bundle.bundle import EMBEDDED, Bundle
from sdrt.runtime.bundle.engines import ENGINE_NAME, EngineManifest, engine_to_json
from sdrt.runtime.bundle.manifest import FileEntry
from sdrt.runtime.devices.device import Device
from sdrt.runtime.devices.gpu.discovery import Gpu
from sdrt.runtime.devices.host import HostDevice
from sdrt.runtime.errors import BackendError, ParityError

FLAVOUR = "tensorrt-rtx"


class Off(FixedWeights):
    """The graph on ONNX Runtime, posing as an engine whose outputs are off by a factor."""

    def __init__(self, executor: Executor, factor: float) -> None:
        self.spec, self._executor, self._factor = executor.spec, executor, factor
        self.capturable = True

    def bind(self, inputs: Any, outputs: Any) -> Any:
        run = self._executor.bind(inputs, outputs)

        def call() -> None:
            run()
            for array in outputs.values():
                array *= self._factor

        return call


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(EMBEDDED, verify=False)


@pytest.fixture
def engine(bundle: Bundle, tmp_path: Path) -> EngineManifest:
    """An engine's unfinished folder: a plan that nobody reads, and its manifest."""
    key = engine_key(bundle, "vae_decoder", EngineOptions(FLAVOUR), "1.7", ("8.0+",))
    (tmp_path / "model.plan").write_bytes(b"plan")
    manifest = EngineManifest(key, (FileEntry("model.plan", 4, "0" * 64),))
    (tmp_path / ENGINE_NAME).write_text(engine_to_json(manifest))
    return manifest


def imagine_gpu(
    monkeypatch: pytest.MonkeyPatch, factor: float, capability: tuple[int, int] = (8, 6)
) -> list[tuple[str, Bundle]]:
    """A GPU whose engines are `Off`; returns what is loaded, from which bundle."""
    loaded: list[tuple[str, Bundle]] = []

    def load(bundle: Bundle, component: str, *, backend: str, device: Device) -> Any:
        loaded.append((backend, bundle))
        executor = load_executor(bundle, component, backend="onnxruntime-cpu", device=HostDevice())
        return Off(executor, factor) if backend == FLAVOUR else executor

    monkeypatch.setattr(engine_compare, "find_gpu", lambda: Gpu(0, "an imagined GPU", capability))
    monkeypatch.setattr(engine_compare, "open_device", lambda _choice: HostDevice())
    monkeypatch.setattr(engine_compare, "load_executor", load)
    return loaded


def test_without_a_gpu_the_report_says_so(
    bundle: Bundle, engine: EngineManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Gpu:
        raise BackendError("no NVIDIA driver")

    monkeypatch.setattr(engine_compare, "find_gpu", none)
    assert compare_engine(bundle, "vae_decoder", tmp_path, engine) == NO_GPU


def test_an_engine_that_agrees_passes_with_its_figures(
    bundle: Bundle, engine: EngineManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = imagine_gpu(monkeypatch, 1 + 1e-6)
    before = sorted(tmp_path.iterdir())
    figures = compare_engine(bundle, "vae_decoder", tmp_path, engine)
    assert isinstance(figures, list)
    (figure,) = figures
    assert figure["output"] == "image"
    assert figure["relative_l2"] == pytest.approx(1e-6, rel=0.2)
    assert figure["tolerance"] == tolerance(bundle, "vae_decoder")
    assert [name for name, _ in loaded] == [FLAVOUR, "onnxruntime-cpu"]
    # The engine was opened in a bundle of its own, which is gone; the bundle itself was not touched.
    assert all(view.path.parent == tmp_path for _, view in loaded)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("factor", [1.001, 0.0, float("nan")])
def test_an_engine_that_disagrees_is_an_error(
    bundle: Bundle, engine: EngineManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    imagine_gpu(monkeypatch, factor)
    with pytest.raises(ParityError, match=r"engine of the vae_decoder differs .* image at batch 1\.\.8"):
        compare_engine(bundle, "vae_decoder", tmp_path, engine)
    assert {file.name for file in tmp_path.iterdir()} == {ENGINE_NAME, "model.plan"}


def test_an_engine_for_another_gpu_is_not_compared(
    bundle: Bundle, engine: EngineManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert imagine_gpu(monkeypatch, 1.0, capability=(7, 5)) == []
    said = compare_engine(bundle, "vae_decoder", tmp_path, engine)
    assert said == "not built for the GPU of this machine, an imagined GPU"


def test_the_tolerance_is_twice_that_of_the_export(bundle: Bundle) -> None:
    recorded = {
        figure["tolerance"] for figure in bundle.manifest.parity["figures"] if figure["component"] == "unet"
    }
    assert tolerance(bundle, "unet") == 2 * max(recorded)


def test_a_bundle_without_figures_cannot_be_judged(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="records no parity figures of its text_encoder_2"):
        tolerance(bundle, "text_encoder_2")


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_inputs_are_those_of_real_use_and_the_same_every_time(bundle: Bundle, component: str) -> None:
    sizes = {"batch": 2, "rows": 4, "latent_height": 16, "latent_width": 24, "height": 64, "width": 96}
    sizes["context"] = 77
    first, again = (random_inputs(bundle, component, sizes) for _ in range(2))
    for entry in bundle.component(component).spec.inputs:
        array = first[entry.name]
        assert array.shape == entry.concrete(sizes)
        assert array.dtype == entry.dtype
        assert np.array_equal(array, again[entry.name])
        low, high = float(array.min()), float(array.max())
        assert low < high or array.size == 1
        ids = (-1, bundle.manifest.tokenizers[0].bos - 1)
        limits = {"input_ids": ids, "timestep": (0, 999), "image": (-1, 1), "clip_skip": (0, 1)}
        least, most = limits.get(entry.name, (-6, 6))
        assert least <= low <= high <= most
