"""``sd-run`` where all goes well: what is written where, what is printed, and what a signal leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.runs.sd_run_terminal import A_STEP, SD_RUN, OnTerminal

from sdrt.runtime.cli import saving
from sdrt.runtime.cli.main import main
from sdrt.runtime.devices.gpu import discovery
from sdrt.runtime.errors import BackendError
from sdrt.runtime.pipeline import Pipeline

CPU = ("--backend", "onnxruntime-cpu")  # `auto` says what it took; a backend that was named is no news
Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(work: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command on the tiny bundle in this process; gives stdout and stderr."""

    def run(*arguments: str, steps: int | None = 2) -> tuple[str, str]:
        given = ["--bundle", str(tiny_bundle), *CPU, *arguments]
        status = main([*given, "--steps", str(steps)] if steps else given)
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return captured.out, captured.err

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image)


# --- as a process


def test_whole_process(tiny_bundle: Path, work: Path) -> None:
    command = [SD_RUN, "a red apple", "--bundle", str(tiny_bundle), "--steps", "2", "--seed", "5"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work)
    assert result.returncode == 0
    assert re.fullmatch(r"sd-run: backend [a-z-]+( \(.*\))?\n", result.stderr)
    first, second = result.stdout.splitlines()
    assert first == "a-red-apple-5.png  seed 5"
    assert re.fullmatch(
        r"\d+\.\d\d s \(load \d.*, text_encoder \d.*, denoise .*, vae_decoder .*, save .*\)", second
    )
    assert names(work) == ["a-red-apple-5.png"]
    output = Pipeline.load(tiny_bundle)("a red apple", seed=5, num_inference_steps=2)
    assert np.array_equal(pixels(work / "a-red-apple-5.png"), np.asarray(output.images[0]))


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version(argument: str) -> None:
    result = subprocess.run([SD_RUN, argument], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "130 interrupted" in result.stdout if argument == "--help" else result.stdout.startswith("sdrt ")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_that_goes_away(tiny_bundle: Path, work: Path, unbuffered: str) -> None:
    """``sd-run … | true`` is no error where the picture is saved, and says nothing."""
    command = [SD_RUN, "x", "--bundle", str(tiny_bundle), "--steps", "1", "--seed", "1", *CPU]
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, cwd=work, env=environment)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 0
    assert names(work) == ["x-1.png"]


