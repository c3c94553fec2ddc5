"""Commands end soon and cleanly at any moment, and what a program of somebody else's is left with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from support.runs.interrupt_many import COMMANDS, ENDED, RIGHT, SWALLOWED, interrupt_many
from support.runs.sd_run_terminal import SD_RUN

from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.system import interrupts
from sdrt.runtime.system.interrupts import finishing, telling, unwinding
from sdrt.runtime.system.side_by_side import SideBySide

# A command of our own, whose moments are known.
COMMAND = """
import os, sys, time
from pathlib import Path
from sdrt.runtime.console.run_command import run_command
from sdrt.runtime.console.enter import enter
from sdrt.runtime.system.files import new_folder, write_atomically
from sdrt.runtime.system.interrupts import finishing, unwinding

def ready():
    print("ready", flush=True)

def body():
{body}

def main():
    return run_command("command", body)

sys.exit(enter("command", lambda: main))
"""
SLEEPS = "time.sleep(60)"
IN_A_LIBRARY = "import ctypes; ready(); ctypes.CDLL(None).sleep(60)"  # no bytecode runs meanwhile
WORDS = "command: interrupted; nothing unfinished was left behind\n"


def started(folder: Path, body: str, *before: str) -> subprocess.Popen[str]:
    """The command in a process, as soon as it says that it is ready."""
    script = folder.parent / "command.py"
    script.write_text(COMMAND.format(body=textwrap.indent(textwrap.dedent(body), "    ")))
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [*before, sys.executable, str(script)], cwd=folder, stdout=pipe, stderr=pipe, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder to work in."""
    place = tmp_path / "work"
    place.mkdir()
    return place


@pytest.mark.parametrize(("command", "count", "longest"), [("sd-run", 20, 0.6), ("sd-export", 4, 4.0)])
def test_the_start_can_be_interrupted_at_any_moment(command: str, count: int, longest: float) -> None:
    """`tests/support/runs/interrupt_many.py` does so 2,000 times. How soon depends on what else runs here."""
    results = interrupt_many((command, *COMMANDS[command]), count, longest, seed=int(time.time()))
    assert all(result.outcome in RIGHT for result in results), results
    assert all(result.seconds < 10 for result in results if result.outcome != SWALLOWED), results
    assert any(result.outcome == ENDED for result in results)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("body", [f"ready(); {SLEEPS}", IN_A_LIBRARY], ids=["Python", "library"])
def test_it_ends_wherever_it_is(folder: Path, number: signal.Signals, body: str) -> None:
    process = started(folder, body)
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("", WORDS)
    assert process.returncode == 130


def test_nohup_is_kept(folder: Path) -> None:
    process = started(folder, "ready(); time.sleep(1); print('done')", "nohup")
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=30)[0] == "done\n"
    assert process.returncode == 0


def test_other_signals_are_no_interrupt(folder: Path) -> None:
    body = "import signal; signal.signal(signal.SIGALRM, print); signal.alarm(1); ready(); time.sleep(1.5)"
    process = started(folder, body)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 0


def test_a_folder_that_is_written_to_is_removed(folder: Path) -> None:
    """While another thread goes on to write into it, for as long as there is one."""
    body = """
    with new_folder(Path("out")) as place:
        for count in range(10**9):
            if count == 100:
                ready()
            (place / str(count)).write_bytes(b"half")
    """
    process = started(folder, body)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == ("", WORDS)
    assert process.returncode == 130
    assert list(folder.iterdir()) == []


def test_what_must_not_be_cut_in_two_is_finished_first(folder: Path) -> None:
    body = """
    with finishing():
        ready()
        time.sleep(0.5)
        write_atomically(Path("a"), b"whole")
    time.sleep(60)
    """
    process = started(folder, body)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", WORDS)
    assert [path.read_bytes() for path in folder.iterdir()] == [b"whole"]


def test_an_old_folder_is_gone_when_the_new_one_is_there(folder: Path) -> None:
    """Interrupted just after the exchange: the words are true."""
    body = """
    from sdrt.runtime.system import files
    move = files._move_into_place
    def slowly(*arguments, **options):
        move(*arguments, **options)
        ready()
        time.sleep(0.5)
    files._move_into_place = slowly
    Path("out").mkdir()
    (Path("out") / "old").touch()
    with new_folder(Path("out"), replace=True) as place:
        (place / "new").touch()
    time.sleep(60)
    """
    process = started(folder, body)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", WORDS)
    assert [path.name for path in folder.rglob("*")] == ["out", "new"]


