"""Nothing of sdrt, and nothing of what it loads, asks the network or leaves files but those of its own cache.

Run as by a user who has a fresh home and no variable that would switch anything off.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.runs.system_calls import Watched, missing_strace, watched

import sdrt.runtime.system.telemetry

DRAW = ("a red apple", "--steps", "1", "--quiet", "--output", "apple.png")


@pytest.fixture(autouse=True)
def _strace() -> None:
    if reason := missing_strace():
        pytest.skip(reason)


def assert_quiet(run: Watched, cache: str = "home/.cache/sdrt/") -> None:
    assert run.status == 0, run.errors
    assert run.network == []
    assert [file for file in run.left if not file.startswith(cache)] == []


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "openvino-cpu"])
def test_drawing_is_quiet(tmp_path: Path, backend: str) -> None:
    run = watched(["sd-run", *DRAW, "--backend", backend], tmp_path)
    assert_quiet(run)
    assert run.errors == ""
    assert (tmp_path / "apple.png").stat().st_size > 0


def test_exporting_is_quiet(tiny_checkpoint: Path, tmp_path: Path) -> None:
    one_thread = {"OMP_NUM_THREADS": "1"}  # PyTorch's wait for each other where others have the cores
    one_size = ["--height", "16", "--width", "16", "--batch", "1", "--chunks", "1"]  # half the work
    words: list[str | Path] = ["sd-export", tiny_checkpoint, "bundle", "--quiet", *one_size]
    run = watched(words, tmp_path, one_thread)
    assert_quiet(run)
    assert run.errors == ""


def test_benchmarks_are_quiet(tmp_path: Path) -> None:
    """The harness and a worker of sdrt's own; peers run in environments of their own."""
    words = ["emoji", "--peers", "none", "--backends", "onnxruntime-cpu", "--quick"]
    assert_quiet(watched(["sd-bench", *words], tmp_path))


def test_watching_sees_a_look_up(tmp_path: Path) -> None:
    """The tests above would fail if something asked."""
    code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 9))"
    run = watched(["python", "-c", f"open('{tmp_path}/home/trace', 'w'); {code}"], tmp_path)
    assert run.network != []
    assert run.left == ["home/trace"]


def test_a_home_that_cannot_be_written_is_nothing_to_speak_of(tmp_path: Path) -> None:
    run = watched(["sd-run", *DRAW, "--backend", "onnxruntime-cpu"], tmp_path, {"HOME": "/proc/nowhere"})
    assert (run.status, run.errors, run.network, run.left) == (0, "", [], [])


def test_who_wants_telemetry_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    sdrt.runtime.system.telemetry.switch_telemetry_off()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
