"""``sd-run --interactive``: requests and results line by line, and what a bad request leaves behind."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.runs.sd_run_terminal import SD_RUN

from sdrt.runtime.cli import interactive
from sdrt.runtime.pipeline import Pipeline

SHORT: dict[str, Any] = {"num_inference_steps": 2}
RESULT = {"id", "paths", "seeds", "seconds", "recipes"}


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Pipeline:
    return Pipeline.load(tiny_bundle, backend="onnxruntime-cpu")


@pytest.fixture
def serve(pipeline: Pipeline, work: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Gives lines to the loop, in this process; returns its answers after the first line."""

    def serve(*lines: bytes | dict[str, Any], output: Path | None = None, warm_up: bool = False) -> list[Any]:
        given = b"".join(
            line if isinstance(line, bytes) else json.dumps({**SHORT, **line}).encode() + b"\n"
            for line in lines
        )
        defaults: dict[str, Any] = {"guidance_scale": 3.0, "num_images_per_prompt": 1, "seed": None}
        stream = io.BytesIO(given)
        interactive.serve(pipeline, defaults, output, load_seconds=0.5, warm_up=warm_up, stream=stream)
        out, err = capsys.readouterr()
        assert err == ""
        ready, *answers = map(json.loads, out.splitlines())
        assert ready["ready"]["backend"] == "onnxruntime-cpu"
        assert ready["ready"]["reasons"] == list(pipeline.backend_reasons)
        assert set(ready["ready"]["seconds"]) == ({"load", "warm_up"} if warm_up else {"load"})
        return answers

    return serve


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Process:
    """The command as a process, line by line."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.process = subprocess.Popen(
            [SD_RUN, "--interactive", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
        )

    def ask(self, request: dict[str, Any] | str) -> Any:
        assert self.process.stdin is not None
        line = request if isinstance(request, str) else json.dumps(request)
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def end(self) -> tuple[int, str]:
        """Close its input; its status and what stands on stderr."""
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


@pytest.fixture
def process(tiny_bundle: Path, work: Path) -> Iterator[Process]:
    started = Process("--bundle", str(tiny_bundle), "--backend", "onnxruntime-cpu", "--steps", "2", cwd=work)
    yield started
    started.process.kill()
    started.process.wait()


# --- as a process


def test_conversation(process: Process, work: Path, pipeline: Pipeline) -> None:
    """Each answer comes before the next request is made; the end of the input ends it with status 0."""
    ready = process.answer()["ready"]
    assert ready["backend"] == "onnxruntime-cpu"
    assert ready["seconds"]["load"] > 0
    first = process.ask({"prompt": "a red apple", "seed": 5, "output": "a.png", "id": {"any": ["thing"]}})
    assert set(first) == RESULT
    assert (first["id"], first["paths"], first["seeds"]) == ({"any": ["thing"]}, ["a.png"], [5])
    assert first["recipes"][0]["num_inference_steps"] == 2  # the command line's, by default
    wrong = process.ask({"prompt": "x", "sampler": "eular", "id": 2})
    assert (wrong["id"], wrong["status"]) == (2, 2)
    assert "did you mean euler?" in wrong["error"]
    assert process.ask("no JSON")["status"] == 2
    again = process.ask({"prompt": "a red apple", "seed": 5})
    assert again["paths"] == ["a-red-apple-5.png"]
    assert (work / "a.png").read_bytes() == (work / "a-red-apple-5.png").read_bytes()
    expected = pipeline("a red apple", seed=5, num_inference_steps=2)
    with Image.open(work / "a.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(expected.images[0]))
    assert process.end() == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("busy", [False, True])
def test_signals(process: Process, work: Path, number: signal.Signals, busy: bool) -> None:
    """While it waits for a request, and while it draws one."""
    process.answer()
    if busy:
        assert process.process.stdin is not None
        request = {"prompt": "x", "num_inference_steps": 499, "num_images_per_prompt": 200}
        process.process.stdin.write(json.dumps(request) + "\n")
        process.process.stdin.flush()
        time.sleep(0.5)
    process.process.send_signal(number)
    status, err = process.end()
    finished = r"of 200 pictures (\d+) were finished and saved, each whole: .*"
    told = re.fullmatch(rf"sd-run: interrupted; (?:nothing unfinished was left behind|{finished})\n", err)
    assert status == 130
    assert told, err
    assert len(names(work)) == int(told[1] or 0)  # a fast machine may have finished some
    assert busy or told[1] is None


def test_reader_that_goes_away(process: Process, work: Path) -> None:
    """The picture is there, but its answer is not: no success."""
    process.answer()
    assert process.process.stdout is not None
    process.process.stdout.close()
    assert process.process.stdin is not None
    process.process.stdin.write(json.dumps({"prompt": "x"}) + "\n")
    process.process.stdin.flush()
    assert process.process.wait(timeout=60) == 8
    assert process.process.stderr is not None
    line = "sd-run: cannot write to standard output: its reader has gone\n"
    assert process.process.stderr.read() == line
    assert len(names(work)) == 1


def test_nothing_is_drawn_for_an_empty_input(tiny_bundle: Path, work: Path) -> None:
    command = [SD_RUN, "--interactive", "--bundle", str(tiny_bundle), "--quiet"]
    result = subprocess.run(command, input="", capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert set(json.loads(result.stdout)) == {"ready"}


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_closed_input_or_output(tiny_bundle: Path, work: Path, closed: str) -> None:
    command = ["sh", "-c", f'"$0" "$@" {closed}', SD_RUN, "--interactive", "--bundle", str(tiny_bundle), "-q"]
    result = subprocess.run(command, input="", capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert "standard input and output: one of them is closed" in result.stderr


def test_default_of_base64(tiny_bundle: Path, work: Path) -> None:
    command = [SD_RUN, "--interactive", "--bundle", str(tiny_bundle), "-q", "-o", "base64", "--steps", "2"]
    request = json.dumps({"prompt": "x"})
    result = subprocess.run(command, input=request, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(json.loads(result.stdout.splitlines()[1])["png"]) == 1
    assert names(work) == []


def test_bundle_that_cannot_be_used(work: Path) -> None:
    command = [SD_RUN, "--interactive", "--bundle", "nowhere"]
    result = subprocess.run(command, input="", capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (3, "")
    assert "no bundle at nowhere" in result.stderr


# --- results


def test_base64_writes_no_file(serve: Any, pipeline: Pipeline, work: Path) -> None:
    request = {"prompt": ["a", "b"], "seed": [3, 9], "output": "base64"}
    (result,) = serve(request)
    assert set(result) == (RESULT - {"paths"}) | {"png"}
    assert names(work) == []
    expected = pipeline(["a", "b"], seed=[3, 9], guidance_scale=3.0, **SHORT)
    for text, picture, recipe in zip(result["png"], expected.images, expected.recipes, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
            assert np.array_equal(np.asarray(image), np.asarray(picture))
            assert json.loads(image.info["sdrt"]) == recipe
    assert result["recipes"] == list(expected.recipes)


def test_base64_for_all_requests(serve: Any, work: Path) -> None:
    plain, named = serve({"prompt": "x"}, {"prompt": "x", "output": "a.png"}, output=Path("base64"))
    assert len(plain["png"]) == 1
    assert named["paths"] == names(work) == ["a.png"]


def test_recipe_of_a_result_is_a_request(serve: Any, work: Path) -> None:
    (first,) = serve({"prompt": "a cat", "sampler": "ddim", "eta": 0.5, "output": "a.png"})
    serve({**first["recipes"][0], "output": "b.png"})
    assert (work / "a.png").read_bytes() == (work / "b.png").read_bytes()


def test_where_pictures_go(serve: Any, work: Path) -> None:
    (work / "folder").mkdir()
    results = serve(
        {"prompt": "x", "seed": 1},
        {"prompt": "x", "seed": 1},
        {"prompt": "x", "seed": 1, "output": "folder", "num_images_per_prompt": 2},
        {"prompt": "x", "seed": 1, "output": "b.png", "num_images_per_prompt": 2},
    )
    assert [result["paths"] for result in results] == [
        ["x-1.png"],
        ["x-1-2.png"],
        ["folder/x-1.png", "folder/x-2.png"],
        ["b-1.png", "b-2.png"],
    ]
    (result,) = serve({"prompt": "y", "seed": 1}, output=Path("folder"))
    assert result["paths"] == ["folder/y-1.png"]


def test_every_picture_of_a_list_has_a_file_of_its_own(serve: Any, work: Path) -> None:
    """Named after its own prompt; two of one name do not take each other's place."""
    (result,) = serve({"prompt": ["x", "y", "x!"], "seed": [3, 3, 3]})
    assert result["paths"] == ["x-3.png", "y-3.png", "x-3-2.png"]
    for path, recipe in zip(result["paths"], result["recipes"], strict=True):
        with Image.open(work / path) as image:
            assert json.loads(image.info["sdrt"]) == recipe


