"""The parent's side of the worker protocol, against workers that misbehave."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from sdrt.benchmarks.harness.free_memory import available_memory
from sdrt.benchmarks.harness.worker_process import RefusedError, Worker, WorkerError, worker_environment

FAKE = Path(__file__).with_name("fake_worker.py")


def start(folder: Path, told: str = "@", timeout: float = 20.0) -> Worker:
    return Worker(
        (sys.executable, "-S", "-E", str(FAKE), "fake", str(folder / "order"), told),
        environment=worker_environment(1, {}),
        log=folder / "log",
        timeout=timeout,
    )


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def load(worker: Worker, timeout: float = 20.0) -> dict[str, object]:
    return worker.request("load", timeout=timeout, model="m", threads=1)


def test_a_worker_answers_and_ends(tmp_path: Path) -> None:
    with start(tmp_path) as worker:
        assert load(worker)["versions"] == {"fake": "1.0"}
        assert 0 < worker.start_seconds < 20
        memory = worker.memory()
        assert memory["VmHWM"] >= memory["VmRSS"] > memory["RssAnon"] > 1 << 20
    assert gone(worker.pid)
    assert (tmp_path / "order").read_text().split() == ["fake", "load"]


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("exit@load", "exit status 3; its last line: the library says why"),
        ("kill@load", "killed (SIGKILL), as happens where memory runs out"),
        ("crash@load", "ended by SIGSEGV"),
        ("garbage@load", "wrote 'Downloading: 10%', which is no answer"),
    ],
)
def test_what_became_of_a_worker_is_said(tmp_path: Path, told: str, says: str) -> None:
    with start(tmp_path, told) as worker, pytest.raises(WorkerError) as caught:
        load(worker)
    assert says in str(caught.value)
    assert gone(worker.pid)


@pytest.mark.parametrize("told", ["exit@start", "garbage@start"])
def test_a_worker_that_does_not_start(tmp_path: Path, told: str) -> None:
    with pytest.raises(WorkerError, match=r"its last line: the library|which is no answer"):
        start(tmp_path, told)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="cannot be started: No such file"):
        Worker(("/no/such/python",), environment={}, log=tmp_path / "log")


def test_a_timeout_ends_a_worker_and_all_it_started(tmp_path: Path) -> None:
    worker = start(tmp_path, "children@load")
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"no answer within 0.5 s"):
        load(worker, timeout=0.5)
    assert time.monotonic() - started < 5
    assert gone(worker.pid)
    assert gone(int((tmp_path / "order").read_text()))  # a child in a session of its own


def test_what_is_refused_leaves_the_worker_usable(tmp_path: Path) -> None:
    with start(tmp_path, "refuse@stage") as worker:
        with pytest.raises(RefusedError, match="ValueError: not that"):
            worker.request("stage", timeout=20, repeats=1)
        assert load(worker)["ok"]


def test_a_stopped_worker_answers_only_when_it_goes_on(tmp_path: Path) -> None:
    with start(tmp_path) as worker:
        worker.pause()
        time.sleep(0.05)
        assert Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        worker.resume()
        assert load(worker)["ok"]
        worker.pause()  # closing wakes it
    assert gone(worker.pid)


def test_anonymous_memory_is_watched_while_it_works(tmp_path: Path) -> None:
    with start(tmp_path) as worker:
        worker.request("load", timeout=20, sample=True, model="m", threads=1)
        assert worker.peak_anonymous >= worker.memory()["RssAnon"] * 0.5
        assert worker.peak_anonymous > 1 << 20


def test_memory_of_the_machine_and_of_nobody() -> None:
    assert 1 << 24 < available_memory() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