@pytest.mark.parametrize("closing", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(tiny_bundle: Path, work: Path, closing: str) -> None:
    script = f'exec "$0" x --bundle "$1" --steps 1 --seed 1 {" ".join(CPU)} {closing}'
    result = subprocess.run(
        ["sh", "-c", script, SD_RUN, str(tiny_bundle)], capture_output=True, check=False, cwd=work
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert names(work) == ["x-1.png"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_report_that_cannot_be_written(tiny_bundle: Path, work: Path, unbuffered: str) -> None:
    command = [SD_RUN, "x", "--bundle", str(tiny_bundle), "--steps", "1", "--json", *CPU]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=work, env=environment
        )
    assert result.returncode == 8
    assert result.stderr == "sd-run: cannot write to standard output: the disk is full\n"


def test_progress_bar_on_a_terminal(tiny_bundle: Path, work: Path) -> None:
    terminal = OnTerminal(work, "x", "--bundle", str(tiny_bundle), "--steps", "7", "--num-images", "3")
    assert terminal.end() == 0
    assert "drawing" in terminal.shown
    assert "14/14" in terminal.shown  # three pictures, two at a time


def test_no_progress_bar_when_quiet(tiny_bundle: Path, work: Path) -> None:
    terminal = OnTerminal(work, "x", "--bundle", str(tiny_bundle), "--steps", "7", "--quiet")
    assert terminal.end() == 0
    assert terminal.shown == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_in_the_middle(tiny_bundle: Path, work: Path, number: signal.Signals) -> None:
    terminal = OnTerminal(work, "x", "--bundle", str(tiny_bundle), "--steps", "499", "--num-images", "100")
    terminal.read(until=A_STEP)
    terminal.process.send_signal(number)
    assert terminal.end() == 130
    assert "interrupted; nothing unfinished was left behind" in terminal.shown
    assert "Traceback" not in terminal.shown
    assert terminal.shown.rfind("\x1b[?25h") > terminal.shown.rfind("\x1b[?25l")  # the cursor is shown again
    assert names(work) == []


@pytest.mark.parametrize("here", [False, True], ids=["its own process", "somebody else's"])
def test_what_is_finished_is_saved(
    tiny_bundle: Path,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    here: bool,
) -> None:
    """Batch by batch, each picture whole; an interrupt in the middle of saving waits for the batch."""
    words = [
        "x",
        "--bundle",
        str(tiny_bundle),
        "--seed",
        "1",
        "--num-images",
        "64",
        "--steps",
        "60",
        "-o",
        "a.png",
    ]
    if here:
        encoded, calls = saving.encoded, []

        def interrupted(*arguments: Any) -> list[bytes]:
            calls.append(arguments)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return encoded(*arguments)

        monkeypatch.setattr(saving, "encoded", interrupted)
        assert main([*words, *CPU]) == 130
        said, saved = capsys.readouterr().err, ["a-1.png", "a-2.png", "a-3.png", "a-4.png"]
    else:
        terminal = OnTerminal(work, *words, *CPU)
        deadline = time.monotonic() + 60
        while not (work / "a-2.png").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 130
        said, saved = terminal.shown, sorted(names(work), key=lambda name: int(name[2:-4]))
    assert 2 <= len(saved) < 64
    assert len(saved) % 2 == 0
    assert sorted(saved) == names(work)
    expected = f"of 64 pictures {len(saved)} were finished and saved, each whole: a-1.png to {saved[-1]}"
    assert f"sd-run: interrupted; {expected}" in " ".join(said.split())
    assert all(pixels(work / name).shape == (16, 16, 3) for name in saved)


def test_what_is_finished_is_saved_before_a_disk_is_full(
    run: Run, tiny_bundle: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "a-3.png").mkdir()
    assert (
        main(["x", "--bundle", str(tiny_bundle), *CPU, "--num-images", "4", "--steps", "1", "-o", "a.png"])
        == 8
    )
    told = "of 4 pictures 2 were finished and saved, each whole: a-1.png to a-2.png"
    assert (
        capsys.readouterr().err == f"sd-run: cannot write a-3.png: there is a folder of that name; {told}\n"
    )
    assert names(work) == ["a-1.png", "a-2.png", "a-3.png"]


# --- where pictures go


def test_default_name(run: Run, work: Path) -> None:
    run("A Red, Apple!", "--seed", "7")
    assert names(work) == ["a-red-apple-7.png"]


def test_default_name_never_replaces_a_picture(run: Run, work: Path) -> None:
    for _ in range(3):
        run("苹果", "--seed", "7")
    assert names(work) == ["苹果-7-2.png", "苹果-7-3.png", "苹果-7.png"]


def test_negative_prompt_that_is_not_used(run: Run) -> None:
    arguments = ["x", "--negative-prompt", "y", "--guidance-scale", "1"]
    assert "the negative prompt is not used" in run(*arguments)[1]
    assert run(*arguments, "-q")[1] == ""
    assert run("x", "--negative-prompt", "y")[1] == ""


def test_name_that_standard_output_cannot_show(tiny_bundle: Path, work: Path) -> None:
    command = [SD_RUN, "x", "--bundle", str(tiny_bundle), "--steps", "1", "-o", "é.png"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = subprocess.run(command, capture_output=True, check=False, timeout=60, env=environment)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(b"\\xe9.png")
    assert names(work) == ["é.png"]


def test_in_another_thread(run: Run, work: Path) -> None:
    """Signals can be handled in the main thread alone; a program may call it elsewhere."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run, "x", "--seed", "7").result()
    assert names(work) == ["x-7.png"]


def test_folder(run: Run, work: Path) -> None:
    (work / "pictures").mkdir()
    out, _ = run("x", "--seed", "7", "-o", "pictures", "--num-images", "3")
    assert names(work) == ["pictures"]
    assert names(work / "pictures") == ["x-7.png", "x-8.png", "x-9.png"]
    assert out.splitlines()[1] == "pictures/x-8.png  seed 8"


def test_folder_that_is_called_like_a_picture(run: Run, work: Path) -> None:
    (work / "a.png").mkdir()
    run("x", "--seed", "7", "-o", "a.png")
    assert names(work / "a.png") == ["x-7.png"]


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a b — 🍎.png"])
def test_file(run: Run, work: Path, name: str) -> None:
    run("x", "--output", name)
    assert names(work) == [name]


def test_several_pictures_for_one_name(run: Run, work: Path) -> None:
    run("x", "--output", "a.png", "--num-images", "3")
    assert names(work) == ["a-1.png", "a-2.png", "a-3.png"]


def test_older_picture_is_replaced(run: Run, work: Path) -> None:
    (work / "a.png").write_text("old")
    run("x", "--output", "a.png")
    assert pixels(work / "a.png").shape == (16, 16, 3)
    assert names(work) == ["a.png"]


# --- what is printed


def test_json(run: Run, work: Path) -> None:
    out, err = run("x", "--json", "--seed", "3", "--num-images", "2", "-o", str(work / "p.png"))
    assert err == ""
    assert out.count("\n") == 1
    document = json.loads(out)
    assert set(document) == {"images", "seed", "seconds"}
    assert document["seed"] == 3
    assert document["images"] == [
        {"path": str(work / "p-1.png"), "seed": 3},
        {"path": str(work / "p-2.png"), "seed": 4},
    ]
    stages = {"load", "text_encoder", "denoise", "step", "vae_decoder", "total", "save", "command"}
    assert set(document["seconds"]) == stages
    assert all(seconds >= 0 for seconds in document["seconds"].values())


def test_json_tells_a_random_seed(run: Run, work: Path) -> None:
    document = json.loads(run("x", "--json")[0])
    assert names(work) == [f"x-{document['seed']}.png"]


def test_quiet(run: Run) -> None:
    assert run("x", "--quiet") == ("", "")
    assert run("a " * 90, "-q") == ("", "")  # it says: errors only
    assert json.loads(run("x", "--quiet", "--json")[0])["images"]


def test_no_bar_where_there_is_no_terminal(run: Run) -> None:
    out, err = run("x", "--seed", "1")
    assert err == ""
    assert len(out.splitlines()) == 2


def test_prompt_over_the_token_limit(run: Run, work: Path) -> None:
    _, err = run("a " * 300 + "this is  not read", "--output", "a.png")
    assert err == (
        "sd-run: warning: the prompt is over 4 chunks of 75 tokens; this end of it is not read: "
        "'this is not read'\n"
    )
    assert names(work) == ["a.png"]


# --- what is drawn


def test_recipe_in_the_picture_draws_it_again_bit_for_bit(run: Run, work: Path) -> None:
    choices = ["--sampler", "ddim", "--eta", "0.5", "--rng", "cpu", "--height", "20", "--width", "24"]
    run("a cat — 🐈", "--negative-prompt", "dog", "--guidance-scale", "3.5", "-o", "a.png", *choices, steps=3)
    with Image.open(work / "a.png") as image:
        assert image.size == (24, 20)
        recipe = json.loads(image.info["sdrt"])
        assert image.info["parameters"] == (
            "a cat — 🐈\nNegative prompt: dog\n"
            f"Steps: 3, Sampler: DDIM, CFG scale: 3.5, Seed: {recipe['seed']}, Size: 24x20, "
            f"Eta: 0.5, RNG: CPU, Model: tiny, Version: sdrt {recipe['version']}"
        )
    options = {
        "--negative-prompt": "negative_prompt",
        "--steps": "num_inference_steps",
        "--guidance-scale": "guidance_scale",
        "--seed": "seed",
        "--height": "height",
        "--width": "width",
        "--sampler": "sampler",
        "--eta": "eta",
        "--rng": "rng",
    }
    again = [word for option, key in options.items() for word in (option, str(recipe[key]))]
    run(recipe["prompt"], *again, "-o", "b.png", steps=None)
    assert (work / "b.png").read_bytes() == (work / "a.png").read_bytes()


def test_karras_is_in_the_recipe(run: Run, work: Path) -> None:
    run("x", "--karras", "-o", "a.png")
    run("x", "-o", "b.png")
    recipes = []
    for name in ("a.png", "b.png"):
        with Image.open(work / name) as image:
            recipes.append(json.loads(image.info["sdrt"]))
    assert [recipe["karras"] for recipe in recipes] == [True, False]


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (["--steps", "3"], ["--num-inference-steps", "3"]),
        (["--steps", "3", "--num-images", "1"], ["--steps", "3", "--num-images-per-prompt", "1"]),
        (["--steps", "3", "-o", "b.png"], ["--steps", "3", "--output", "b.png"]),
    ],
)
def test_long_names_are_the_same(run: Run, work: Path, short: list[str], long: list[str]) -> None:
    seen = []
    for words in (short, long):
        run("x", "--seed", "1", "-o", "b.png", *words, steps=None)
        seen.append((work / "b.png").read_bytes())
        (work / "b.png").unlink()
    assert seen[0] == seen[1]


def test_defaults_are_the_bundles(run: Run, work: Path) -> None:
    run("x", "--seed", "1", "-o", "a.png", steps=None)
    run(
        *["x", "--seed", "1", "-o", "b.png", "--steps", "20", "--guidance-scale", "7.5"],
        *["--sampler", "dpmpp_2m", "--height", "16", "--width", "16", "--rng", "philox"],
        steps=None,
    )
    assert (work / "a.png").read_bytes() == (work / "b.png").read_bytes()


def test_backend_that_auto_took_and_why(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU is nothing to be told about each time; a GPU that is not used is."""

    def not_there(_number: int = 0) -> discovery.Gpu:
        raise BackendError(f"{discovery.NO_DRIVER}: libcuda.so.1: cannot open; install the driver")

    def unusable(_number: int = 0) -> discovery.Gpu:
        raise BackendError("no NVIDIA GPU number 0 can be used: cuDeviceGet says no")

    why = r"sd-run: backend ([a-z-]+) \(tensorrt.*{}.*\1: .*\)\n"
    monkeypatch.setattr(discovery, "find_gpu", not_there)
    assert re.fullmatch(r"sd-run: backend [a-z-]+\n", run("x", "--backend", "auto")[1])
    assert re.fullmatch(why.format("libcuda.so.1"), run("x", "--backend", "auto", "--verbose")[1])
    assert run("x", "--backend", "auto", "--quiet")[1] == ""
    monkeypatch.setattr(discovery, "find_gpu", unusable)
    assert re.fullmatch(why.format("cuDeviceGet says no"), run("x", "--backend", "auto")[1])


def test_unverified_and_threads(run: Run, work: Path) -> None:
    run("x", "--no-verify", "--threads", "1", "-o", "a.png")
    assert names(work) == ["a.png"]
