"""``sd-run`` as people type it: prompts from anywhere, other tools' names, recipes, and where pictures go."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from support.runs.command_here import run_here
from support.runs.sd_run_terminal import SD_RUN, OnTerminal

from sdrt.runtime.cli.main import main
from sdrt.runtime.cli.options import ALSO_CALLED, NOT_CALLED
from sdrt.runtime.cli.prompts import MAX_BYTES
from sdrt.runtime.pictures.metadata import read_recipe

CPU = ("--backend", "onnxruntime-cpu")
Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(
    work: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Runs the command on the tiny bundle in this process; gives stdout and stderr."""

    def run(*arguments: str, given: bytes = b"", status: int = 0, short: bool = True) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        steps = ["--steps", "2"] if short else []
        words = ["--bundle", str(tiny_bundle), *CPU, *steps, *arguments]
        result, out, err = run_here(main, words, capsys)
        assert result == status, err
        return out, err

    return run


def drawn(out: str) -> list[tuple[str, int]]:
    """What was drawn, by the JSON that was printed: the prompts, by the recipes, and the seeds."""
    images = json.loads(out)["images"]
    return [(read_recipe(image["path"])["prompt"], image["seed"]) for image in images]


def pixels(path: str | Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# --- prompts


@pytest.mark.parametrize(
    ("arguments", "given", "prompts"),
    [
        (["a cat", "a dog"], b"", ["a cat", "a dog"]),
        (["a cat", "--json", "a dog"], b"", ["a cat", "a dog"]),  # with options between them
        (["a cat", "dog"], b"", ["a cat", "dog"]),
        (["cat"], b"", ["cat"]),
        (["--prompt", "cat", "--prompt", "dog"], b"", ["cat", "dog"]),
        (["a cat", "-p", "dog", "--", "-x", "--prompts"], b"", ["a cat", "-x", "--prompts", "dog"]),
        (["-"], b"a cat\n", ["a cat"]),
        (["-"], "\ufeff a cat\r\n\r\n# {a|b}\n苹果".encode(), ["a cat", "# {a|b}", "苹果"]),
        (["a dog", "-"], b"cat\n", ["a dog", "cat"]),
        (["--prompts", "-"], b"{a|b} apple\na cat", ["{a|b} apple", "a cat"]),
        (["-"], b'{"prompt": "a cat"}\n{"prompt": ["b", "c"], "id": 5}\n', ["a cat", "b", "c"]),
    ],
)
def test_prompts(run: Run, arguments: list[str], given: bytes, prompts: list[str]) -> None:
    """In their order, with seeds that count over all of them."""
    out, err = run("--json", "-q", "--seed", "5", "-n", "2", *arguments, given=given)
    assert err == ""
    twice = [prompt for prompt in prompts for _ in range(2)]
    assert drawn(out) == list(zip(twice, range(5, 5 + len(twice)), strict=True))


def test_a_file_of_prompts(run: Run, work: Path) -> None:
    (work / "prompts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    assert drawn(run("--prompts", "prompts.txt", "--seed", "1", "--json")[0]) == [("a cat", 1), ("a dog", 2)]
    read, write = os.pipe()
    os.write(write, b"a bird")
    os.close(write)
    assert drawn(run("--prompts", f"/dev/fd/{read}", "--seed", "1", "--json")[0]) == [("a bird", 1)]
    os.close(read)


def test_lines_of_json(run: Run, work: Path) -> None:
    """Each with the names of --interactive, above the command line's; the seeds of the others count on."""
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(work / "black.png")
    requests: list[dict[str, Any]] = [
        {"prompt": "a", "num_inference_steps": 3, "sampler": "Euler a"},
        {"prompt": "b", "seed": 40, "output": "b.jpg"},
        {"prompt": "c", "image": "black.png", "num_images_per_prompt": 2},
        {"prompt": "d", "height": 20},
    ]
    (work / "lines.jsonl").write_text("\n\n".join(map(json.dumps, requests)), encoding="utf-8")
    out, _ = run("--prompts", "lines.jsonl", "--seed", "5", "--width", "24", "--json", "--sampler", "ddim")
    paths = [image["path"] for image in json.loads(out)["images"]]
    assert paths == ["a-5.png", "b.jpg", "c-6.png", "c-7.png", "d-8.png"]
    assert drawn(out) == [("a", 5), ("b", 40), ("c", 6), ("c", 7), ("d", 8)]
    recipes = [read_recipe(path) for path in paths]
    assert [recipe["num_inference_steps"] for recipe in recipes] == [3, 2, 2, 2, 2]
    assert [recipe["sampler"] for recipe in recipes] == ["euler_a", "ddim", "ddim", "ddim", "ddim"]
    assert pixels("d-8.png").shape == (20, 24, 3)


def test_a_name_that_several_lines_share_is_numbered_over_all(run: Run, work: Path) -> None:
    lines = b'{"prompt": "a"}\n{"prompt": "b", "output": "b.png"}\n{"prompt": ["c", "d"]}'
    run("-", "-o", "a.png", given=lines)
    prompts = {"a-1.png": "a", "a-2.png": "c", "a-3.png": "d", "b.png": "b"}
    assert {path.name: read_recipe(path)["prompt"] for path in sorted(work.iterdir())} == prompts


def test_random_seeds_are_told(run: Run) -> None:
    seeds = [seed for _ in range(2) for _, seed in drawn(run("a b", "c d", "--seed", "-1", "--json")[0])]
    assert seeds[1] == seeds[0] + 1
    assert seeds[3] == seeds[2] + 1
    assert seeds[0] != seeds[2]


@pytest.mark.parametrize(
    ("arguments", "given", "words"),
    [
        (["a", "red", "apple"], b"", '3 words without quotes: for one prompt write sd-run "a red apple"'),
        (["-"], b"", "standard input holds no prompt: one a line"),
        (["-"], b" \n\n", "standard input holds no prompt"),
        (["-"], b"caf\xe9", "standard input is no text in UTF-8 (byte 4)"),
        (["-"], b"x" * (MAX_BYTES + 1), "which is the limit"),
        (["--prompts", "gone.txt"], b"", "cannot read prompts from gone.txt: No such file"),
        (["--prompts", "."], b"", "cannot read prompts from .: Is a directory"),
        (["--prompts", "-"], b'{"prompt": "a",}', "line 1 of standard input is no JSON"),
        (["-"], b'{"prompt": "a"}\n\n[1]', "line 3 of standard input is list: a JSON object is wanted"),
        (["-"], b'{"prompt": "a"}\nb', "line 2 of standard input is no JSON"),
        (
            ["-"],
            b'{"prompt": "a"}\n{"prompt": "b", "steps": 3}',
            "line 2 of standard input has no steps, did",
        ),
        (["-"], b'{"prompt": "a"}\n{"prompt": "b", "eta": 7}', "line 2 of standard input: eta is 7"),
        (["-"], b'{"prompt": "a", "output": "a.gif"}', "a.gif: a name that ends in"),
        (["-"], b'{"prompt": "a"}\n{}', "line 2 of standard input: the prompt is missing"),
        (["a b", "--to-seed", "3", "c d"], b"", "go from one PROMPT: give one"),
        (["-", "--to-seed", "3"], b"a\nb", "go from one PROMPT: give one"),
        (["-", "--to-seed", "3"], b'{"prompt": ["a"]}', "go from one PROMPT: give one"),
        (["a b", "-", "-o", "-"], b"c", "--output is -, and 2 pictures are asked for"),
    ],
)
def test_refused(run: Run, work: Path, arguments: list[str], given: bytes, words: str) -> None:
    """Before anything is drawn, in one line."""
    out, err = run(*arguments, given=given, status=2)
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
    assert list(work.iterdir()) == []


def test_a_long_list_is_several_calls(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdrt.runtime.request.texts.MAX_IMAGES", 2)
    out, _ = run("-", "--seed", "3", "--json", given=b"a\nb\nc\n")
    assert drawn(out) == [("a", 3), ("b", 4), ("c", 5)]


# --- names


@pytest.mark.parametrize(
    "arguments",
    [
        ["a cat", "--negative_prompt", "b", "--cfg-scale", "3", "-W", "20", "-H", "24", "--steps", "2"],
        ["-p", "a cat", "--neg=b", "--cfg=3", "--width=20", "--height=24", "--num_inference_steps=2"],
        ["--prompt=a cat", "--negative", "b", "--scale", "3", "-W20", "-H24", "--ddim_steps", "2"],
    ],
)
def test_other_tools_names_mean_the_same(run: Run, arguments: list[str]) -> None:
    run(*arguments, "--seed", "1", "-o", "a.png", short=False)
    recipe = read_recipe("a.png")
    assert (recipe["prompt"], recipe["negative_prompt"], recipe["guidance_scale"]) == ("a cat", "b", 3.0)
    assert (recipe["width"], recipe["height"], recipe["num_inference_steps"]) == (20, 24, 2)


def test_names_are_of_options_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for other, ours in ALSO_CALLED.items():
        assert f"  {ours} " in shown or f" {ours} " in shown
        assert other in shown.partition("other tools' names")[2]
        assert other not in NOT_CALLED


# --- recipes


def test_from_a_picture(run: Run, work: Path) -> None:
    """Through every format, and with what the command line says in its place."""
    choices = ["--sampler", "dpmpp_2m_sde", "--karras", "--rng", "cpu", "-H", "20", "--negative-prompt", "c"]
    run("a cat", *choices, "--seed", "7", "-o", "a.png")
    first = (work / "a.png").read_bytes()
    for source, target in (("a.png", "b.jpg"), ("b.jpg", "c.webp"), ("c.webp", "d.png")):
        run("--from", source, "-o", target, short=False)
    assert (work / "d.png").read_bytes() == first
    run("--from", "a.png", "a dog", "--sampler", "ddim", "--num-images", "2", "-o", "e.png", short=False)
    recipes = [read_recipe(f"e-{number}.png") for number in (1, 2)]
    assert [recipe["seed"] for recipe in recipes] == [7, 8]
    changed = {"prompt": "a dog", "sampler": "ddim", "karras": False}
    assert recipes[0] == {**read_recipe("a.png"), **changed}


def test_from_a_picture_that_was_drawn_from_others(run: Run, work: Path, tmp_path: Path) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (16, 13, 3), np.uint8)
    Image.fromarray(picture).save("given.png")
    run("a cat", "--image", "given.png", "--expand", "2,0,5,3", "--seed", "7", "-o", "a.png")
    run("--from", "a.png", "-o", "b.png", short=False)
    assert (work / "b.png").read_bytes() == (work / "a.png").read_bytes()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.chdir(elsewhere)  # the picture is looked for beside the one with the recipe
    run("--from", str(work / "a.png"), "-o", "c.png", short=False)
    assert np.array_equal(pixels("c.png"), pixels(work / "a.png"))
    (work / "given.png").rename(work / "moved.png")
    _, err = run("--from", str(work / "a.png"), "-o", "d.png", short=False, status=2)
    assert "was drawn from the image given.png, which is neither here nor beside it: give it with" in err
    moved = ["--image", str(work / "moved.png")]
    run("--from", str(work / "a.png"), *moved, "-o", "e.png", short=False)
    assert np.array_equal(pixels("e.png"), pixels(work / "a.png"))


def test_from_a_picture_with_a_word_of_ones_own(run: Run, work: Path) -> None:
    save_file({"emb_params": np.ones((2, 16), np.float32)}, "toy.safetensors")
    toy = ["--embedding", "toy.safetensors"]
    run("a toy", *toy, "-o", "a.png")
    assert "'toy' (a file with SHA-256" in run("--from", "a.png", short=False, status=2)[1]
    run("--from", "a.png", *toy, "-o", "b.png", short=False)
    assert (work / "b.png").read_bytes() == (work / "a.png").read_bytes()


def test_from_frames(run: Run, work: Path) -> None:
    """An animation draws the animation again, and the picture of a frame that frame."""
    (work / "frames").mkdir()
    ends = ["a cat", "--to-prompt", "a dog", "--to-seed", "3", "--frames", "3", "--seed", "2"]
    run(*ends, "--fps", "4", "-o", "a.webp")
    run(*ends, "-o", "frames")
    run("--from", "a.webp", "-o", "b.webp", short=False)
    assert (work / "b.webp").read_bytes() == (work / "a.webp").read_bytes()
    run("--from", "frames/frame-0001.png", "-o", "c.png", short=False)
    assert (work / "c.png").read_bytes() == (work / "frames" / "frame-0001.png").read_bytes()
    run("--from", "frames/frame-0001.png", "--frames", "2", "-o", "d.png", short=False)
    assert read_recipe("d.png")["frames"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "gone.png"], "--from gone.png does not exist"),
        (["--from", "plain.png"], "plain.png holds no recipe of sdrt"),
        (["--from", "plain.png", "--interactive"], "--from does not go with --interactive"),
    ],
)
def test_from_what_has_no_recipe(run: Run, arguments: list[str], words: str) -> None:
    Image.new("RGB", (16, 16)).save("plain.png")
    assert words in run(*arguments, status=2)[1]


