"""Models for a few steps: what tells them, how they are drawn by default, and U-Nets that come alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.checkpoints.checkpoint_damage import SCHEDULER, WEIGHTS, configure
from support.checkpoints.ldm_names import UNET, write_single_file
from support.checkpoints.published import CONFIGS
from support.checkpoints.published_headers import shapes_of, write_header

from sdrt.export.checkpoint.assembly import Parts, assembly_of
from sdrt.export.checkpoint.few_steps import few_steps
from sdrt.export.checkpoint.overrides import Overrides
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.cli.main import main
from sdrt.export.manifest import default_guidance, default_steps, draft_manifest, tokenizer_files
from sdrt.export.options import AxisRange, ExportOptions
from sdrt.runtime.bundle.manifest import FileEntry, TokenizerFacts
from sdrt.runtime.errors import CheckpointError

TURBO: Mapping[str, Any] = CONFIGS["sdxl-turbo-variants"]["scheduler/scheduler_config.json"]
TRAILING = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
LIGHTNING = "sdxl_lightning_2step_unet.safetensors"


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("sdxl_lightning_8step_unet", 8),
        ("sdxl_lightning_1step_unet_x0", 1),
        ("SG161222/RealVisXL_V4.0_Lightning", 4),
        ("models--stabilityai--sdxl-turbo", 4),
        ("sd-turbo", 4),
        ("Hyper-SDXL-8steps", 8),
        ("Hyper-SD15-12-steps-CFG", 12),
        ("stable-diffusion-xl-base-1.0", None),
        ("hyper-realistic-v4", None),
        ("trained with pytorch-lightning", None),
        ("Turbofan", None),
        ("checkpoint-4steps", None),
    ],
)
def test_what_a_name_says(name: str, steps: int | None) -> None:
    found = few_steps([name], {})
    assert (found and found.steps) == steps
    assert found is None or (found.guidance == 1.0 and name in found.line)


def test_turbos_scheduler_tells_it_whatever_it_is_called() -> None:
    assert few_steps(["mine"], TURBO) is not None
    assert few_steps(["mine"], {**TURBO, "timestep_spacing": "leading"}) is None
    assert few_steps(["mine"], TRAILING) is None  # which others have, too


@pytest.fixture
def checkpoint(checkpoint_copy: Path, tmp_path: Path) -> Path:
    """A checkpoint whose folder says nothing."""
    return checkpoint_copy.rename(tmp_path / "mine")


def defaults_of(folder: Path) -> tuple[int, float]:
    read = open_checkpoint(str(folder))
    return default_steps(read), default_guidance(read)


def test_where_a_folders_name_is_looked_for(checkpoint: Path, tmp_path: Path) -> None:
    assert defaults_of(checkpoint) == (20, 7.5)
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n\n# SD-Turbo Model Card\n")
    assert defaults_of(checkpoint) == (4, 1.0)
    (checkpoint / "README.md").unlink()
    index = json.loads((checkpoint / "model_index.json").read_text())
    configure("model_index.json", _name_or_path="stabilityai/sd-turbo")(checkpoint)
    assert defaults_of(checkpoint) == (4, 1.0)
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    place = tmp_path / "models--stabilityai--sd-turbo" / "snapshots" / "0123"
    shutil.copytree(checkpoint, place)
    assert defaults_of(place.parents[1]) == (4, 1.0)
    assert defaults_of(checkpoint.rename(tmp_path / "sd-turbo")) == (4, 1.0)


def test_trailing_timesteps_alone_are_remarked_on(checkpoint: Path) -> None:
    configure(SCHEDULER, **TRAILING)(checkpoint)
    read = open_checkpoint(str(checkpoint))
    assert (default_steps(read), default_guidance(read)) == (20, 7.5)
    assert any("--default-steps 4 --default-guidance 1" in remark for remark in read.remarks)
    assert (read.schedule.timestep_spacing, read.sampler) == ("trailing", "euler")


def test_options_overrule_what_is_found(checkpoint: Path, tmp_path: Path) -> None:
    read = open_checkpoint(str(checkpoint.rename(tmp_path / "turbo")))
    side, one = AxisRange(16, 16), AxisRange(1, 1)
    tokenizers = [
        TokenizerFacts(FileEntry(name, 0, "0" * 64), **tokenizer.ids)
        for name, tokenizer in zip(tokenizer_files(read), read.tokenizers, strict=True)
    ]
    for given, wanted in (
        ({}, (4, 1.0)),
        ({"steps": 6, "guidance": 2.0}, (6, 2.0)),
        ({"guidance": 0.0}, (4, 0.0)),
    ):
        options = ExportOptions("fp32", False, one, side, side, 1, 23, **given)  # type: ignore[arg-type]
        defaults = draft_manifest(read, options, tokenizers).defaults
        assert (defaults.num_inference_steps, defaults.guidance_scale) == wanted


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--default-steps", "0"], "--default-steps is 0: 1 or more"),
        (["--default-steps", "1001"], "1 to num_train_timesteps steps"),
        (["--default-guidance", "-1"], "--default-guidance is -1: 0 to 1000"),
        (["--default-guidance", "nan"], "--default-guidance is nan: 0 to 1000"),
    ],
)
def test_bad_defaults(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main([str(tiny_checkpoint), str(tmp_path / "out"), *options]) in (2, 4)
    assert words in capsys.readouterr().err


# --- a U-Net alone


def changed_unet(folder: Path) -> dict[str, Any]:
    """Weights that are not the folder's."""
    return {name: array + np.float16(0.25) for name, array in load_file(folder / WEIGHTS["unet"]).items()}


