"""``sd-export`` as a whole: what a bundle records, what bad options and accidents leave behind."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.runs.complaints import complaints

import sdrt
from sdrt.export import writer as bundle_writer
from sdrt.export.cli import main as cli
from sdrt.export.manifest import TOOLS
from sdrt.runtime.admission import records as admission
from sdrt.runtime.bundle.bundle import Bundle, sha256
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.bundle.manifest import FORMAT_VERSION
from sdrt.runtime.pipeline import Pipeline

# An export in a process of its own that takes the tracer's graphs from a bundle made before, as the fixture
# `traced_before` does, and may write no file of more than `limit` bytes (0: no limit).
QUICK = """
import resource, sys, onnx_ir
from pathlib import Path
from sdrt.export import writer as bundle_writer
from sdrt.export.cli import main as cli
from sdrt.export.manifest import TOOLS
bundle, limit, *arguments = sys.argv[1:]
traced = lambda spec: onnx_ir.load(Path(bundle) / spec.name / "model.onnx")
bundle_writer.onnx_from_module = lambda _module, _args, spec, *_: traced(spec)
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
sys.exit(cli.main(arguments))
"""


def manifest_of(bundle: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    return document


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def abandoned(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A child process whose output is read line by line; never outlives the block."""
    child = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        with child:
            yield child
    finally:
        child.kill()


def wait_for_line(child: subprocess.Popen[str], ending: str) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.rstrip().endswith(ending):
            return
    assert child.stderr is not None
    pytest.fail(f"the export ended before {ending!r}: {child.stderr.read()}")


# --- what a bundle records ---


def test_every_file_is_named_with_its_size_and_hash(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)  # compares sizes and hashes
    named = {entry.path for entry in bundle.manifest.files()}
    assert named | {"manifest.json"} == set(contents(tiny_bundle))
    for entry in bundle.manifest.files():
        assert entry.size == (tiny_bundle / entry.path).stat().st_size
        assert entry.sha256 == sha256(tiny_bundle / entry.path)


def test_the_manifest_describes_the_checkpoint(tiny_bundle: Path) -> None:
    manifest = manifest_of(tiny_bundle)
    assert manifest["format"] == "sdrt-bundle"
    assert manifest["format_version"] == FORMAT_VERSION
    assert manifest["family"] == "sd"
    assert list(manifest["components"]) == list(FAMILIES["sd"].components)
    assert manifest["latents"] == {"channels": 4, "factor": 2}
    assert manifest["schedule"] == {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "set_alpha_to_one": False,
    }
    assert manifest["text_output"] == "last_hidden_state"
    assert manifest["defaults"] == {
        "height": 16,
        "width": 16,
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "sampler": "dpmpp_2m",
        "sampler_options": {},
    }
    side = {"minimum": 16, "maximum": 32, "multiple": 4}
    text = {"max_chunks": 4, "max_clip_skip": 1}
    assert manifest["limits"] == {"min_batch": 1, "max_batch": 2, "height": side, "width": side, **text}
    tokenizer = {key: manifest["tokenizers"][0][key] for key in ("max_length", "bos", "eos", "pad")}
    assert tokenizer == {"max_length": 77, "bos": 712, "eos": 713, "pad": 713}


def test_the_manifest_says_where_the_bundle_comes_from(tiny_bundle: Path) -> None:
    provenance = manifest_of(tiny_bundle)["provenance"]
    assert provenance["source"] == "tiny"  # the folder's name, not where it lay
    assert re.fullmatch(r"[0-9a-f]{64}", provenance["source_sha256"])
    assert provenance["licence"] == "unknown"
    assert provenance["sdrt"] == sdrt.__version__
    assert set(provenance["versions"]) == set(TOOLS)
    assert all(provenance["versions"].values())
    assert provenance["export_seconds"] > 0


def test_an_fp16_bundle_of_one_size_says_so(fp16_bundle: Path) -> None:
    manifest = manifest_of(fp16_bundle)
    assert {part["precision"] for part in manifest["components"].values()} == {"fp16"}
    inputs = {entry["name"]: entry["dtype"] for entry in manifest["components"]["unet"]["inputs"]}
    assert inputs == {"sample": "float16", "timestep": "float32", "encoder_hidden_states": "float16"}
    assert manifest["limits"] == {
        "min_batch": 1,
        "max_batch": 1,
        "height": {"minimum": 18, "maximum": 18, "multiple": 2},
        "width": {"minimum": 16, "maximum": 16, "multiple": 2},
        "max_chunks": 4,
        "max_clip_skip": 1,
    }
    assert (manifest["defaults"]["height"], manifest["defaults"]["width"]) == (18, 16)


