"""The parent's side of the worker protocol: one process that holds one subject.

A worker is started in a session of its own, so that Ctrl-C of a terminal reaches ``sd-bench`` alone; it dies
with ``sd-bench`` (PR_SET_PDEATHSIG), stopped or not. The parent only waits in poll(2) while a worker works:
a thread or a redrawn progress bar would take time from what is measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from sdrt.benchmarks.harness.last_line import last_line
from sdrt.benchmarks.harness.process_memory import descendants, process_memory, start_time
from sdrt.benchmarks.peers.environments import OFFLINE
from sdrt.runtime.errors import SdrtError

PROTOCOL: Final = 1
START_SECONDS: Final = 120.0
SAMPLE_SECONDS: Final = 0.02
_CLOSE_SECONDS: Final = 10.0
_MAX_LINE: Final = 1 << 24
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_LIBC: Final = ctypes.CDLL(None)


class WorkerError(SdrtError):
    """A worker died, took too long, or said what the protocol does not know: it is of no more use."""


class RefusedError(SdrtError):
    """A worker answered that it cannot do this; it can be asked for other things."""


def worker_environment(threads: int, extra: Mapping[str, str]) -> dict[str, str]:
    """What every worker finds in its environment.

    Args:
        threads: Of the numeric libraries.
        extra: What this worker needs beyond, such as ``CUDA_VISIBLE_DEVICES``.
    """
    shared = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    return {**os.environ, **OFFLINE, **shared, **extra}


class Worker:
    """One running worker; a context manager that leaves no process behind.

    Attributes:
        pid: Number of the process.
        started_at: ``time.perf_counter()`` just before the process was made.
        start_seconds: From there to its first line.
        peak_anonymous: The most ``RssAnon`` seen by requests with ``sample``, bytes.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        cwd: Path | None = None,
        timeout: float = START_SECONDS,
    ) -> None:
        """Start it and wait for its first line.

        Args:
            words: The command.
            environment: The whole environment, see `worker_environment`.
            log: Where its standard error goes.
            cwd: Its folder.
            timeout: Seconds that it may take to start.

        Raises:
            WorkerError: It cannot be started, or does not speak the protocol.
        """
        self._log, self._buffer, self._stopped = log, b"", False
        self.peak_anonymous = 0
        self.started_at = time.perf_counter()
        try:
            with log.open("wb") as errors:
                self._process = subprocess.Popen(
                    words,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    cwd=cwd,
                    env=dict(environment),
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
        except OSError as error:
            raise WorkerError(f"{words[0]} cannot be started: {error.strerror}") from error
        self.pid = self._process.pid
        try:
            first = self._answer(timeout, sample=False)
            if first.get("event") != "started" or first.get("protocol") != PROTOCOL:
                raise WorkerError(f"it began with {first}, not with protocol {PROTOCOL}")
        except BaseException:
            self.kill()
            raise
        self.start_seconds = time.perf_counter() - self.started_at

    def request(self, op: str, *, timeout: float, sample: bool = False, **fields: object) -> dict[str, Any]:
        """Ask for something and wait for the answer.

        Args:
            op: ``load``, ``draw``, ``stage``, ``close``.
            timeout: Seconds; beyond them the worker is killed.
            sample: Watch ``RssAnon`` every 20 ms meanwhile, see `peak_anonymous`.
            fields: The rest of the request.

        Raises:
            RefusedError: It answered that it cannot.
            WorkerError: It died or took too long; it has been ended.
        """
        line = json.dumps({"op": op, **fields}).encode() + b"\n"
        try:
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(line)
                self._process.stdin.flush()
            except OSError:
                raise WorkerError(self._death()) from None
            answer = self._answer(timeout, sample=sample)
        except WorkerError:
            self.kill()
            raise
        if answer.get("ok") is not True:
            raise RefusedError(" ".join(str(answer.get("error", "it gave no reason")).split()))
        return answer

    def memory(self) -> dict[str, int]:
        """See `process_memory`."""
        return process_memory(self.pid)

    def pause(self) -> None:
        """Stop the process and what it started: an idle thread pool may spin."""
        self._stopped = True
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)
        self._stopped = False

    def close(self) -> None:
        """Ask it to end, and see to it that it does."""
        if self._process.poll() is None:
            if self._stopped:
                self.resume()
            with contextlib.suppress(SdrtError):
                self.request("close", timeout=_CLOSE_SECONDS)
                self._wait(_CLOSE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End it and all that it started, at once."""
        children = descendants(self.pid) if self._process.poll() is None else {}
        self._signal(signal.SIGKILL)
        for child, began in children.items():  # those that moved to a session of their own
            if start_time(child) == began:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what could not be flushed
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def _answer(self, timeout: float, *, sample: bool) -> dict[str, Any]:
        line = self._line(timeout, sample=sample)
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            text = line[:80].decode(errors="backslashreplace")
            raise WorkerError(f"it wrote {text!r}, which is no answer of the protocol")
        return answer

    def _line(self, timeout: float, *, sample: bool) -> bytes:
        """The next line of its standard output."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise WorkerError(f"no answer within {timeout:g} s: it was ended{self._last_words()}")
            ready = poll.poll(1000 * (min(left, SAMPLE_SECONDS) if sample else left))
            if sample:
                self.peak_anonymous = max(self.peak_anonymous, self.memory().get("RssAnon", 0))
            if not ready:
                continue
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                raise WorkerError(self._death())
            self._buffer += chunk
            if len(self._buffer) > _MAX_LINE:
                raise WorkerError("it wrote a line without end")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _death(self) -> str:
        """Why it is gone, in words."""
        status = self._wait(_CLOSE_SECONDS)
        if status is None:
            return f"it closed its standard output{self._last_words()}"
        if status >= 0:
            return f"it ended with exit status {status}{self._last_words()}"
        name = signal.Signals(-status).name
        if -status == signal.SIGKILL:
            return f"it was killed ({name}), as happens where memory runs out{self._last_words()}"
        return f"it was ended by {name}{self._last_words()}"

    def _last_words(self) -> str:
        try:
            said = last_line(self._log.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            return ""
        return f"; its last line: {said[-500:]}" if said else ""

    def _wait(self, seconds: float) -> int | None:
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # its children may have outlived it
            os.killpg(self.pid, number)


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
