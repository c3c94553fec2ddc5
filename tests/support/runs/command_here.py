"""A command in this process, as the shell would see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest


def run_here(
    main: Callable[[Sequence[str]], int], arguments: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Run a command.

    Args:
        main: Its entry.
        arguments: Behind its name.
        capsys: What catches the output.

    Returns:
        Exit status, standard output and standard error.
    """
    try:
        status = main(arguments)
    except SystemExit as stopped:  # argparse's way
        status = int(str(stopped.code))
    return status, *capsys.readouterr()
