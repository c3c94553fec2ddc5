"""The parent's side of the worker protocol: one process that holds one subject.

The parent only waits while a worker works: a redrawn progress bar would take time from what is measured.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from sdrt.benchmarks.peers.environments import OFFLINE
from sdrt.runtime.errors import SdrtError
from sdrt.runtime.system.child_process import Child, last_line, process_memory

PROTOCOL: Final = 1
START_SECONDS: Final = 120.0
SAMPLE_SECONDS: Final = 0.02
_CLOSE_SECONDS: Final = 10.0


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
        self._log, self.peak_anonymous = log, 0
        try:
            with log.open("wb") as errors:
                self._child = Child(words, rest=errors, talks=True, environment=environment, cwd=cwd)
        except OSError as error:
            raise WorkerError(f"{words[0]} cannot be started: {error.strerror}") from error
        self.pid, self.started_at = self._child.pid, self._child.started_at
        self.pause, self.resume, self.kill = self._child.pause, self._child.resume, self._child.kill
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
            op: ``load``, ``draw``, ``stage``.
            timeout: Seconds; beyond them the worker is killed.
            sample: Watch ``RssAnon`` every 20 ms meanwhile, see `peak_anonymous`.
            fields: The rest of the request.

        Raises:
            RefusedError: It answered that it cannot.
            WorkerError: It died or took too long; it has been ended.
        """
        try:
            try:
                self._child.send(json.dumps({"op": op, **fields}).encode())
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._child.stop(_CLOSE_SECONDS)  # the end of its input is its end
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
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                line = self._child.next_line(min(left, SAMPLE_SECONDS) if sample else left)
            except EOFError:
                raise WorkerError(self._death()) from None
            if sample:
                self.peak_anonymous = max(self.peak_anonymous, self.memory().get("RssAnon", 0))
            if line is not None:
                return line
        raise WorkerError(f"no answer within {timeout:g} s: it was ended{self._last_words()}")

    def _death(self) -> str:
        """Why it is gone, in words."""
        status = self._child.status(_CLOSE_SECONDS)
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
