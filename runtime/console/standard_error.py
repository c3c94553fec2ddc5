"""Standard error as a command writes to it: closed, full or read by nobody, it never stops the work."""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
import sys
import time
from typing import TextIO

PATIENCE = 0.1  # seconds that a text may wait for its reader


def guard_standard_error() -> None:
    """Make standard error harmless; for a command's own process."""
    if sys.stderr is not None:
        sys.stderr = Diagnostics(sys.stderr)


class Diagnostics(io.TextIOBase):
    """A text stream that drops what cannot be written now.

    Attributes:
        encoding: That of the stream it stands for.
        errors: What is done with characters that it does not have.
    """

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, stream: TextIO) -> None:
        """Stand for a stream that has a file descriptor."""
        self._number = stream.fileno()
        self.encoding = stream.encoding
        self._writes_to = _without_waiting(self._number)
        self._poll = select.poll()
        self._poll.register(self._writes_to, select.POLLOUT)
        self._stuck = False

    def fileno(self) -> int:
        """The stream's."""
        return self._number

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._number)

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, text: str) -> int:
        """Write the text, or as much of it as its reader takes in `PATIENCE`; of one who took nothing
        before, no more than there is room for at once.
        """
        data = text.encode(self.encoding, self.errors)
        ends = time.monotonic() + (0 if self._stuck else PATIENCE)
        with contextlib.suppress(OSError):
            while data:
                self._stuck = not self._poll.poll(max(0.0, ends - time.monotonic()) * 1000)
                if self._stuck:
                    break
                with contextlib.suppress(BlockingIOError):  # somebody else was quicker
                    data = data[os.write(self._writes_to, data[: select.PIPE_BUF]) :]
        return len(text)


def _without_waiting(number: int) -> int:
    """A descriptor of the same pipe or terminal that never waits; where that cannot be had, ``number``.

    Not the descriptor itself: what is set on it holds for all programs that share it.
    """
    mode = os.fstat(number).st_mode
    if not (stat.S_ISFIFO(mode) or os.isatty(number)):
        return number
    try:
        return os.open(f"/proc/self/fd/{number}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:  # no such file system, or nobody reads
        return number
