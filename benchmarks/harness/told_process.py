"""Run a program that takes minutes, and tell meanwhile what it last said and how long it has run."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Final

from sdrt.benchmarks.harness.last_line import last_line
from sdrt.runtime.errors import EXIT_INTERRUPTED, SdrtError

Tell = Callable[[str, float], None]  # the last line, and seconds since the start
TICK_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Ended:
    """A program that has ended.

    Attributes:
        status: Its exit status.
        output: Its standard output.
        reason: The last line of its standard error; empty if there was none.
    """

    status: int
    output: str
    reason: str

    def check(self, what: str, program: str) -> None:
        """Raise what the program's end means, if it is no success.

        Args:
            what: Has not been done then.
            program: Its name, which its last line begins with.

        Raises:
            SdrtError: It failed; with its exit status and its last line.
            KeyboardInterrupt: It was interrupted.
        """
        if self.status == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        if self.status:
            failure = SdrtError(f"{what}: {self.reason.removeprefix(f'{program}: ') or 'it gave no reason'}")
            failure.exit_status = self.status
            raise failure


def run_told(words: Sequence[str], tell: Tell) -> Ended:
    """Run a program to its end.

    Args:
        words: The command.
        tell: Called for each line of its standard error but warnings, and every second. A carriage return
            ends a line, too: progress bars are drawn so.
    """
    began, said, shown = time.monotonic(), "", ""
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(words, stdout=output, stderr=subprocess.PIPE, start_new_session=True) as process,
    ):
        assert process.stderr is not None
        try:
            for line in _lines(process.stderr, lambda: process.poll() is not None):
                said = line or said
                shown = line if line and "warning" not in line.lower() else shown
                tell(shown, time.monotonic() - began)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it started
            raise
        status = process.wait()
        output.seek(0)
        return Ended(status, output.read().decode(errors="replace"), said)


def _lines(stream: IO[bytes], ended: Callable[[], bool]) -> Iterator[str]:
    """The last line of whatever came at once; an empty one where nothing came for `TICK_SECONDS`.

    Until the stream ends, or the program has: one that it started may live on and hold the stream.
    """
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    rest = b""
    while True:
        over = ended()
        if not poll.poll(1000 * TICK_SECONDS):
            if over:
                yield " ".join(last_line(rest.decode(errors="replace")).split())
                return
            yield ""
            continue
        chunk = os.read(stream.fileno(), 1 << 16)
        *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
        if line := last_line(b"\n".join(lines if chunk else [rest]).decode(errors="replace")):
            yield " ".join(line.split())
        if not chunk:
            return