def test_a_second_interrupt_does_not_wait(folder: Path) -> None:
    process = started(folder, f"with finishing():\n    ready(); {SLEEPS}")
    process.send_signal(signal.SIGINT)
    time.sleep(interrupts.TOGETHER + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_a_command_that_has_something_to_do_is_told_by_an_exception(folder: Path) -> None:
    """And once only: the next signal ends it."""
    body = """
    with unwinding():
        try:
            ready()
            time.sleep(60)
        except KeyboardInterrupt:
            print("kept", flush=True)
            time.sleep(60)
    """
    process = started(folder, body)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "kept\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", WORDS)


def test_work_that_is_done_is_a_success(folder: Path) -> None:
    """Interrupted while the interpreter ends."""
    body = """
    import threading
    threading.Thread(target=time.sleep, args=(60,)).start()
    ready()
    """
    process = started(folder, body)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0


# --- in a program of somebody else's


def test_other_programs_are_told_by_an_exception() -> None:
    finished = []

    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        finished.append(True)

    with pytest.raises(KeyboardInterrupt), telling(lambda: "told"), unwinding(), finishing():
        terminate()
    assert finished
    assert interrupts.last_words() == "told"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_runs_beside_is_left_at_once() -> None:
    """The interrupted one does not wait for it, nor is anything more begun; the last one clears up."""
    begun, go, cleared = [], threading.Event(), threading.Event()

    def work(key: str) -> str:
        begun.append(key)
        assert go.wait(60)
        return key

    side = SideBySide(work, ["a", "b", "c"], 2)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        side.results()
    side.leave(cleared.set)
    assert not cleared.is_set()
    go.set()
    assert cleared.wait(60)
    assert sorted(begun) == ["a", "b"]


def test_loading_can_be_interrupted_and_begun_again(tiny_bundle: Path) -> None:
    """Promptly, though a library is in the middle of its work, and the process is as usable as before."""
    code = """
    import os, signal, sys, threading, time
    from sdrt.runtime import Pipeline
    from sdrt.runtime.drawing import loading
    load = loading.load_component
    def slowly(*arguments):
        time.sleep(3)
        return load(*arguments)
    loading.load_component = slowly
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    try:
        Pipeline.load(sys.argv[1], backend="onnxruntime-cpu")
    except KeyboardInterrupt:
        assert time.monotonic() - began < 2.5, time.monotonic() - began
    loading.load_component = load
    output = Pipeline.load(sys.argv[1], backend="onnxruntime-cpu")("x", seed=3, num_inference_steps=1)
    print(output.recipes[0]["seed"])
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tiny_bundle)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "3\n", "")


def test_sd_run_clears_up_what_was_killed(tiny_bundle: Path, folder: Path) -> None:
    for name in (".sdrt-0-17-0123abcd.tmp", ".sdrt-out.part-0123456789abcdef"):
        (folder / name).mkdir() if "part" in name else (folder / name).write_bytes(b"half")
    command = [SD_RUN, "x", "--bundle", str(tiny_bundle), "--steps", "1", "-o", "a.png"]
    assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0
    assert [path.name for path in folder.iterdir()] == ["a.png"]


def test_a_pipeline_says_what_is_finished(tiny_bundle: Path) -> None:
    """`callback_on_batch_end`: each picture once, in the form that was asked for, before the next batch."""
    with Pipeline.load(tiny_bundle, backend="onnxruntime-cpu") as pipeline:
        batches = []
        # The second prompt has more chunks: batches are not in the order of the pictures.
        prompts = ["a", "b BREAK c", "d"]
        output = pipeline(
            prompts,
            seed=[1, 2, 3],
            num_inference_steps=1,
            output_type="numpy",
            callback_on_batch_end=lambda one, batch: batches.append((one is pipeline, batch)),
        )
        assert [(ours, batch.numbers, batch.total) for ours, batch in batches] == [
            (True, (0, 2), 3),
            (True, (1,), 3),
        ]
        for _, batch in batches:
            assert (batch.images == output.images[list(batch.numbers)]).all()
            assert batch.recipes == tuple(output.recipes[number] for number in batch.numbers)
        with pytest.raises(ValueError, match="callback_on_batch_end is int: a function is wanted"):
            pipeline("a", callback_on_batch_end=5)  # type: ignore[arg-type]
