"""What is going on, for people who wait: a bar on a terminal, lines elsewhere.

Nothing is drawn while a subject works: a bar that a thread redraws would take time from what is measured.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Final, Self

from sdrt.runtime.console.run_command import say

_LINE_SECONDS: Final = 5.0  # between two lines where there is no terminal
_ONGOING_SECONDS: Final = 30.0  # likewise, of one thing that takes minutes
_SHOWN: Final = 60  # characters of another program's line


class Progress:
    """One block of work after the other, each of a number of units; a context manager."""

    def __init__(self, *, quiet: bool = False) -> None:
        """``quiet`` says nothing at all."""
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._title, self._total, self._done, self._began, self._said = "", 0, 0, 0.0, 0.0

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr is not None and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Bar(
                *columns,
                TimeRemainingColumn(),
                console=Console(stderr=True),
                auto_refresh=False,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, line: str) -> None:
        """Something that people should know."""
        if self._bar is not None:
            self._bar.console.print(f"sd-bench: {line}", markup=False, highlight=False, soft_wrap=True)
        elif not self._quiet:
            say("sd-bench", line)

    def block(self, title: str, total: int) -> None:
        """Begin a block of ``total`` units."""
        self._title, self._total, self._done = title, max(total, 1), 0
        self._began, self._said = time.monotonic(), 0.0
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(title, total=self._total)
            self._bar.refresh()
        elif not self._quiet:
            say("sd-bench", title)
            self._said = time.monotonic()

    def working(self, what: str) -> None:
        """Say what is done next."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._title}: {what}")
            self._bar.refresh()
        elif not self._quiet and time.monotonic() - self._said >= _LINE_SECONDS:
            self._said = time.monotonic()
            say("sd-bench", f"{self._title}: {what}, {self._done} of {self._total}{self._left()}")

    def ongoing(self, line: str, seconds: float) -> None:
        """The block's one piece of work goes on, and nothing is being measured.

        Args:
            line: What was last said of it.
            seconds: Since it began.
        """
        said = line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"
        words = f"{self._title}, {duration(seconds)}{': ' * bool(said)}{said}"
        if self._bar is not None:
            from rich.markup import escape

            self._bar.update(self._task, description=escape(words))
            self._bar.refresh()
        elif not self._quiet and time.monotonic() - self._said >= _ONGOING_SECONDS:
            self._said = time.monotonic()
            say("sd-bench", words)

    def advance(self) -> None:
        """One unit is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
            self._bar.refresh()

    def _left(self) -> str:
        if not self._done:
            return ""
        seconds = (time.monotonic() - self._began) / self._done * (self._total - self._done)
        return f", {duration(seconds)} left"


def duration(seconds: float) -> str:
    """Seconds in words: ``40 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
