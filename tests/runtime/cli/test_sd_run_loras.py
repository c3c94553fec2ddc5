"""``sd-run`` with LoRAs: from files and prompts to pictures and back, and what is said of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from support.checkpoints.synthetic_loras import write_kohya_lora
from support.runs.command_here import run_here

from sdrt.runtime.bundle.bundle import EMBEDDED
from sdrt.runtime.cli import interactive
from sdrt.runtime.cli.main import main
from sdrt.runtime.pictures.metadata import read_recipe
from sdrt.runtime.pipeline import Pipeline

Run = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    (folder / "styles").mkdir()
    write_kohya_lora(folder / "styles/pixel.safetensors", EMBEDDED, 1)
    write_kohya_lora(folder / "ink=2.safetensors", EMBEDDED, 2, folders=("unet",))
    arrays = load_file(folder / "ink=2.safetensors")
    save_file({**arrays, "odd": np.ones(1, np.float32)}, folder / "odd.safetensors")
    (folder / "pickle.ckpt").write_bytes(b"\x80\x04")
    return folder


@pytest.fixture
def run(files: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command on the embedded model in this process; gives stdout and stderr."""
    (work / "pixel.safetensors").write_bytes((files / "styles/pixel.safetensors").read_bytes())

    def run(*arguments: str, status: int = 0) -> tuple[str, str]:
        options = ["--backend", "onnxruntime-cpu", "--steps", "2", "--seed", "3"]
        given = [*arguments, *(options if "--from" not in arguments else options[:2])]
        result, out, err = run_here(main, given, capsys)
        assert result == status, err
        return out, err

    return run


def pixels(path: str) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_files_and_tags_draw_the_same(run: Run, files: Path) -> None:
    run("a cat", "-o", "none.png")
    run("a cat", "--lora", "pixel.safetensors=0.5", "-o", "file.png")
    run("a cat", "--lora", "pixel=0.5", "--lora-dir", str(files), "-o", "name.png")
    run("a <lora:pixel:0.5>cat", "--lora-dir", str(files), "-o", "tag.png")
    run("a <lora:pixel:0.5>cat", "--lora-model-dir", str(files / "styles"), "-o", "tag2.png")
    run("a cat", "--lora", "pixel.safetensors=0", "-o", "zero.png")
    for name in ("name", "tag", "tag2"):
        assert np.array_equal(pixels(f"{name}.png"), pixels("file.png"))
    assert not np.array_equal(pixels("none.png"), pixels("file.png"))
    assert np.array_equal(pixels("none.png"), pixels("zero.png"))
    assert read_recipe("file.png")["loras"] == {"pixel.safetensors": 0.5}


