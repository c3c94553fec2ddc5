"""What the commands have in common: one-line errors, exit statuses, clean interruption."""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from sdrt.runtime.errors import EXIT_INTERRUPTED, SdrtError, UsageError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit with status 2."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit."""
        self.exit(UsageError.exit_status, f"{self.prog}: {message} (see {self.prog} --help)\n")


def run_command(name: str, command: Callable[[], None]) -> int:
    """Run a command's body and turn what it raises into one line on stderr and an exit status.

    SIGTERM ends it as Ctrl-C does, so that temporary files are removed.
    """
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _one_line_warnings(name):
            command()
    except SdrtError as error:
        say(name, str(error))
        return error.exit_status
    except KeyboardInterrupt:
        say(name, "interrupted; nothing unfinished was left behind")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): no error, and nothing left to say it to.
        sys.stdout = None
        return 0
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def say(name: str, message: str) -> None:
    """One line on stderr, with the command's name before it."""
    sys.stderr.write(f"{name}: {' '.join(message.split())}\n")


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def _one_line_warnings(name: str) -> Iterator[None]:
    """Show sdrt's own warnings as a person would want them; leave the libraries' to Python's rules."""

    def show(message: Warning | str, category: type[Warning], *_where: object) -> None:
        if category.__module__.startswith("sdrt"):
            say(name, f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        warnings.filterwarnings("always", category=UserWarning, module=r"sdrt\..*")
        yield
