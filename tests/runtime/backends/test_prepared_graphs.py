"""Graphs prepared for this CPU: the same numbers, made once, and never of another CPU, version or weights."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from support.runs.cache_runs import source_of

from sdrt.kernels.cache import UNUSED_SECONDS
from sdrt.runtime.backends.onnxruntime_cpu.executor import OnnxRuntimeExecutor
from sdrt.runtime.backends.onnxruntime_cpu.prepared_graphs import GRAPH_NAME, WEIGHTS_NAME, PreparedGraph
from sdrt.runtime.bundle import prepared_folder, verified_files
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.prepared_folder import RECORD_NAME
from sdrt.runtime.cli.main import main
from sdrt.runtime.errors import BackendError
from sdrt.runtime.pipeline import Pipeline

SHORT: dict[str, Any] = {"num_inference_steps": 2, "seed": 1, "output_type": "numpy"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "onnxruntime-cpu"


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, verify=False)


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy whose files are old enough to be remembered."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copied"))


def unet(bundle: Bundle, *, prepared: bool, threads: int = 2) -> OnnxRuntimeExecutor:
    part = bundle.component("unet")
    return OnnxRuntimeExecutor(
        bundle.path / part.model, part.spec, threads=threads, source=source_of(bundle) if prepared else None
    )


def evaluate(executor: OnnxRuntimeExecutor, rows: int) -> Any:
    axes = {"rows": rows, "latent_height": 8, "latent_width": 16, "context": 77}
    generator = np.random.default_rng(0)
    spec = executor.spec
    inputs = {s.name: generator.standard_normal(s.concrete(axes)).astype(s.dtype) for s in spec.inputs}
    outputs = {s.name: np.zeros(s.concrete(axes), s.dtype) for s in spec.outputs}
    executor.bind(inputs, outputs)()
    return outputs["noise_pred"]


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_the_numbers_of_the_plain_graph(cache: Path, bundle: Bundle, rows: int) -> None:
    """Whole and in halves: rows do not know of each other."""
    expected = evaluate(unet(bundle, prepared=False), rows)
    assert expected.any()
    np.testing.assert_array_equal(evaluate(unet(bundle, prepared=True), rows), expected)
    assert len(list(cache.iterdir())) == 1


def test_prepared_once(cache: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    unet(bundle, prepared=True)
    (folder,) = cache.iterdir()
    assert {file.name for file in folder.iterdir()} == {GRAPH_NAME, WEIGHTS_NAME, RECORD_NAME}
    models: list[str] = []
    session = onnxruntime.InferenceSession

    def noted(model: str, **rest: Any) -> Any:
        models.append(model)
        return session(model, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", noted)
    unet(bundle, prepared=True)
    assert models == [str(folder / GRAPH_NAME)]


def test_the_key_holds_what_decides_how_weights_are_packed(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(bundle)
    ort = SimpleNamespace(__version__="1.32.0", get_build_info=lambda: "commit a")
    other_build = SimpleNamespace(__version__="1.32.0", get_build_info=lambda: "commit b")
    other_version = SimpleNamespace(__version__="1.33.0", get_build_info=lambda: "commit a")
    other_weights = replace(source, files=(*source.files[:-1], replace(source.files[-1], sha256="0" * 64)))
    assert prepared_folder.cpu_identity()[0]
    folders = [
        PreparedGraph(ort, source).folder,
        PreparedGraph(other_build, source).folder,
        PreparedGraph(other_version, source).folder,
        PreparedGraph(ort, other_weights).folder,
    ]
    monkeypatch.setattr(prepared_folder, "cpu_identity", lambda: ("x86_64", "", "another CPU"))
    folders.append(PreparedGraph(ort, source).folder)
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize(("version", "prepared"), [("1.31.1", False), ("1.32.0", True), ("2.0.0.dev1", True)])
def test_only_by_versions_that_run_what_they_prepared(
    cache: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, version: str, prepared: bool
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    evaluate(unet(bundle, prepared=True), 2)
    assert cache.exists() == prepared


@pytest.mark.parametrize("name", [GRAPH_NAME, WEIGHTS_NAME, RECORD_NAME])
def test_damaged_ones_are_prepared_anew(cache: Path, bundle: Bundle, name: str) -> None:
    expected = evaluate(unet(bundle, prepared=True), 2)
    (folder,) = cache.iterdir()
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    prepared = PreparedGraph(onnxruntime, source_of(bundle))
    assert not prepared.exists()
    assert prepared.load(onnxruntime.SessionOptions()) is None
    np.testing.assert_array_equal(evaluate(unet(bundle, prepared=True), 2), expected)
    assert prepared.exists()


def _file_in_the_way(cache: Path, _monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.mkdir()
    cache.write_text("")


def _full_disk(_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=prepared_folder.SPARE_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)


@pytest.mark.parametrize("trouble", [_file_in_the_way, _full_disk])
def test_a_cache_that_cannot_be_written(
    cache: Path,
    bundle: Bundle,
    trouble: Callable[[Path, pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = evaluate(unet(bundle, prepared=False), 2)
    trouble(cache, monkeypatch)
    np.testing.assert_array_equal(evaluate(unet(bundle, prepared=True), 2), expected)
    assert not cache.is_dir() or not list(cache.iterdir())


def test_preparing_a_large_graph_is_told(
    cache: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepared_folder, "WORTH_TELLING", 0)
    words = ["x", "--bundle", str(bundle.path), "--steps", "1", "-o", str(cache.parent.parent / "a.png")]
    try:
        for told in (3, 0):  # components; the second time there is nothing to do
            assert main([*words, "--backend", "onnxruntime-cpu"]) == 0
            lines = [line for line in capsys.readouterr().err.splitlines() if "for this CPU, once" in line]
            assert len(lines) == told
            assert all(line.startswith("sd-run: preparing 0.0 GB") and str(cache) in line for line in lines)
    finally:
        logging.getLogger("sdrt").handlers.clear()


def test_one_that_nobody_loaded_for_long_is_removed(cache: Path, bundle: Bundle) -> None:
    unet(bundle, prepared=True)
    (old,) = cache.iterdir()
    mine = cache / "mine"
    mine.mkdir()
    long_ago = time.time() - UNUSED_SECONDS - 60
    for path in (old / RECORD_NAME, mine):
        os.utime(path, (long_ago, long_ago))
    decoder = PreparedGraph(onnxruntime, source_of(bundle, "vae_decoder"))
    assert decoder.make()
    assert set(cache.iterdir()) == {mine, decoder.folder}


def test_altered_weights_are_never_drawn_as_the_prepared_ones(
    cache: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without verification the prepared graph stands in only for files that are known to be unaltered."""
    monkeypatch.setattr(verified_files, "SETTLED_SECONDS", 0.0)
    with Pipeline.load(copied) as pipeline:
        expected = pipeline("x", **SHORT).latents
    assert len(list(cache.iterdir())) == 3
    with Pipeline.load(copied, verify=False) as pipeline:
        np.testing.assert_array_equal(pipeline("x", **SHORT).latents, expected)
    weights = copied / "unet/model.onnx.data"
    before = weights.stat()
    weights.write_bytes(np.frombuffer(weights.read_bytes(), np.float32)[::-1].tobytes())
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # as some tools do
    with Pipeline.load(copied, verify=False) as pipeline:
        assert not np.array_equal(pipeline("x", **SHORT).latents, expected)


