"""``sd-run`` on a pseudo-terminal, for tests of what a person sees."""

from __future__ import annotations

import codecs
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

SD_RUN = str(Path(sys.executable).with_name("sd-run"))


class OnTerminal:
    """``sd-run`` with stderr on a terminal of its own."""

    def __init__(self, work: Path, *arguments: str) -> None:
        self._own, theirs = pty.openpty()
        self.shown = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a read may end inside a character
        self.process = subprocess.Popen(
            [SD_RUN, *arguments],
            stdout=subprocess.PIPE,
            stderr=theirs,
            cwd=work,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"},
        )
        os.close(theirs)

    def read(self, until: str | None = None) -> str:
        """What the terminal shows, up to a word or to the end of the process."""
        deadline = time.monotonic() + 60
        while (until is None or until not in self.shown) and time.monotonic() < deadline:
            try:
                self.shown += self._decoder.decode(os.read(self._own, 4096))
            except OSError:  # how Linux says that the other end is closed
                break
        return self.shown

    def end(self) -> int:
        self.read()
        self.process.communicate(timeout=60)
        os.close(self._own)
        return self.process.returncode
