"""Programs that are started, listened to and ended; none outlives the process that started it.

A child runs in a session of its own, so that Ctrl-C of a terminal reaches its parent alone, and dies with
its parent (PR_SET_PDEATHSIG), stopped or not. The parent only waits in poll(2) meanwhile: a thread would take
time from what is measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import select
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Literal, Self

from sdrt.runtime.errors import EXIT_INTERRUPTED, SdrtError

Tell = Callable[[str, float], None]  # the last line, and seconds since the start
TICK_SECONDS: Final = 1.0
_LONGEST_LINE: Final = 1 << 24
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_LIBC: Final = ctypes.CDLL(None)


class Child:
    """One running program; a context manager that leaves no process behind.

    Attributes:
        pid: Number of the process.
        started_at: ``time.perf_counter()`` just before the process was made.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        reads: Literal["stdout", "stderr", "both"] = "stdout",
        rest: IO[bytes] | None = None,
        talks: bool = False,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Start it.

        Args:
            words: The command.
            reads: The stream that `next_line` reads.
            rest: Where the other one goes; by default it is thrown away.
            talks: Whether `send` is used; it has no input otherwise.
            environment: The whole environment; by default this process's.
            cwd: Its folder.

        Raises:
            OSError: It cannot be started.
        """
        other = subprocess.DEVNULL if rest is None else rest
        self._lines: deque[bytes] = deque()
        self._partial, self._stopped = b"", False
        self.started_at = time.perf_counter()
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
            stdout=other if reads == "stderr" else subprocess.PIPE,
            stderr={"stdout": other, "stderr": subprocess.PIPE, "both": subprocess.STDOUT}[reads],
            cwd=cwd,
            env=None if environment is None else dict(environment),
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        self.pid = self._process.pid
        stream = self._process.stderr if reads == "stderr" else self._process.stdout
        assert stream is not None
        self._stream = stream
        self._poll = select.poll()
        self._poll.register(stream, select.POLLIN)

    def send(self, line: bytes) -> None:
        """Write a line to its standard input.

        Raises:
            OSError: It listens no more.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(line + b"\n")
        self._process.stdin.flush()

    def next_line(self, seconds: float) -> bytes | None:
        """The next line that it writes, without its end; a carriage return ends one, too.

        Args:
            seconds: That are waited for it; None is returned where none came meanwhile.

        Raises:
            EOFError: There will be no more. It has closed the stream, or ended; one that it started may live
                on and hold the stream.
        """
        until = time.monotonic() + seconds
        while not self._lines:
            ended = self.status() is not None  # asked before the last look at what it wrote
            left = until - time.monotonic()
            if self._poll.poll(0 if ended else 1000 * max(0.0, min(left, TICK_SECONDS))):
                self._receive(os.read(self._stream.fileno(), 1 << 16))
            elif ended:
                self._receive(b"")
            elif left <= 0:
                return None
        return self._lines.popleft()

    def _receive(self, chunk: bytes) -> None:
        """Split what came into lines; nothing is the end."""
        if not chunk and not self._partial:
            raise EOFError
        *lines, self._partial = (self._partial + chunk).replace(b"\r", b"\n").split(b"\n")
        self._lines.extend(lines)
        if not chunk or len(self._partial) > _LONGEST_LINE:
            self._lines.append(self._partial)
            self._partial = b""

    def status(self, seconds: float = 0.0) -> int | None:
        """The exit status, or minus the signal that ended it; None if it still runs after some seconds."""
        try:
            return self._process.wait(None if seconds == math.inf else seconds)
        except subprocess.TimeoutExpired:
            return None

    def pause(self) -> None:
        """Stop the process and what it started: an idle thread pool may spin."""
        self._stopped = True
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)
        self._stopped = False

    def stop(self, grace: float) -> None:
        """Close its standard input, give it some seconds to end by itself, and see to it that it does."""
        if self._stopped:
            self.resume()
        with contextlib.suppress(OSError):  # what could not be flushed
            if self._process.stdin is not None:
                self._process.stdin.close()
        self.status(grace)
        self.kill()

    def kill(self) -> None:
        """End it and all that it started, at once."""
        below = descendants(self.pid) if self.status() is None else {}
        self._signal(signal.SIGKILL)
        for child, began in below.items():  # those that moved to a session of their own
            if start_time(child) == began:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._stream):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # its children may have outlived it
            os.killpg(self.pid, number)


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Ended:
    """A program that has ended.

    Attributes:
        status: Its exit status; None if it was ended because its time was over.
        output: What it wrote to its standard output; empty where that was told line by line.
        last_line: The last line that was told and is not blank, which is most often why it ended.
        seconds: That it ran.
    """

    status: int | None
    output: str
    last_line: str
    seconds: float

    def check(self, what: str, program: str) -> None:
        """Raise what the program's end means, if it is no success.

        Args:
            what: Has not been done then.
            program: Its name, which its last line may begin with.

        Raises:
            SdrtError: It failed; with its exit status and its last line.
            KeyboardInterrupt: It was interrupted.
        """
        if self.status == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        if self.status:
            reason = self.last_line.removeprefix(f"{program}: ") or "it gave no reason"
            failure = SdrtError(f"{what}: {reason}")
            failure.exit_status = self.status
            raise failure


