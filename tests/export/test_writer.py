"""What is settled before the first graph is traced, and how an export prints and writes."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import onnx_ir as ir
import pytest
from support.runs.complaints import complaints

from sdrt.export import manifest as bundle_manifest
from sdrt.export import writer as bundle_writer
from sdrt.export.checkpoint.architectures import open_architecture
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.checkpoint.weights import load_module
from sdrt.export.cli import main as cli
from sdrt.export.graphs.from_module import save_graph
from sdrt.export.manifest import check_manifest, default_size, gate_size, graph_axes
from sdrt.export.options import AxisRange, ExportOptions
from sdrt.export.parity.components import probe_sizes
from sdrt.export.parity.sampling import reference_embeddings, reference_latents
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.errors import CheckpointError


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object; a value of None removes the key."""
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def options(height: AxisRange, width: AxisRange) -> ExportOptions:
    return ExportOptions("fp32", False, AxisRange(1, 2), height, width, 4, 23)


# --- settled before the first trace ---


def limit(value: float | None) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "tokenizer_config.json", model_max_length=value)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the corrections that the pipeline makes
@pytest.mark.parametrize(
    ("change", "length"),
    [
        (limit(10**30), 77),
        (limit(1e30), 77),
        (limit(None), 77),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), 77),
        (limit(64), 64),
    ],
    ids=["10**30", "1e30", "absent", "no file", "64"],
)
def test_graphs_manifest_and_reference_have_one_number_of_tokens(
    checkpoint_copy: Path, change: Callable[[Path], None], length: int
) -> None:
    change(checkpoint_copy / "tokenizer")
    checkpoint = open_checkpoint(str(checkpoint_copy))
    assert checkpoint.sizes()["tokens"] == checkpoint.tokenizer.ids["max_length"] == length
    check_manifest(checkpoint, options(AxisRange(16, 16), AxisRange(16, 16)))
    # The end of an export: diffusers' own pipeline, which pads to what the tokenizer says.
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    embeddings = reference_embeddings(checkpoint)
    assert embeddings["prompt_embeds"].shape[1] == length
    unet = load_module(checkpoint, "unet")
    assert reference_latents(checkpoint, latents, embeddings, unet).shape == latents.shape