def test_a_half_that_fails(cache: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of either is told, and only when both have ended."""
    executor = unet(bundle, prepared=True)
    session = executor._sessions[1]
    ended = threading.Event()

    class Failing:
        def __init__(self, fails: str) -> None:
            self.fails = fails

        def io_binding(self) -> Any:
            return session.io_binding()

        def run_with_iobinding(self, _binding: Any) -> None:
            here = "second" if threading.current_thread().name.startswith("sdrt-half") else "first"
            if here == self.fails:
                raise RuntimeError(f"the {here} half broke")
            time.sleep(0.1)
            ended.set()

    for fails in ("first", "second"):
        ended.clear()
        executor._sessions[1] = Failing(fails)
        with pytest.raises(BackendError, match=f"unet failed: the {fails} half broke"):
            evaluate(executor, 2)
        assert ended.is_set()


# --- which files are known


def test_files_are_hashed_once(copied: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdrt.runtime.bundle import bundle as module

    monkeypatch.setattr(verified_files, "SETTLED_SECONDS", 0.0)
    hashed: list[str] = []

    def noted(stream: BufferedReader) -> tuple[str, verified_files.FileState | None]:
        hashed.append(Path(stream.name).name)
        return verified_files.hashed(stream)

    monkeypatch.setattr(module, "hashed", noted)
    bundle = Bundle.open(copied, verify=False)
    bundle.verify(again=False)
    count = len(hashed)
    assert count == len(list(bundle.manifest.files()))
    bundle.verify(again=False)
    assert len(hashed) == count
    assert bundle.is_verified(bundle.component("unet").files)
    bundle.verify()
    assert len(hashed) == 2 * count
    (copied / "tokenizer.json").touch()
    bundle.verify(again=False)
    assert hashed[2 * count :] == ["tokenizer.json"]


def test_a_file_that_was_changed_just_now_is_not_remembered(copied: Path, cache: Path) -> None:
    (copied / "tokenizer.json").touch()
    bundle = Bundle.open(copied, verify=False)
    bundle.verify(again=False)
    tokenizer = next(entry for entry in bundle.manifest.files() if entry.path == "tokenizer.json")
    assert not bundle.is_verified([tokenizer])
