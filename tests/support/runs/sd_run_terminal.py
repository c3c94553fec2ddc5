"""``sd-run`` on a pseudo-terminal, for tests of what a person sees."""

from __future__ import annotations

import codecs
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

SD_RUN = str(Path(sys.executable).with_name("sd-run"))
# Steps drawn, on the bar. It is redrawn four times a second: no single step's number is sure to be seen.
A_STEP = r"[1-9]\d*/\d"


class OnTerminal:
    """``sd-run`` with stderr on a terminal of its own."""

    def __init__(self, work: Path, *arguments: str, command: str = SD_RUN) -> None:
        self._own, theirs = pty.openpty()
        self.shown = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a read may end inside a character
        self.process = subprocess.Popen(
            [command, *arguments],
            stdout=subprocess.PIPE,
            stderr=theirs,
            cwd=work,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"},
        )
        os.close(theirs)

    def read(self, until: str | None = None) -> str:
        """What the terminal shows, up to a pattern or to the end of the process.

        Raises:
            AssertionError: The process ended, or a minute passed, and nothing shown matches.
        """
        deadline = time.monotonic() + 60
        while (until is None or not re.search(until, self.shown)) and time.monotonic() < deadline:
            try:
                self.shown += self._decoder.decode(os.read(self._own, 4096))
            except OSError:  # how Linux says that the other end is closed
                break
        assert until is None or re.search(until, self.shown), f"{until} was never shown: {self.shown!r}"
        return self.shown

    def end(self) -> int:
        self.read()
        self.process.communicate(timeout=60)
        os.close(self._own)
        return self.process.returncode