@pytest.mark.parametrize(
    ("native", "extent", "expected"),
    [
        (16, AxisRange(16, 32, 4), 16),
        (22, AxisRange(16, 32, 4), 20),  # between two sizes
        (8, AxisRange(16, 32, 4), 16),
        (62, AxisRange(16, 32, 4), 32),
        (22, AxisRange(18, 18, 2), 18),
        (22, AxisRange(22, 22, 2), 22),
    ],
)
def test_the_default_size_is_one_that_the_range_admits(
    checkpoint_copy: Path, native: int, extent: AxisRange, expected: int
) -> None:
    edit(checkpoint_copy / "unet" / "config.json", sample_size=native // 2)
    checkpoint = open_checkpoint(str(checkpoint_copy))
    given = options(extent, extent)
    assert default_size(checkpoint, given) == (expected, expected)
    check_manifest(checkpoint, given)


def test_a_manifest_that_no_reader_takes_costs_no_trace(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_writer, "onnx_from_module", lambda *_: pytest.fail("traced"))
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    with pytest.raises(CheckpointError, match=r"cannot be made a bundle: .*multiples of the factor"):
        bundle_writer.write_bundle(
            checkpoint, tmp_path / "out", options(AxisRange(16, 32, 3), AxisRange(16, 16))
        )
    assert list(tmp_path.iterdir()) == []


def test_a_schedule_of_few_steps_has_a_default_within_it(checkpoint_copy: Path) -> None:
    edit(checkpoint_copy / "scheduler" / "scheduler_config.json", num_train_timesteps=10)
    check_manifest(open_checkpoint(str(checkpoint_copy)), options(AxisRange(16, 16), AxisRange(16, 16)))


def test_a_vae_that_is_no_network_costs_no_trace(
    checkpoint_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bundle_writer, "onnx_from_module", lambda *_: pytest.fail("traced"))
    edit(checkpoint_copy / "vae" / "config.json", norm_num_groups=0)
    assert cli.main([str(checkpoint_copy), str(tmp_path / "out")]) == 4
    printed = capsys.readouterr()
    (line,) = complaints(printed.err)
    assert "describes no network" in line
    assert printed.out == ""


def test_the_native_size_is_compared_too(checkpoint_copy: Path) -> None:
    edit(checkpoint_copy / "unet" / "config.json", sample_size=13)  # 26 pixels
    checkpoint = open_checkpoint(str(checkpoint_copy))
    axes = {"batch": AxisRange(1, 2), "height": AxisRange(16, 32, 4), "latent_height": AxisRange(8, 16, 2)}
    assert probe_sizes(checkpoint, axes) == [
        {"batch": 1, "height": 16, "latent_height": 8},
        {"batch": 2, "height": 20, "latent_height": 10},
        {"batch": 1, "height": 24, "latent_height": 12},
    ]
    assert probe_sizes(checkpoint, {"height": AxisRange(18, 18, 2)}) == [{"height": 18}]
    assert len(probe_sizes(checkpoint, {"batch": AxisRange(1, 2)})) == 2


def test_a_large_model_is_compared_small_on_graphs_that_serve_its_own_size() -> None:
    checkpoint = open_architecture("sd15")
    asked = options(AxisRange(512, 512, 8), AxisRange(320, 640, 64))
    axes = graph_axes(checkpoint, asked)
    assert axes["height"] == AxisRange(128, 512, 64)
    assert axes["latent_height"] == AxisRange(16, 64, 8)
    assert axes["width"] == AxisRange(128, 640, 64)
    assert gate_size(checkpoint, asked) == (128, 128)
    assert probe_sizes(checkpoint, axes, small=True) == [
        {
            "batch": 1,
            "rows": 2,
            "height": 128,
            "width": 128,
            "context": 154,
            "latent_height": 16,
            "latent_width": 16,
        }
    ]
    full = replace(asked, full_parity=True)
    assert graph_axes(checkpoint, full)["height"] == asked.height
    assert gate_size(checkpoint, full) == (512, 512)
    # Sizes that the smaller graphs cannot reach stay as they were asked for.
    asked = options(AxisRange(520, 520, 8), AxisRange(64, 64, 8))
    axes = graph_axes(checkpoint, asked)
    assert (axes["height"], axes["width"]) == (asked.height, asked.width)
    assert gate_size(checkpoint, asked) == (520, 64)


@pytest.mark.parametrize("source", [".", "../checkpoint", "../checkpoint/"])
def test_the_source_is_the_folders_own_name(
    checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(checkpoint_copy)
    assert bundle_manifest._source(open_checkpoint(source)) == "checkpoint"


# --- where OUT cannot be ---


@pytest.mark.parametrize("out", ["x" * 300, "loop", "loop/out", "no/out"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_place_that_cannot_be_is_status_8(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    out: str,
    force: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    assert cli.main(["checkpoint", out, *force]) == 8
    printed = capsys.readouterr()
    assert printed.err.startswith(f"sd-export: cannot write {out}: ")
    assert printed.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_an_empty_out_is_called_empty(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", ""]) == 2
    assert "OUT is empty: give a name" in capsys.readouterr().err


# --- what is printed ---


def nobody() -> TextIO:
    reading_end, writing_end = os.pipe()
    os.close(reading_end)
    return os.fdopen(writing_end, "w")


@pytest.mark.parametrize("reader", ["gone", "ascii", "full"])
def test_what_becomes_of_the_output_never_costs_the_export(
    tiny_checkpoint: Path,
    tmp_path: Path,
    traced_before: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reader: str,
) -> None:
    raw = io.BytesIO()
    streams: dict[str, Callable[[], TextIO]] = {
        "gone": nobody,
        "ascii": lambda: io.TextIOWrapper(raw, encoding="ascii"),
        "full": lambda: os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"),
    }
    out = tmp_path / "Bündel"
    monkeypatch.setenv("SDRT_TRACEBACK", "1")
    with streams[reader]() as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        status = cli.main([str(tiny_checkpoint), str(out), *traced_before])
        printed = raw.getvalue().decode()
    message = capsys.readouterr().err
    assert status == 0, message
    Bundle.open(out)
    full = "sd-export: warning: cannot write to standard output: the disk is full; the export goes on"
    assert complaints(message) == ([full] if reader == "full" else [])
    if reader == "ascii":
        assert r"B\xfcndel: " in printed.splitlines()[-1]
        assert "sampling.latents" in printed


def test_quiet_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []

    def run(_name: str, _body: object, *, quiet: bool) -> int:
        told.append(quiet)
        return 0

    monkeypatch.setattr(cli, "run_command", run)
    for given in ([], ["--quiet"]):
        cli.main(["model", "out", *given])
    assert told == [False, True]


# --- what is written ---


def test_bf16_copies_lie_in_the_unfinished_bundle_and_are_gone_from_the_finished_one(
    tiny_checkpoint: Path,
    tmp_path: Path,
    traced_before: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved: list[Path] = []

    def noted(model: ir.Model, path: Path) -> tuple[Path, ...]:
        saved.append(path)
        return save_graph(model, path)

    monkeypatch.setattr(bundle_writer, "save_graph", noted)
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    # The traced graphs are fp32: enough for the places of the files, not for a sampling run.
    monkeypatch.setattr(bundle_writer, "check_sampling", lambda *_: None)
    out = tmp_path / "out"
    assert cli.main([str(tiny_checkpoint), str(out), "--quiet", "--dtype", "bf16", *traced_before]) == 0
    assert len({path for path in saved if path.parents[1].name == "widened"}) == 4
    assert all(path.is_relative_to(tmp_path) for path in saved)
    assert not (out / "widened").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["save_graph", "tokenizer.json"])
def test_a_write_that_fails_is_status_8_and_names_out(
    tiny_checkpoint: Path,
    tmp_path: Path,
    traced_before: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    def fail(*_: object) -> Any:
        raise OSError(28, "No space left on device")

    if name == "save_graph":
        monkeypatch.setattr(bundle_writer, name, fail)
    else:
        write = Path.write_bytes
        monkeypatch.setattr(
            Path, "write_bytes", lambda path, data: fail() if "json" in path.name else write(path, data)
        )
    out = tmp_path / "out"
    assert cli.main([str(tiny_checkpoint), str(out), "--quiet", *traced_before]) == 8
    assert capsys.readouterr().err == f"sd-export: cannot write {out}: the disk is full\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("chunks", [1, 3])
def test_chunks_of_prompts_are_an_axis_and_a_limit(tiny_checkpoint: Path, chunks: int) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    asked = replace(options(AxisRange(16, 16), AxisRange(16, 16)), chunks=chunks)
    assert graph_axes(checkpoint, asked)["context"] == AxisRange(77, 77 * chunks, 77)
    assert bundle_manifest.draft_manifest(checkpoint, asked, []).limits.max_chunks == chunks
