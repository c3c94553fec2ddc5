"""The forms of a checkpoint that peers read, without their exporters."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.checkpoints.tiny_sdxl import write_tiny_sdxl_checkpoint
from support.runs.worker_child import WORKERS, child, drawing

from sdrt.benchmarks.peers import models as peer_models
from sdrt.benchmarks.peers.environments import COMPLETE, environment_folder
from sdrt.benchmarks.peers.prepare import prepared
from sdrt.benchmarks.peers.registry import PEERS
from sdrt.benchmarks.peers.safetensors_file import write_float32
from sdrt.export.checkpoint import architectures
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.checkpoint.weights import load_module
from sdrt.runtime.bundle.bundle import EMBEDDED
from sdrt.runtime.errors import BackendError, SdrtError, UsageError

CHECKPOINT = EMBEDDED.parent


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "cache"))


def as_architecture(checkpoint: Path, folder: Path) -> None:
    """The shapes of a tiny checkpoint, with the published vocabulary."""
    for file in checkpoint.rglob("*.json"):
        copy = folder / file.relative_to(checkpoint)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    for config in folder.glob("text_encoder*/config.json"):
        facts = {**json.loads(config.read_text()), "vocab_size": 49408, "bos_token_id": 49406}
        config.write_text(json.dumps({**facts, "eos_token_id": 49407, "pad_token_id": 49407}))


@pytest.fixture
def small_architecture(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An architecture of the tiny checkpoint's shapes, under the name of a published one."""
    as_architecture(tiny_checkpoint, tmp_path / "architectures" / "sd15")
    monkeypatch.setattr(architectures, "FOLDER", tmp_path / "architectures")
    return "sd15"


def test_a_checkpoint_is_its_own_form_for_diffusers() -> None:
    assert peer_models.prepare("diffusers", str(CHECKPOINT)) == CHECKPOINT
    assert peer_models.prepare("torch-compile", str(CHECKPOINT)) == CHECKPOINT


def test_the_classic_form_has_older_names_and_the_same_weights() -> None:
    """Older versions of transformers draw random weights in silence where they find other names."""
    folder = peer_models.prepare("stable-diffusion.cpp", str(CHECKPOINT))
    ours = load_file(CHECKPOINT / "text_encoder" / "model.safetensors")
    theirs = load_file(folder / "text_encoder" / "model.safetensors")
    assert set(theirs) == {f"text_model.{name}" for name in ours}
    for name, array in ours.items():
        np.testing.assert_array_equal(theirs[f"text_model.{name}"], array)
    again = open_checkpoint(str(folder))
    assert load_module(again, "text_encoder").state_dict().keys() == ours.keys()
    # Of a checkpoint that has those names already nothing is made.
    assert peer_models.prepare("stable-diffusion.cpp", str(folder)) == folder


def test_a_form_is_made_once_and_anew_when_its_checkpoint_was_moved(
    tiny_checkpoint: Path, checkpoint_copy: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    folder = peer_models.prepare("stable-diffusion.cpp", str(checkpoint_copy), told.append)
    assert peer_models.prepare("stable-diffusion.cpp", str(checkpoint_copy), told.append) == folder
    assert len(told) == 1
    checkpoint_copy.rename(tmp_path / "elsewhere")
    assert peer_models.prepare("stable-diffusion.cpp", str(tiny_checkpoint), told.append) == folder
    assert len(told) == 2
    assert (folder / "unet" / "config.json").is_file()


def test_an_architecture_is_written_with_its_seeded_weights(small_architecture: str) -> None:
    from diffusers import StableDiffusionPipeline

    folder = peer_models.prepare("diffusers", small_architecture)
    assert peer_models.prepare("stable-diffusion.cpp", small_architecture) == folder
    written = open_checkpoint(str(folder))
    wanted = architectures.open_architecture(small_architecture)
    for name in wanted.configs:
        ours, theirs = (load_module(one, name).state_dict() for one in (wanted, written))
        assert ours.keys() == theirs.keys()
        assert all((ours[key] == theirs[key]).all() for key in ours)
    assert any(
        name.startswith("text_model.") for name in load_file(next((folder / "text_encoder").glob("*.s*")))
    )
    assert written.tokenizer.ids == wanted.tokenizer.ids
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)  # as its worker loads it
    assert type(pipe.scheduler).__name__ == "PNDMScheduler"
    assert pipe.tokenizer("a red apple").input_ids == [49406, 320, 736, 3055, 49407]


def installed(environment: str, script: str) -> None:
    """An environment whose Python is a shell script."""
    folder = environment_folder(environment)
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    (folder / COMPLETE).write_text("{}")


