"""``sd-run`` on tasks beyond text to image: what is written, what is refused, and what the terminal shows."""

from __future__ import annotations

import base64
import io
import json
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence
from safetensors.numpy import save_file
from support.runs.command_here import run_here
from support.runs.sd_run_terminal import A_STEP, OnTerminal

from sdrt.runtime.cli import interactive
from sdrt.runtime.cli import work as command_work
from sdrt.runtime.cli.main import main
from sdrt.runtime.drawing.loop import DenoiseLoop
from sdrt.runtime.pictures import reading
from sdrt.runtime.pipeline import Pipeline

CPU = ("--backend", "onnxruntime-cpu")
Run = Callable[..., tuple[str, str]]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a picture of 16 pixels, a mask of its right half, and things that are none."""
    folder = tmp_path / "work"
    (folder / "frames").mkdir(parents=True)
    picture = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(picture).save(folder / "picture.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(folder / "black.png")
    Image.fromarray(mask[:8]).save(folder / "flat.png")
    (folder / "broken.png").write_bytes((folder / "picture.png").read_bytes()[:60])
    (folder / "text.png").write_text("no picture")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "large.png")
    save_file({"emb_params": np.ones((2, 16), np.float32)}, folder / "toy.safetensors")
    save_file({"emb_params": np.ones((2, 24), np.float32)}, folder / "wide.safetensors")
    (folder / "toy.pt").write_bytes(pickle.dumps([1]))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(work: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command on the tiny bundle in this process; gives stdout and stderr."""

    def run(*arguments: str, status: int = 0, bundle: Path = tiny_bundle) -> tuple[str, str]:
        given = ["--bundle", str(bundle), *CPU, "--steps", "3", *arguments]
        result, out, err = run_here(main, given, capsys)
        assert result == status, err
        return out, err

    return run


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def recipe(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        found: dict[str, Any] = json.loads(image.info["sdrt"])
        return found


OPTIONS: dict[str, list[str]] = {
    "image": ["x", "--image", "picture.png", "--strength", "0.7"],
    "mask": ["x", "--image", "picture.png", "--mask", "mask.png"],
    "expand": ["x", "--image", "picture.png", "--expand", "2,0,4,6"],
    "variation": ["--image", "picture.png"],
    "variation share": ["x", "--image", "picture.png", "--variation", "0.5"],
    "sizes": ["x", "--image", "large.png", "--height", "20", "--width", "24"],
    "clip skip": ["x", "--clip-skip", "1"],
    "plain": ["(x", "--plain-prompt"],
    "weights": ["(x:1.4) [y] BREAK z", "--negative-prompt", "(w)"],
    "embedding": ["a toy", "--embedding", "toy.safetensors", "--embedding", "toy.safetensors=<two>"],
    "interval": ["x", "--guidance-interval", "0.2,0.7", "--guidance-rescale", "0.5"],
    "schedule": ["x", "--guidance-scale", "5,3,1"],
    "sigmas": ["x", "--sampler", "euler", "--sigmas", "10,5,1,0"],
    "timesteps": ["x", "--sampler", "ddim", "--timesteps", "900,500,100"],
    "spacing": ["x", "--spacing", "trailing"],
    "sigma schedule": ["x", "--sampler", "heun", "--sigma-schedule", "exponential"],
    "order": ["x", "--sampler", "unipc", "--solver-order", "3", "--no-lower-order-final"],
    "distilled": ["x", "--sampler", "lcm", "--original-inference-steps", "20"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(run: Run, work: Path, name: str) -> None:
    """Each draws, is in the recipe, and draws something else than without it."""
    out, err = run(*OPTIONS[name], "--seed", "3", "--output", "a.png", "--json")
    assert err == ""
    assert json.loads(out)["images"] == [{"path": "a.png", "seed": 3}]
    assert recipe(work / "a.png")["seed"] == 3
    assert set(recipe(work / "a.png").get("embeddings", {})) == ({"toy"} if name == "embedding" else set())
    run("x", "--seed", "3", "--output", "plain.png")
    plain = pixels(work / "plain.png")
    assert pixels(work / "a.png").shape != plain.shape or not np.array_equal(pixels(work / "a.png"), plain)


def test_a_mask_keeps_pixels_and_expanding_keeps_the_picture(run: Run, work: Path) -> None:
    run(*OPTIONS["mask"], "--output", "masked.png")
    run(*OPTIONS["expand"], "--output", "expanded.png")
    given = pixels(work / "picture.png")
    assert np.array_equal(pixels(work / "masked.png")[:, :8], given[:, :8])
    expanded = pixels(work / "expanded.png")
    assert expanded.shape == (22, 22, 3)
    assert np.array_equal(expanded[:16, 2:18], given)


def test_a_picture_without_a_prompt_gets_a_name(run: Run, work: Path) -> None:
    out, _ = run("--image", "picture.png", "--seed", "4", "--num-images", "2")
    assert out.splitlines()[0].startswith("picture-4.png")
    assert {path.name for path in work.glob("picture-*.png")} == {"picture-4.png", "picture-5.png"}


def test_frames(run: Run, work: Path) -> None:
    options = ["a cat", "--to-prompt", "a dog", "--to-seed", "9", "--frames", "3", "--seed", "2"]
    run(*options)
    run(*options, "--output", "again.png")
    out, _ = run(*options, "--output", "frames")
    singles = [pixels(file) for file in sorted((work / "frames").iterdir())]
    for animated in ("a-cat-2.webp", "again.png"):
        with Image.open(work / animated) as image:
            frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
        assert len(frames) == len(singles) == 3
        for frame, single in zip(frames, singles, strict=True):
            assert np.array_equal(frame, single)
    assert len(out.splitlines()) == 4
    again, _ = run(*options, "--output", "frames")  # what is there stays
    assert again.splitlines()[0].startswith("frames/frame2-0000.png")
    assert len(list((work / "frames").iterdir())) == 6
    about = recipe(work / "frames" / "frame-0001.png")
    assert (about["to_prompt"], about["to_seed"], about["frame"], about["frames"]) == ("a dog", 9, 1, 3)


def test_what_a_prompt_may_mean_elsewhere_is_said_once(run: Run) -> None:
    """In the prompt and in the negative prompt, for all pictures of a call; nothing of a plain prompt."""
    prompts = ("a <lora:x:0.8> smile :)", "--negative-prompt", "[a|b]", "--steps", "1", "--num-images", "2")
    _, err = run(*prompts)
    warnings = [line for line in err.splitlines() if "warning" in line]
    assert len(warnings) == 3
    for words, line in zip(("')' that closes nothing", "'[a|b]'", "'<lora:x:0.8>'"), warnings, strict=True):
        assert words in line
    assert "warning" not in run(*prompts, "--plain-prompt")[1]
    assert run(*prompts, "--quiet")[1] == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--strength", "0.5"], "strength is given, but no image"),
        (["x", "--mask", "mask.png"], "mask_image is given, but no image"),
        (["x", "--expand", "1,1,1,1"], "expand is given, but no image"),
        (["x", "--variation", "0.5"], "variation is given, but no image"),
        (["x", "--image", "picture.png", "--strength", "0"], "strength is 0.0: a number above 0"),
        (["x", "--image", "picture.png", "--strength", "1.5"], "strength is 1.5: a number above 0"),
        (["x", "--image", "picture.png", "--strength", "-1"], "strength is -1.0"),
        (["x", "--image", "picture.png", "--strength", "nan"], "strength is nan: a finite number"),
        (["x", "--image", "gone.png"], "gone.png"),
        (["x", "--image", "."], "folder"),
        (["x", "--image", "broken.png"], "broken.png"),
        (["x", "--image", "text.png"], "text.png"),
        (["x", "--image", "https://example.org/a.png"], "download"),
        (["x", "--image", "large.png", "--mask", "mask.png"], "up to 32x32"),
        (["x", "--image", "picture.png", "--mask", "black.png"], "nothing would be drawn"),
        (["x", "--image", "picture.png", "--mask", "flat.png"], "16x8"),
        (["x", "--image", "picture.png", "--expand", "0,0,0,0"], "expand"),
        (["x", "--image", "picture.png", "--expand", "-1,0,0,0"], "expand"),
        (["x", "--image", "picture.png", "--expand", "40,0,0,0"], "up to 32"),
        (["x", "--image", "picture.png", "--expand", "1,2,3"], "four"),
        (["x", "--image", "picture.png", "--expand", "1,2,3,x"], "invalid list of whole numbers value"),
        (["x", "--image", "picture.png", "--variation", "2"], "variation is 2.0: a number from 0 to 1"),
        (
            ["x", "--image", "picture.png", "--variation", "0.5", "--mask", "mask.png"],
            "variation and mask_image are given",
        ),
        (["--image", "picture.png", "--mask", "mask.png"], "the prompt is missing"),
        (["x", "--comma-lookback", "-1"], "comma_lookback is -1: a number of tokens is wanted"),
        (["x", "--negative-prompt", "(y:99)"], "a number from -10 to 10"),
        (["x", "--clip-skip", "7"], "clip_skip is 7"),
        (["x", "--clip-skip", "-1"], "clip_skip is -1"),
        (["x", "--embedding", "gone.safetensors"], "gone.safetensors"),
        (["x", "--embedding", "wide.safetensors"], "24"),
        (["x", "--embedding", "toy.pt"], "is a pickle"),
        (["x", "--embedding", "picture.png"], "safetensors"),
        (["x", "--guidance-interval", "0.8,0.2"], "0 <= start < stop <= 1"),
        (["x", "--guidance-interval", "0.5"], "guidance_interval is [0.5]"),
        (["x", "--guidance-rescale", "1.5"], "guidance_rescale is 1.5: a number from 0 to 1"),
        (["x", "--guidance-scale", "5,3"], "guidance_scale holds 2 numbers"),
        (["x", "--sampler", "ddim", "--sigmas", "5,0"], "ddim has no sigmas"),
        (["x", "--sampler", "euler", "--sigmas", "5,1"], "the last must be 0"),
        (["x", "--karras", "--sigma-schedule", "beta"], "contradict each other"),
        (["x", "--sampler", "euler", "--solver-order", "2"], "euler has no solver_order"),
        (["x", "--frames", "3"], "--frames and --fps go with --to-prompt or --to-seed"),
        (["x", "--to-prompt", "y", "--frames", "1"], "frames is 1: a whole number from 2"),
        (["x", "--to-prompt", "y", "--fps", "0"], "fps is 0.0"),
        (["x", "--to-prompt", "x"], "nothing differs"),
        (["x", "--image", "picture.png", "--variation", "0.1", "--timesteps", "300,100"], "and timesteps"),
        (["x", "--sampler", "euler", "--sigmas", "1e200,1,0"], "allowed are numbers from 0 to 1e+06"),
        (["x", "--to-prompt", "y", "--num-images", "2"], "--frames says how many"),
        (["x", "--to-prompt", "y", "--output", "a.gif"], "a name that ends in .webp or .png"),
        (["--to-seed", "3", "--image", "picture.png"], "need a PROMPT"),
        (["--image", "picture.png", "--to-seed", "3", "x", "--variation", "0.2"], "variation is given"),
        (["x", "--output", "a.gif"], "a name that ends in .png, .jpg, .jpeg or .webp, or a folder"),
        (["x", "--to-prompt", "y", "--output", "-"], "no frames and no answers"),
        (["x", "--to-prompt", "y", "--prompt", "z"], "go from one PROMPT"),
        (["x", "--output", "a.jpg", "--quality", "101"], "quality is 101: a whole number from 1 to 100"),
    ],
)
def test_refused(run: Run, work: Path, arguments: list[str], words: str) -> None:
    """One line that helps, status 2, and no file more than before."""
    before = sorted(work.rglob("*"))
    out, err = run(*arguments, status=2)
    assert out == ""
    assert err.count("\n") == 1
    assert words in err
    assert sorted(work.rglob("*")) == before


def test_frames_are_saved_as_they_come(run: Run, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[DenoiseLoop] = []

    def start_and_look(self: DenoiseLoop, *arguments: Any, **options: Any) -> None:
        started.append(self)
        if len(started) == 2:
            assert sorted(path.name for path in (work / "frames").iterdir()) == frames[:2]
        start(self, *arguments, **options)

    start = DenoiseLoop.start
    frames = [f"frame-{number:04}.png" for number in range(4)]
    monkeypatch.setattr(DenoiseLoop, "start", start_and_look)
    run("x", "--to-prompt", "y", "--frames", "4", "--output", "frames")
    assert sorted(path.name for path in (work / "frames").iterdir()) == frames
    assert len(started) == 2


def test_kinds_of_bundles_say_what_they_need(
    run: Run, inpainting_bundle: Path, variations_bundle: Path, work: Path
) -> None:
    assert "inpainting model" in run("x", status=2, bundle=inpainting_bundle)[1]
    assert "mask_image or expand" in run("x", "--image", "picture.png", status=2, bundle=inpainting_bundle)[1]
    run("x", "--image", "picture.png", "--mask", "mask.png", "-o", "a.png", bundle=inpainting_bundle)
    assert np.array_equal(pixels(work / "a.png")[:, :8], pixels(work / "picture.png")[:, :8])
    assert "reads no text" in run("x", "--image", "picture.png", status=2, bundle=variations_bundle)[1]
    strength = ["--image", "picture.png", "--strength", "0.5"]
    assert "strength is given" in run(*strength, status=2, bundle=variations_bundle)[1]
    run("--image", "picture.png", "-o", "b.png", bundle=variations_bundle)
    assert recipe(work / "b.png")["image_sha256"]


def test_a_negative_prompt_for_a_model_that_is_told_its_guidance(
    run: Run, work: Path, lcm_bundle: Path
) -> None:
    _, err = run("x", "--negative-prompt", "y", "-o", "a.png", bundle=lcm_bundle)
    reason = "this model is told its guidance and runs one half"
    assert err == f"sd-run: warning: {reason}: the negative prompt is not used\n"


# --- what is read


@pytest.mark.parametrize(
    "arguments",
    [
        ["x"],
        ["x", "--mask", "mask.png"],
        ["x y", "--num-images", "3"],
        [],
        ["x", "--to-prompt", "y", "--frames", "2"],
        ["x", "--to-seed", "9", "--frames", "2"],
    ],
    ids=" ".join,
)
def test_a_picture_is_read_once(
    run: Run, work: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    read: list[object] = []

    def note(source: object) -> Any:
        read.append(source)
        return read_image(source)

    read_image = reading.read_image
    monkeypatch.setattr(reading, "read_image", note)
    run(*arguments, "--image", "picture.png", "--quiet")
    assert read == ["picture.png"]


def test_pictures_that_are_too_many_to_wait_are_read_again(
    run: Run, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the seeds stay those that were drawn when the line was checked."""
    line = json.dumps({"prompt": "x", "image": "picture.png"})
    (work / "many.jsonl").write_text(f"{line}\n" * 3)
    run("--prompts", "many.jsonl", "--output", "kept.png", "--seed", "5", "--quiet")
    monkeypatch.setattr(command_work, "MAX_WAITING_BYTES", 1)
    run("--prompts", "many.jsonl", "--output", "read.png", "--seed", "5", "--quiet")
    for number in (1, 2, 3):
        assert (work / f"read-{number}.png").read_bytes() == (work / f"kept-{number}.png").read_bytes()


# --- on a terminal, and interrupted


def test_preview_on_a_terminal(work: Path) -> None:
    """Of the embedded model, whose pictures are something."""
    terminal = OnTerminal(work, "a red apple", *CPU, "--steps", "5", "--preview", "-o", "a.png")
    assert terminal.end() == 0
    assert "▀" in terminal.shown
    assert "5/5" in terminal.shown


def test_preview_elsewhere_is_a_warning(run: Run) -> None:
    _, err = run("x", "--preview")
    assert err == "sd-run: warning: no preview: standard error is no terminal, or --quiet was given\n"


def test_an_animation_that_is_interrupted_leaves_nothing(tiny_bundle: Path, work: Path) -> None:
    before = sorted(work.rglob("*"))
    words = ["--to-prompt", "y", "--frames", "50", "--steps", "200", "--output", "a.webp"]
    terminal = OnTerminal(work, "x", "--bundle", str(tiny_bundle), *CPU, *words)
    terminal.read(until=A_STEP)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert "interrupted; nothing unfinished was left behind" in terminal.shown
    assert sorted(work.rglob("*")) == before


# --- lines of JSON


def test_pictures_in_lines_of_json(tiny_bundle: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = base64.b64encode((work / "picture.png").read_bytes()).decode("ascii")
    short = {"num_inference_steps": 2, "seed": 1, "output": "base64"}
    requests: list[dict[str, Any]] = [
        {"prompt": "x", "image": "picture.png", "strength": 0.5},
        {"prompt": "x", "image": f"data:image/png;base64,{data}", "strength": 0.5},
        {"prompt": "x", "image": "picture.png", "mask_image": "mask.png"},
        {"prompt": ["x", "y BREAK z"], "negative_prompt": ["", "w"], "seed": [1, 2]},
        {"image": "picture.png"},
        {"prompt": "x", "image": "data:image/png;base64,!!", "id": 7},
        {"prompt": "x", "image": "gone.png"},
    ]
    lines = b"".join(json.dumps({**short, **request}).encode() + b"\n" for request in requests)
    with Pipeline.load(tiny_bundle, backend="onnxruntime-cpu") as pipeline:
        interactive.serve(pipeline, {}, None, load_seconds=0, warm_up=False, stream=io.BytesIO(lines))
    _, *answers = map(json.loads, capsys.readouterr().out.splitlines())
    named, inline = answers[0]["recipes"][0], answers[1]["recipes"][0]
    assert named.pop("image") == "picture.png"
    assert named == inline  # and so the pictures
    first, second = (Image.open(io.BytesIO(base64.b64decode(answer["png"][0]))) for answer in answers[:2])
    assert np.array_equal(np.asarray(first), np.asarray(second))
    with Image.open(io.BytesIO(base64.b64decode(answers[2]["png"][0]))) as image:
        assert np.array_equal(np.asarray(image)[:, :8], pixels(work / "picture.png")[:, :8])
    assert [len(answer.get("png", [])) for answer in answers] == [1, 1, 1, 2, 1, 0, 0]
    assert (answers[5]["id"], answers[5]["status"]) == (7, 2)
    assert "data URI that cannot be read" in answers[5]["error"]
    assert "gone.png" in answers[6]["error"]


def served(bundle: Path, capsys: pytest.CaptureFixture[str], request: Any, **defaults: Any) -> Any:
    """The answer to a request of a loop that warms up."""
    stream = io.BytesIO(json.dumps({"num_inference_steps": 2, "output": "base64", **request}).encode())
    with Pipeline.load(bundle, backend="onnxruntime-cpu") as pipeline:
        interactive.serve(pipeline, defaults, None, load_seconds=0, warm_up=True, stream=stream)
    ready, answer = map(json.loads, capsys.readouterr().out.splitlines())
    assert ready["ready"]["seconds"]["warm_up"] > 0
    return answer


def test_the_picture_may_be_the_default(
    tiny_bundle: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = served(tiny_bundle, capsys, {}, image="picture.png")
    assert answer["recipes"][0]["variation"] == 0.3


def test_warming_up_models_that_need_a_picture(
    inpainting_bundle: Path, variations_bundle: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = {"prompt": "x", "image": "picture.png", "mask_image": "mask.png"}
    assert len(served(inpainting_bundle, capsys, request)["png"]) == 1
    assert len(served(variations_bundle, capsys, {"image": "picture.png"})["png"]) == 1
