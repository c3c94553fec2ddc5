"""What ``sd-run`` shows on a terminal while it draws: a bar, and a small picture above it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from sdrt.runtime.console.run_command import say
from sdrt.runtime.system.interrupts import undone

if TYPE_CHECKING:
    from rich.console import Console

    from sdrt.runtime.pipeline import Pipeline


@contextlib.contextmanager
def progress_shown(
    arguments: argparse.Namespace, steps: int
) -> Iterator[tuple[Callable[[Pipeline, int, float, dict[str, Any]], None] | None, tuple[str, ...]]]:
    """A callback that moves a bar with each step, above it a preview if asked for, and what it must be given.

    On a terminal; nothing elsewhere.
    """
    if arguments.quiet or sys.stderr is None or not sys.stderr.isatty():
        if arguments.preview:
            say("sd-run", "warning: no preview: standard error is no terminal, or --quiet was given")
        yield None, ()
        return
    from rich.console import Console
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sdrt.runtime.pictures.preview import TerminalPreview

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console)
    task = bar.add_task("drawing", total=steps)
    view = TerminalPreview(bar)
    shows = arguments.preview and _can_preview(console)

    def on_step(_pipeline: Pipeline, _step: int, _timestep: float, state: dict[str, Any]) -> None:
        if shows:
            view.update(state["preview"])
        bar.advance(task)

    with Live(view, console=console, transient=True) as live, undone(live.stop):
        yield on_step, (("preview",) if shows else ())


def _can_preview(console: Console) -> bool:
    """Whether the terminal can show one; says why not."""
    from sdrt.runtime.pictures.preview import TerminalPreview

    if not TerminalPreview.can_show(console):
        say("sd-run", "warning: no preview: the terminal does not show 256 colours and Unicode")
        return False
    return True
