"""Programs that are started, listened to and ended."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdrt.runtime.system.child_process import Child, process_memory, run_told

SLEEPING = "import time; print('up', flush=True); time.sleep(60)"


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def gone(pid: int) -> bool:
    """Whether a process has ended within two seconds; a zombie has."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_lines_come_one_by_one_and_then_the_end() -> None:
    with Child(python("import sys; sys.stdout.write('one\\rtwo\\n\\nthree'); sys.exit(5)")) as child:
        assert [child.next_line(20) for _ in range(4)] == [b"one", b"two", b"", b"three"]
        with pytest.raises(EOFError):
            child.next_line(20)
        assert child.status(math.inf) == 5


def test_it_is_waited_for_no_longer_than_asked() -> None:
    with Child(python(SLEEPING)) as child:
        assert child.next_line(20) == b"up"
        began = time.monotonic()
        assert child.next_line(0.1) is None
        assert child.status() is None
        assert time.monotonic() - began < 5
    assert gone(child.pid)


def test_what_is_sent_arrives_and_the_end_of_its_input_comes_before_its_own() -> None:
    code = "import sys; print(input(), flush=True); sys.stdin.read(); sys.exit(3)"
    with Child(python(code), talks=True) as child:
        child.send(b"hello")
        assert child.next_line(20) == b"hello"
        child.pause()  # and is woken to end
        child.stop(20)
        assert child.status() == 3


def test_one_that_does_not_end_is_killed_with_all_that_it_started() -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    with Child(python(code), talks=True) as child:
        below = int(child.next_line(20) or b"0")
        child.stop(0.1)
        assert child.status() == -signal.SIGKILL
    assert gone(below)


PARENT = """
import sys
from sdrt.runtime.system.child_process import Child
child = Child([sys.executable, "-c", "import time; time.sleep(1000)"])
if {stop}: child.pause()
print(child.pid, flush=True)
child.next_line(1000)
"""


@pytest.mark.parametrize("stop", [False, True])
def test_it_dies_with_its_parent(stop: bool) -> None:
    command = [sys.executable, "-c", PARENT.format(stop=stop)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.1)
        parent.kill()
        parent.wait(20)
    assert gone(pid)


def test_a_programs_output_last_words_and_status_are_kept() -> None:
    say = "print('out' * 100_000); print('a' * 100_000 + ' b', file=sys.stderr)"
    program = f"import sys; {say}; sys.exit('last  one')"
    told: list[str] = []
    ended = run_told([sys.executable, "-c", program], lambda line, _: told.append(line))
    assert (ended.status, ended.output, ended.last_line) == (1, "out" * 100_000 + "\n", "last one")
    assert told[-1] == "last one"


def test_a_program_is_ended_when_who_is_told_has_had_enough() -> None:
    def enough(_line: str, _seconds: float) -> None:
        raise KeyboardInterrupt

    began = time.monotonic()
    program = "import sys, time; print('x', file=sys.stderr, flush=True); time.sleep(100)"
    with pytest.raises(KeyboardInterrupt):
        run_told([sys.executable, "-c", program], enough)
    assert time.monotonic() - began < 20


def test_a_last_line_without_an_end_is_told_too() -> None:
    ended = run_told([sys.executable, "-c", "import sys; sys.stderr.write('one\\ntwo')"], lambda *_: None)
    assert ended.last_line == "two"


def test_a_program_has_ended_though_one_that_it_started_lives_on() -> None:
    """It holds standard error, whose end would not come for a minute."""
    program = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    began = time.monotonic()
    assert run_told([sys.executable, "-c", program], lambda *_: None).status == 0
    assert time.monotonic() - began < 30


def test_a_program_whose_time_is_over_is_ended_and_what_it_said_is_kept(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        ended = run_told(python(SLEEPING), reads="both", log=log, seconds=1.5)
    assert (ended.status, ended.last_line) == (None, "up")
    assert 1.4 < ended.seconds < 20
    assert (tmp_path / "log").read_bytes() == b"up\n"


def test_memory_is_that_of_one_process_alone() -> None:
    before = process_memory("self")["VmHWM"]
    ballast = bytearray(200 << 20)
    assert len(ballast) <= process_memory("self")["VmHWM"] < before + (400 << 20)
    assert process_memory(2**22 + 1) == {}