@pytest.mark.parametrize("form", ["diffusers", "ldm", "ldm alone", "folder"])
def test_a_unet_takes_the_place_of_a_folders(sdxl_checkpoint: Path, tmp_path: Path, form: str) -> None:
    own = changed_unet(sdxl_checkpoint)
    whole = tmp_path / "whole"
    shutil.copytree(sdxl_checkpoint, whole)
    save_file(own, whole / WEIGHTS["unet"])
    place = tmp_path / LIGHTNING
    if form == "diffusers":
        save_file(own, place)
    elif form == "folder":
        place = place.with_suffix("")
        shutil.copytree(whole / "unet", place)
    else:
        write_single_file(place, whole, {"unet": UNET})
        if form == "ldm alone":
            kept = {name: it for name, it in load_file(place).items() if name.startswith(UNET)}
            save_file({name.removeprefix(UNET): it for name, it in kept.items()}, place)
    assembly = assembly_of(Parts(str(sdxl_checkpoint), others={"unet": place}))
    with assembly.opened(tmp_path / "out") as checkpoint:
        read = load_file(checkpoint.path / WEIGHTS["unet"])
        assert {name: array.tobytes() for name, array in read.items()} == {
            name: array.tobytes() for name, array in own.items()
        }
        assert (default_steps(checkpoint), default_guidance(checkpoint)) == (2, 1.0)
        assert (checkpoint.schedule.timestep_spacing, checkpoint.sampler) == ("trailing", "euler")
        assert checkpoint.schedule.prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("lightning_1step_unet_x0", "", ("trailing", "euler", "sample")),
        ("lightning_1step_unet_x0", "epsilon", ("trailing", "euler", "epsilon")),
        ("sdxl_turbo_unet", "", ("trailing", "euler_a", "epsilon")),
        ("mine", "", ("leading", "euler", "epsilon")),
    ],
)
def test_the_scheduler_becomes_what_its_name_wants(
    sdxl_checkpoint: Path, tmp_path: Path, name: str, given: str, wanted: tuple[str, ...]
) -> None:
    place = tmp_path / f"{name}.safetensors"
    shutil.copy(sdxl_checkpoint / WEIGHTS["unet"], place)
    parts = Parts(str(sdxl_checkpoint), others={"unet": place}, overrides=Overrides(prediction_type=given))
    assembly = assembly_of(parts)
    assert assembly.line.endswith("as that U-Net wants") == (name != "mine")  # and it is said
    with assembly.opened(tmp_path / "out") as checkpoint:
        schedule = checkpoint.schedule
        assert (schedule.timestep_spacing, checkpoint.sampler, schedule.prediction_type) == wanted


def test_a_file_without_a_unet_is_refused(sdxl_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--unet is .*, which holds no U-Net"):
        assembly_of(Parts(str(sdxl_checkpoint), others={"unet": sdxl_checkpoint / WEIGHTS["vae"]}))


@pytest.mark.parametrize(
    ("name", "family", "steps"), [("sdxl_lightning_8step", "", 8), ("sdxl_lightning_8step", "sdxl", 20)]
)
def test_single_files(tmp_path: Path, name: str, family: str, steps: int) -> None:
    """Of a file that the user takes for another kind the name says nothing."""
    place = tmp_path / f"{name}.safetensors"
    write_header(place, shapes_of("sdxl-base"))
    assembly = assembly_of(Parts(str(place), overrides=Overrides(family=family)))
    found = few_steps(assembly.names or (), {})
    assert (found.steps if found else 20) == steps