def run_told(
    words: Sequence[str],
    tell: Tell = lambda _line, _seconds: None,
    *,
    reads: Literal["stderr", "both"] = "stderr",
    log: IO[bytes] | None = None,
    seconds: float = math.inf,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Ended:
    """Run a program to its end and tell meanwhile what it last said and how long it has run.

    Args:
        words: The command.
        tell: Called for each line but warnings, and every second.
        reads: The stream whose lines are told.
        log: Gets every line.
        seconds: Beyond which it is ended.
        environment: The whole environment; by default this process's.
        cwd: Its folder.

    Raises:
        OSError: It cannot be started, or the log cannot be written.
    """
    began, said, shown = time.monotonic(), "", ""
    with (
        tempfile.TemporaryFile() as output,
        Child(words, reads=reads, rest=output, environment=environment, cwd=cwd) as child,
    ):
        while (left := began + seconds - time.monotonic()) > 0:
            try:
                line = child.next_line(min(left, TICK_SECONDS))
            except EOFError:
                break
            if log is not None and line is not None:
                log.write(line + b"\n")
                log.flush()
            text = " ".join((line or b"").decode(errors="replace").split())
            said = text or said
            shown = text if text and "warning" not in text.lower() else shown
            tell(shown, time.monotonic() - began)
        status = child.status(max(0.0, began + seconds - time.monotonic()))
        output.seek(0)
        return Ended(status, output.read().decode(errors="replace"), said, time.monotonic() - began)


def last_line(text: str, otherwise: str = "") -> str:
    """The last line of a program's output that is not blank, without the blanks around it.

    Args:
        text: Its output.
        otherwise: What is returned where it said nothing.
    """
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), otherwise)


def process_memory(pid: int | Literal["self"]) -> dict[str, int]:
    """``VmHWM``, ``VmRSS`` and ``RssAnon`` of a process in bytes; empty if it has gone.

    VmHWM is the most that it ever held; it and VmRSS count pages of mapped files, RssAnon does not. (The
    kernel's ``ru_maxrss`` begins with what the parent held when it forked.)
    """
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    wanted = ("VmHWM", "VmRSS", "RssAnon")
    pairs = (line.split(":", 1) for line in text.splitlines() if line.startswith(wanted))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def descendants(pid: int) -> dict[int, int]:
    """Children of a process, their children and so on: number → start time, which tells reused numbers."""
    parents: dict[int, tuple[int, int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (found := _parent_and_start(int(entry.name))):
            parents[int(entry.name)] = found
    below: dict[int, int] = {}
    frontier = {pid}
    while frontier:
        frontier = {child for child, (parent, _) in parents.items() if parent in frontier} - set(below)
        below |= {child: parents[child][1] for child in frontier}
    return below


def start_time(pid: int) -> int | None:
    """When a process began, in the kernel's ticks; None if it has gone."""
    found = _parent_and_start(pid)
    return None if found is None else found[1]


def _parent_and_start(pid: int) -> tuple[int, int] | None:
    try:
        # The name, in brackets, may hold spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), int(fields[19])