def test_an_fp16_bundle_of_one_size_draws(fp16_bundle: Path) -> None:
    result = Pipeline.load(fp16_bundle)(["a", "b"], num_inference_steps=2, seed=1)
    assert [image.size for image in result.images] == [(16, 18)] * 2


def test_source_and_licence_follow_the_checkpoint(
    checkpoint_copy: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    traced_before: Sequence[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    card = "---\nlanguage: en\nlicense: creativeml-openrail-m\n---\n# A card\n"
    (checkpoint_copy / "README.md").write_text(card)
    config = checkpoint_copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text() + "\n")
    out = tmp_path / "new folder" / "out"
    out.parent.mkdir()
    assert cli.main([str(checkpoint_copy), str(out), *traced_before]) == 0
    provenance = manifest_of(out)["provenance"]
    assert provenance["licence"] == "creativeml-openrail-m"
    assert provenance["source"] == checkpoint_copy.name
    assert provenance["source_sha256"] != manifest_of(tiny_bundle)["provenance"]["source_sha256"]
    assert abandoned(out.parent) == []
    Bundle.open(out)

    printed = capsys.readouterr()
    assert complaints(printed.err) == []
    stages = re.findall(r"\[ *\d+\.\d s\] (.*)", printed.out)
    works = [
        f"{name}: {work}" for name in FAMILIES["sd"].components for work in ("load", "export", "compare")
    ]
    works.insert(works.index("unet: compare") + 1, "unet: compare with diffusers' own pipeline")
    assert stages == [*works, "sampling run"]
    # The table shows every figure in full, also in the 80 columns of a pipe.
    table = printed.out[printed.out.index("ONNX Runtime (fp32)") :]
    for figure in manifest_of(out)["parity"]["figures"]:
        assert f"{figure['relative_l2']:.1e}" in table
        assert f"{figure['relative_max']:.1e}" in table
    assert "…" not in table


def test_what_was_exported_here_is_loaded_without_a_trial(
    tiny_checkpoint: Path, tmp_path: Path, traced_before: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle from elsewhere is loaded in a process of its own first."""
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(admission, "_KNOWN", set())
    assert cli.main([str(tiny_checkpoint), str(tmp_path / "out"), "--quiet", *traced_before]) == 0
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    Pipeline.load(tmp_path / "out", backend="onnxruntime-cpu").close()


# --- bad options ---

BAD_OPTIONS: list[tuple[list[str], str]] = [
    (["--batch", "0"], "--batch is '0'"),
    (["--batch", "5..2"], "--batch is '5..2': MIN must be at least 1 and at most MAX"),
    (["--batch", "abc"], "a number, MIN..MAX or MIN..OPT..MAX"),
    (["--batch", "-1"], "--batch"),
    (["--batch", "1..2..3"], "OPT is for engines, give --engine too"),
    (["--batch", "100"], "at most 64"),
    (["--chunks", "0"], "--chunks is '0'"),
    (["--chunks", "1..2..3"], "OPT is for engines, give --engine too"),
    (["--chunks", "1..17"], "--chunks is '1..17': at most 16"),
    (["--height", "17"], "--height is 17: multiples of 2 up to 4096 (a size of this checkpoint)"),
    (["--width", "17"], "--width is 17"),
    (["--height", "0"], "--height is '0'"),
    (["--height", "99999"], "up to 4096"),
    (["--height", "16..18"], "--height is 16..18: multiples of 4 up to 4096 (a range of this checkpoint)"),
    (["--width", "18..32"], "multiples of 4"),
    (["--height", "16.5"], "a number, MIN..MAX or MIN..OPT..MAX"),
    (["--opset", "5"], "--opset is 5: 18 to 23"),
    (["--opset", "99"], "--opset is 99: 18 to 23"),
    (["--opset", "new"], "--opset"),
    (["--fp16-weights", "--dtype", "fp16"], "--fp16-weights goes with --dtype fp32, not with fp16"),
    (["--fp16-weights", "--fp16"], "--fp16-weights goes with --dtype fp32"),
    (["--fp16", "--dtype", "bf16"], "not allowed with"),
    (["--dtype", "int8"], "--dtype"),
    (["--no-such-option"], "--no-such-option"),
    (["--family", "sd15"], "--family is for single files: a folder says itself what it is"),
    (["--family", "sd9"], "--family"),
    (["--family", "sdxl", "--config", "x"], "--config and --family both say what a single file is"),
    (["--vae", ""], "--vae is empty: give a file or a folder"),
    (["--config", "x"], "--config is for single files"),
    (["--prediction-type", "v"], "--prediction-type"),
    (["--text-encoder-2", "x"], "--text-encoder-2 is not for"),
]


def status_of(arguments: Sequence[str]) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as error:  # argparse's own way out
        return int(error.code or 0)


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=lambda value: " ".join(value)[:40])
def test_a_bad_option_is_one_line_and_status_2(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    assert status_of([str(tiny_checkpoint), str(tmp_path / "out"), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    line = complaints(printed.err)[0]
    assert line.startswith("sd-export: ")
    assert words in line
    assert len(complaints(printed.err)) == 1
    assert list(tmp_path.iterdir()) == []


def test_missing_arguments_are_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bad_checkpoint_is_status_4_before_anything_is_exported(
    checkpoint_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bundle_writer, "onnx_from_module", lambda *_: pytest.fail("exported"))
    for file in ("vocab.json", "merges.txt"):
        (checkpoint_copy / "tokenizer" / file).unlink()
    assert cli.main([str(checkpoint_copy), str(tmp_path / "out"), "--quiet"]) == 4
    message = capsys.readouterr().err
    assert "holds no tokenizer: vocab.json and merges.txt" in message
    assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint_copy.name]


# --- what is at OUT already ---


def test_an_existing_bundle_is_left_alone_without_force(
    tiny_checkpoint: Path, bundle_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(bundle_copy)
    assert cli.main([str(tiny_checkpoint), str(bundle_copy)]) == 2
    assert "exists already; give another name, or --force to replace it" in capsys.readouterr().err
    assert contents(bundle_copy) == before


def test_a_folder_that_is_not_there_is_status_8(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(tiny_checkpoint), str(tmp_path / "no" / "out")]) == 8
    assert "the folder does not exist: make it first" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["a folder of work", "a file"])
def test_force_does_not_delete_what_is_no_bundle(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    out = tmp_path / "thesis"
    if what == "a file":
        out.write_text("years of work")
    else:
        out.mkdir()
        (out / "chapter 1").write_text("years of work")
    assert cli.main([str(tiny_checkpoint), str(out), "--force"]) == 2
    assert "is not a bundle: --force replaces bundles and empty folders only" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["years of work"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_status_8(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    assert cli.main([str(tiny_checkpoint), str(tmp_path / "out"), "--quiet"]) == 8
    assert "no permission" in capsys.readouterr().err


def test_a_killed_export_leaves_the_old_bundle_and_the_next_one_cleans_up(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, traced_before: Sequence[str]
) -> None:
    real = Path(shutil.copytree(tiny_bundle, tmp_path / "elsewhere" / "real"))
    out = tmp_path / "out"
    out.symlink_to(real)  # what --force replaces is what the link names
    old = json.dumps({**manifest_of(real), "provenance": {"source": "old"}})
    (real / "manifest.json").write_text(old)
    arguments = [str(tiny_checkpoint), str(out), "--force", *traced_before]

    with process("-c", QUICK, str(tiny_bundle), "0", *arguments) as child:
        wait_for_line(child, "unet: load")
        child.kill()
        assert child.wait() == -signal.SIGKILL
    (left,) = abandoned(real.parent)
    assert (real.parent / left / "text_encoder" / "model.onnx").is_file()
    assert Bundle.open(out).manifest.provenance == {"source": "old"}

    assert cli.main([*arguments, "--quiet"]) == 0
    assert Bundle.open(out).manifest.provenance["source"] == tiny_checkpoint.name
    assert out.is_symlink()
    assert [path.name for path in real.parent.iterdir()] == ["real"]
    assert abandoned(tmp_path) == []


def test_an_interrupted_export_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with process("-m", "sdrt.export.cli", str(tiny_checkpoint), str(tmp_path / "out")) as child:
        wait_for_line(child, "text_encoder: export")
        assert len(abandoned(tmp_path)) == 1
        time.sleep(0.5)  # into the tracer
        child.send_signal(signal.SIGINT)
        _, message = child.communicate(timeout=60)
    assert child.returncode == 130
    assert complaints(message) == ["sd-export: interrupted; nothing unfinished was left behind"]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_status_8_and_leaves_nothing(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, traced_before: Sequence[str]
) -> None:
    # The U-Net's weights are the one file above 256 kB.
    limit = 1 << 18
    sizes = [file.stat().st_size for file in tiny_bundle.rglob("*")]
    assert sum(size > limit for size in sizes) == 1
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    arguments = [str(tiny_checkpoint), str(tmp_path / "out"), *traced_before]
    with process("-c", QUICK, str(tiny_bundle), str(limit), *arguments) as child:
        printed, message = child.communicate(timeout=120)
    assert "unet: export" in printed
    assert child.returncode == 8, message
    (line,) = complaints(message)
    assert line.startswith(f"sd-export: cannot write {tmp_path / 'out'}: ")
    assert list(tmp_path.iterdir()) == []
