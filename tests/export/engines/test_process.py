"""The process around a build: what it says is passed on, how it dies is reported, it never outlives us."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from sdrt.export.engines.child import Events, Progress
from sdrt.export.engines.process import run_build
from sdrt.runtime.errors import BackendError, OutputError, SdrtError

# A child with the protocol of sdrt.export.engines.child: argv is the job's file, events go to stdout.
START = (
    "import json, os, sys; out = os.dup(1); os.dup2(2, 1);"
    "send = lambda **e: os.write(out, (json.dumps(e) + '\\n').encode());"
)


def child(*lines: str) -> list[str]:
    return [sys.executable, "-c", "\n".join((START, *lines))]


def alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_nothing_is_imported_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dataclasses.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackendError, match=r"ended with status 1 \(KeyError: 'work'\)"):
        run_build({}, tmp_path)


def test_progress_and_the_result_come_back(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    result = run_build(
        {"flavour": "x"},
        tmp_path,
        on_phase=lambda phase, fraction: seen.append((phase, fraction)),
        command=child(
            "job = json.load(open(sys.argv[1]))",
            "print('chatter on stdout', flush=True); os.write(2, b'and on stderr')",
            "send(event='progress', phase='Building', fraction=0.25)",
            "send(event='done', build_seconds=1.5, peak_bytes=7, facts={'flavour': job['flavour']})",
        ),
    )
    assert seen == [("Building", 0.25)]
    assert (result.seconds, result.peak_bytes, result.facts) == (1.5, 7, {"flavour": "x"})
    assert (tmp_path / "build.log").read_text() == "chatter on stdout\nand on stderr"


@pytest.mark.parametrize(("status", "kind"), [(7, BackendError), (8, OutputError), (1, SdrtError)])
def test_an_error_of_the_child_is_raised_as_it_is(tmp_path: Path, status: int, kind: type[SdrtError]) -> None:
    command = child(f"send(event='error', message='no such kernel', status={status}); sys.exit(1)")
    with pytest.raises(kind, match=r"^no such kernel$") as caught:
        run_build({}, tmp_path, command=command)
    assert type(caught.value) is kind


def test_a_child_that_is_killed_looks_like_too_little_memory(tmp_path: Path) -> None:
    command = child("import time", "ballast = b'x' * (300 << 20)", "time.sleep(1)", "os.kill(os.getpid(), 9)")
    with pytest.raises(BackendError, match=r"killed, as .* when memory runs out; it held up to 0\.[3-9] GiB"):
        run_build({}, tmp_path, command=command)


def test_a_child_that_aborts_says_why(tmp_path: Path) -> None:
    command = child("os.write(2, b'terminate called\\nstd::bad_alloc\\n')", "os.abort()")
    with pytest.raises(BackendError, match=r"died of SIGABRT \(std::bad_alloc\)"):
        run_build({}, tmp_path, command=command)


def test_a_child_that_ends_without_a_word_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"ended with status 0 \(it said nothing\)"):
        run_build({}, tmp_path, command=child("pass"))


def test_an_interrupt_ends_a_child_that_listens(tmp_path: Path) -> None:
    command = child("print(os.getpid(), flush=True)", "sys.stdin.read()", "print('asked to stop')")
    _interrupt_soon(tmp_path / "build.log")
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_build({}, tmp_path, command=command)
    assert time.monotonic() - started < 3
    pid, said = (tmp_path / "build.log").read_text().split(maxsplit=1)
    assert said.strip() == "asked to stop"
    assert not alive(int(pid))


def test_an_interrupt_ends_a_child_that_does_not_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdrt.export.engines.process.GRACE", 0.3)
    command = child("import time", "print(os.getpid(), flush=True)", "time.sleep(60)")
    _interrupt_soon(tmp_path / "build.log")
    with pytest.raises(KeyboardInterrupt):
        run_build({}, tmp_path, command=command)
    assert not alive(int((tmp_path / "build.log").read_text()))


def _interrupt_soon(log: Path) -> None:
    """Send this process SIGINT when the child has said its first word."""

    def send() -> None:
        while not (log.exists() and log.stat().st_size):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()


# --- the child's side ---


def test_progress_is_the_share_of_nested_steps(tmp_path: Path) -> None:
    with (tmp_path / "events").open("w") as stream:
        stop = threading.Event()
        progress = Progress(Events(os.dup(stream.fileno())), stop)
        assert progress.fraction() == 0.0
        progress.phase_start("build", None, 4)
        assert progress.step_complete("build", 0)
        progress.phase_start("graph", "build", 2)
        assert progress.step_complete("graph", 0)
        assert progress.fraction() == pytest.approx((1 + 1 / 2) / 4)
        progress.phase_start("cast", "graph", 0)  # a phase of no steps
        assert progress.step_complete("cast", 0)
        assert progress.fraction() == pytest.approx((1 + 2 / 2) / 4)
        progress.phase_finish("graph")  # ends what is inside too
        assert progress.fraction() == pytest.approx(1 / 4)
        assert progress.step_complete("unheard of", 3)
        stop.set()
        assert not progress.step_complete("build", 1)
        progress.phase_finish("build")
        assert progress.fraction() == 0.0
    assert '"event": "progress"' in (tmp_path / "events").read_text()