# --- where pictures go


@pytest.mark.parametrize(("name", "kind"), [("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP")])
def test_other_formats(run: Run, work: Path, name: str, kind: str) -> None:
    run("x", "--seed", "1", "-o", "a.png")
    out, _ = run("x", "--seed", "1", "-n", "2", "-o", name, "--json")
    path = Path(name)
    paths = [str(path.with_stem(f"{path.stem}-{number}")) for number in (1, 2)]
    assert [image["path"] for image in json.loads(out)["images"]] == paths
    with Image.open(paths[0]) as image:
        assert image.format == kind
    assert read_recipe(paths[0]) == read_recipe("a.png")
    if kind == "WEBP":
        assert np.array_equal(pixels(paths[0]), pixels("a.png"))
    run("x", "--seed", "1", "-o", name, "--quality", "10")
    assert Path(name).stat().st_size < Path(paths[0]).stat().st_size


def test_links_and_files_that_are_read_only(run: Run, work: Path) -> None:
    (work / "there").mkdir()
    (work / "a.png").symlink_to("there/b.png")
    run("x", "-o", "a.png")
    assert (work / "a.png").is_symlink()
    assert pixels("there/b.png").shape == (16, 16, 3)
    (work / "there" / "b.png").chmod(0o444)
    before = (work / "there" / "b.png").read_bytes()
    _, err = run("x", "-o", "a.png", status=8)
    assert err == "sd-run: cannot write a.png: the file is read-only; give another name, or chmod u+w it\n"
    assert (work / "there" / "b.png").read_bytes() == before


def test_standard_output(tiny_bundle: Path, work: Path) -> None:
    command = [SD_RUN, "x", "--bundle", str(tiny_bundle), "--steps", "1", "--seed", "3", *CPU]
    to_pipe = subprocess.run([*command, "-o", "-"], capture_output=True, check=True, cwd=work)
    subprocess.run([*command, "-q", "-o", "a.png"], check=True, cwd=work)
    assert to_pipe.stdout == (work / "a.png").read_bytes()
    assert to_pipe.stderr.splitlines()[0] == b"sd-run: - seed 3"
    gone = subprocess.Popen([*command, "-o", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=work)
    assert gone.stdout is not None
    gone.stdout.close()
    assert gone.stderr is not None
    assert gone.stderr.read() == b"sd-run: cannot write to standard output: its reader has gone away\n"
    assert gone.wait() == 8
    assert [path.name for path in work.iterdir()] == ["a.png"]


def test_a_terminal_is_no_place_for_a_picture(work: Path) -> None:
    terminal = OnTerminal(work, "-c", 'exec "$0" x -o - >&2', SD_RUN, command="sh")
    assert terminal.end() == 2
    assert "standard output is a terminal or closed: redirect it" in terminal.shown