def test_several_and_an_equals_sign(run: Run, files: Path) -> None:
    ink = str(files / "ink=2.safetensors")
    run("a cat", "--lora", ink, "--lora", "pixel.safetensors", "-o", "a.png")
    run("a cat", "--lora", "pixel.safetensors=1", "--lora", f"{ink}=1", "-o", "b.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert read_recipe("a.png")["loras"] == {ink: 1.0, "pixel.safetensors": 1.0}


def test_what_is_said_of_them(run: Run, files: Path) -> None:
    """Which, how strongly, in what form; and how long the change took."""
    out, err = run(
        *("a cat<lora:odd:0.5>", "b<lora:odd:0.5:0>", "--lora", "pixel.safetensors=0.8", "--lora-partial"),
        *("--lora-dir", str(files), "--verbose"),
    )
    lines = [line for line in err.splitlines() if "LoRA" in line]
    assert lines[0].startswith("sd-run: LoRA pixel.safetensors, weight 0.8 (kohya, ")
    assert lines[1].startswith(f"sd-run: LoRA {files / 'odd.safetensors'}, weight 0.5, 0.5:0 (kohya, ")
    assert lines[1].endswith("tensors, 1 left out)")
    assert len(lines) == 2
    assert "odd.safetensors, without a place in this model: 1 of its keys, such as 'odd'" in err
    assert ", lora 0." in out.splitlines()[-1]
    out, err = run("a", "--lora", "pixel.safetensors", "--json")
    assert json.loads(out)["seconds"]["lora"] > 0
    assert "LoRA" not in err


def test_from_a_picture(run: Run, files: Path, work: Path) -> None:
    """Drawn again with the same file, wherever it lies; refused without it, and with another."""
    run("a cat", "--lora", "pixel.safetensors=0.5", "-o", "file.png")
    run("a cat<lora:pixel:0.5>", "--lora-dir", str(files), "-o", "tag.png")
    run("--from", "file.png", "-o", "again.png")
    assert np.array_equal(pixels("again.png"), pixels("file.png"))
    assert read_recipe("again.png") == read_recipe("file.png")
    run("--from", "tag.png", "--lora-dir", str(files), "-o", "again.png")
    assert np.array_equal(pixels("again.png"), pixels("file.png"))
    _, err = run("--from", "tag.png", status=2)
    assert "the recipe's LoRA 'pixel'" in err
    run("--from", "file.png", "--lora", "pixel.safetensors=0", "-o", "none.png")
    assert not np.array_equal(pixels("none.png"), pixels("file.png"))
    (work / "pixel.safetensors").unlink()
    _, err = run("--from", "file.png", status=2)
    assert "the LoRA 'pixel.safetensors' is neither loaded nor a file here" in err
    run("--from", "file.png", "--lora-dir", str(files), "-o", "again.png")
    assert np.array_equal(pixels("again.png"), pixels("file.png"))
    (work / "pixel.safetensors").write_bytes((files / "ink=2.safetensors").read_bytes())
    _, err = run("--from", "file.png", status=2)
    assert "is not the one that the recipe was drawn with" in err


def test_a_recipe_beside_its_lora(run: Run, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("a cat", "--lora", "pixel.safetensors=0.5", "-o", "file.png")
    (work / "elsewhere").mkdir()
    monkeypatch.chdir(work / "elsewhere")
    run("--from", "../file.png", "-o", "again.png")
    assert np.array_equal(pixels("again.png"), pixels("../file.png"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--lora", "gone.safetensors"],
            "the LoRA 'gone.safetensors' is neither loaded nor a file here: there is delft, lcm, outline",
        ),
        (["--lora", "pixel.safetensors=x"], "'pixel.safetensors=x' is FILE=WEIGHT, and 'x' is no number"),
        (["--lora", "pixel.safetensors=nan"], "the weight of the LoRA 'pixel.safetensors' is nan: a finite"),
        (["--lora", "pixel.safetensors=1e9"], "is 1e+09: -100 to 100 are allowed"),
        (
            ["--lora", "pixel.safetensors", "--lora", "pixel.safetensors=1"],
            "pixel.safetensors is given twice",
        ),
        (["--lora", "{}/pickle.ckpt"], "pickle.ckpt"),
        (
            ["--lora", "{}/odd.safetensors"],
            "odd.safetensors: the key 'odd' has no place in this model (1 such",
        ),
        (["--lora-dir", "gone"], "the folder of LoRAs gone does not exist, or is none"),
        (
            ["--lora-dir", "{}", "--prompt", "b<lora:pixl>"],
            "the LoRA 'pixl' is not in {}: did you mean pixel?",
        ),
        (
            ["--lora-dir", "{}", "--prompt", "b<lora:>"],
            "the prompt's '<lora:>', character 2, in 'b<lora:>': a",
        ),
        (
            ["--lora-dir", "{}", "--lora", "x"],
            "the LoRA 'x' is not in {}: there is ink=2, odd, pixel, styles/",
        ),
        (["--lora", "deft"], "the LoRA 'deft' is neither loaded nor a file here: did you mean delft?"),
        (["--lora-dirr", "x"], "--lora-dir"),
    ],
)
def test_what_is_refused(run: Run, files: Path, work: Path, arguments: list[str], words: str) -> None:
    """In one line, before anything is drawn."""
    given = [argument.format(files) for argument in arguments]
    _, err = run("a cat", *given, status=2)
    last = err.splitlines()[-1]
    assert words.format(files) in last
    assert not list(work.glob("*.png"))


def test_those_that_come_along(run: Run) -> None:
    """The embedded model finds its own without a folder; of others a prompt is warned."""
    run("a cat<lora:delft:0.5>", "-o", "tag.png")
    run("a cat", "--lora", "delft=0.5", "-o", "name.png")
    assert np.array_equal(pixels("name.png"), pixels("tag.png"))
    _, err = run("a cat<lora:deft>", "-o", "none.png")
    assert "asks for a LoRA, and it is not said where LoRAs lie" in err


def test_the_loop_that_stays_loaded(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A request has LoRAs of its own, or those of the command line; its recipe is a request again."""
    loaded = Pipeline.load(verify=False, lora_dir=files, backend="onnxruntime-cpu")
    usual = {"num_inference_steps": 1, "seed": 1, "loras": {"pixel": 0.5}}

    def serve(*requests: dict[str, Any]) -> list[Any]:
        lines = "".join(json.dumps({"output": "base64", **request}) + "\n" for request in requests)
        stream = io.BytesIO(lines.encode())
        interactive.serve(loaded, usual, None, load_seconds=0.1, warm_up=False, stream=stream)
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()][1:]

    with loaded:
        first, second, none, bad = serve(
            {"prompt": "a"},
            {"prompt": "a", "loras": {"ink=2": {"text_encoder": 1, "unet": 0.5}}},
            {"prompt": "a", "loras": {}},
            {"prompt": "a", "loras": {"gone": 1}},
        )
        assert first["recipes"][0]["loras"] == {"pixel": 0.5}
        assert second["recipes"][0]["loras"] == {"ink=2": {"text_encoder": 1.0, "unet": 0.5}}
        assert "loras" not in none["recipes"][0]
        assert "the LoRA 'gone' is not in" in bad["error"]
        assert first["seconds"]["lora"] > 0
        answers = (first, second, none)
        for one, again in zip(answers, serve(*(answer["recipes"][0] for answer in answers)), strict=True):
            assert again["png"] == one["png"]
        tagged, warned = serve(
            {"prompt": "a<lora:pixel:0.5>", "loras": {}}, {"prompt": "a", "negative_prompt": "<lora:x>"}
        )
        assert len(tagged["png"][0]) > 0
        assert "is text" in warned["warnings"][0]