def test_warnings_come_with_the_result(serve: Any) -> None:
    many = {"num_images_per_prompt": 3}
    long, plain = serve(
        {"prompt": "a " * 301, "output": "base64", **many}, {"prompt": "a", "output": "base64"}
    )
    assert "over 4 chunks of 75 tokens" in long["warnings"][0]
    assert len(long["warnings"]) == 1  # though two batches were drawn
    assert "warnings" not in plain


def test_warm_up_leaves_no_file(serve: Any, pipeline: Pipeline, work: Path) -> None:
    assert serve(warm_up=True) == []
    assert names(work) == []


def test_last_line_without_an_end_and_empty_lines(serve: Any) -> None:
    request = json.dumps({"prompt": "x", "output": "base64", **SHORT}).encode()
    assert len(serve(b"\n  \n\r\n", request)) == 1


# --- bad requests


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        (b"\xff\n", 2, "a request is one line of JSON"),
        (b"[1, 2]\n", 2, "a request is list: a JSON object is wanted"),
        (b"5\n", 2, "a request is int"),
        (b"{\n", 2, "a request is one line of JSON"),
        (b'{"prompt": "x", "eta": NaN}\n', 2, "NaN is no finite number"),
        (b'{"prompt": "x", "eta": 1e999}\n', 2, "1e999 is no finite number"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}\n", 2, "a request is one line of JSON"),
        (b"[" * 100_000 + b"\n", 2, "a request is one line of JSON"),
        (b'{"prompt": ' + b"[" * 65 + b"]" * 65 + b"}\n", 2, "nested more than 64 deep"),
        ({"prompt": "x" * 50_001}, 2, "a prompt has 50001 characters, the limit is 50000"),
        ({"prompt": ["x" * 25_000 + str(n) for n in range(41)]}, 2, "at most 1000000"),
        ({"prompt": "x", "output": "\x1b[2J\u202egnp.a/b"}, 8, "\\u001b[2J\\u202egnp.a"),
        (b'{"prompt": "' + b"x" * (1 << 24) + b'"}\n', 2, "a request of more than 16777216 bytes"),
        ({}, 2, "a request needs a prompt"),
        (
            {"prompt": "x", "steps": 3},
            2,
            "a request has no steps, did you mean num_inference_steps? there is prompt, negative_prompt",
        ),
        ({"prompt": "x", "latents": []}, 2, "a request has no latents"),
        ({"prompt": "x", "output_type": "device"}, 2, "a request has no output_type"),
        ({"prompt": 5}, 2, "a prompt is int"),
        ({"prompt": "\ud800"}, 2, "not Unicode text"),
        ({"prompt": "x", "height": 18}, 2, "height is 18: this bundle draws multiples of 4"),
        ({"prompt": "x", "seed": -2}, 2, "seed is -2"),
        ({"prompt": "x", "seed": 1.5}, 2, "seed is 1.5"),
        ({"prompt": "x", "original_size": [8, 8]}, 2, "only a bundle of SDXL or the SDXL refiner or "),
        ({"prompt": "x", "output": 5}, 2, "output is 5: a path or 'base64'"),
        (
            {"prompt": "x", "output": "a.gif"},
            2,
            "a name that ends in .png, .jpg, .jpeg or .webp, or a folder",
        ),
        ({"prompt": "x", "output": "missing/a.png"}, 8, "the folder missing does not exist"),
        ({"prompt": "x", "output": "a\u0000.png"}, 8, "cannot write"),
    ],
    ids=lambda value: None if not isinstance(value, str) else value[:30],
)
def test_bad_request(serve: Any, work: Path, line: Any, status: int, words: str) -> None:
    """It is answered in a line, nothing is written, and the next request works."""
    wrong, right = serve(line, {"prompt": "x", "output": "base64"})
    assert set(wrong) == {"id", "error", "status"}
    assert wrong["status"] == status
    assert words in wrong["error"]
    assert "\n" not in wrong["error"]
    assert len(wrong["error"]) < 800
    assert len(right["png"]) == 1
    assert names(work) == []


def test_a_panic_of_the_tokenizer_is_answered(
    serve: Any, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the loop goes on."""
    panic = type("PanicException", (BaseException,), {})

    class Rust:
        def encode(self, *_: object, **__: object) -> None:
            raise panic("range end index out of range")

    encoder: Any = pipeline._encoder
    tokenizer = encoder._encoders[0].tokenizer
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "_rust", Rust())
        (wrong,) = serve({"prompt": "never tokenized before", "output": "base64"})
    assert wrong["status"] == 3
    assert "the bundle's tokenizer fails on the prompt (range end index out of range)" in wrong["error"]
    (right,) = serve({"prompt": "never tokenized before", "output": "base64"})
    assert len(right["png"]) == 1


def test_fault_of_our_own_is_answered(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(interactive, "encoded", fail)
    (wrong,) = serve({"prompt": "x", "output": "base64", "id": 7})
    assert wrong == {"id": 7, "error": "internal error: ZeroDivisionError: division by zero", "status": 1}