def test_an_architecture_of_xl_is_drawn_by_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    write_tiny_sdxl_checkpoint(checkpoint)
    as_architecture(checkpoint, tmp_path / "architectures" / "sdxl")
    monkeypatch.setattr(architectures, "FOLDER", tmp_path / "architectures")
    folder = peer_models.prepare("diffusers-cuda", "sdxl")
    with pytest.raises(UsageError, match=r"openvino draws with Stable Diffusion 1\.x and 2\.x alone"):
        peer_models.prepare("openvino", "sdxl")
    with child([WORKERS / "worker_diffusers.py"], tmp_path / "log") as worker:
        loaded = worker("load", model=folder, threads=1)
        assert loaded["ok"], loaded
        drawn = worker("draw", **{**drawing(tmp_path, images=2), "height": 16, "width": 16})
        assert drawn["ok"], drawn
        for stage in loaded["stages"]:
            answer = worker("stage", stage=stage, repeats=1, height=16, width=16, batch=2)
            assert answer["ok"], answer


def test_an_exporter_that_fails_leaves_its_last_words_and_no_model() -> None:
    with pytest.raises(BackendError, match="is not installed: `sd-bench peers install openvino`"):
        peer_models.prepare("openvino", str(CHECKPOINT))
    installed("openvino-export", "echo working; echo RuntimeError: no such operator >&2; exit 1")
    with pytest.raises(
        BackendError, match="exit status 1: RuntimeError: no such operator; its log is"
    ) as caught:
        peer_models.prepare("openvino", str(CHECKPOINT))
    log = Path(str(caught.value).rpartition("its log is ")[2])
    assert "working" in log.read_text()
    assert [entry.name for entry in log.parent.iterdir() if entry.is_dir()] == ["diffusers-classic"]


def test_an_exporter_gets_the_classic_form_and_its_result_is_kept(tmp_path: Path) -> None:
    installed(
        "optimum-onnx", f'echo "$@" >> {tmp_path}/words; for last; do :; done; echo onnx > "$last/model"'
    )
    folder = peer_models.prepare("optimum-onnx", str(CHECKPOINT))
    assert (folder / "model").read_text() == "onnx\n"
    assert peer_models.prepare("optimum-onnx", str(CHECKPOINT)) == folder
    (words,) = (tmp_path / "words").read_text().splitlines()
    assert "-m optimum.exporters.onnx --task text-to-image --model " in words
    assert "/diffusers-classic " in words


def test_what_an_exporter_does_is_told_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(
        "optimum-onnx",
        "echo 'FutureWarning: old' >&2; printf 'step 1\\rstep 2'; sleep 1.5; for last; do :; done; "
        'echo onnx > "$last/model"',
    )
    monkeypatch.setattr("sdrt.runtime.system.child_process.TICK_SECONDS", 0.2)
    told: list[tuple[str, float]] = []
    folder = prepared("optimum-onnx", str(CHECKPOINT), lambda line, seconds: told.append((line, seconds)))
    assert (folder / "model").is_file()
    lines = [line for line, _ in told]
    assert any(line.startswith("making ") for line in lines)  # the stage
    assert lines.count("optimum-onnx: step 1") + lines.count("optimum-onnx: step 2") > 4  # while it is silent
    assert not any("FutureWarning" in line for line in lines)
    seconds = [when for _, when in told]
    assert seconds == sorted(seconds)


def test_a_conversion_that_fails_in_its_own_process() -> None:
    with pytest.raises(SdrtError, match="openvino-export, which makes models for openvino, is not installed"):
        prepared("openvino", str(CHECKPOINT))
    with pytest.raises(SdrtError, match="unknown peer 'x'"):
        prepared("x", str(CHECKPOINT))


def test_models_that_workers_cannot_draw_with_are_refused(inpainting_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=r"draws with Stable Diffusion 1\.x, 2\.x and XL alone"):
        peer_models.prepare("diffusers", str(inpainting_checkpoint))
    with pytest.raises(UsageError, match="unknown peer 'x'"):
        peer_models.prepare("x", str(CHECKPOINT))


def test_tensors_of_other_shapes_than_announced_are_refused(tmp_path: Path) -> None:
    def arrays() -> Iterator[Any]:
        yield np.zeros((3, 2), np.float32)

    with pytest.raises(ValueError, match=r"a is float32\[3, 2\], not float32\[2, 3\]"):
        write_float32(tmp_path / "file", {"a": (2, 3)}, arrays())
    assert sys.byteorder == "little"  # the format's, in which arrays are written as they are


def test_every_form_that_has_a_converter_has_its_words() -> None:
    assert set(peer_models.EXPORTERS) == {peer.form for peer in PEERS.values() if peer.converter}
