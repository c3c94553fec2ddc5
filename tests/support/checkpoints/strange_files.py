"""What may stand under a file's name and is none, or is too deep; each in place of what is there."""

from __future__ import annotations

import os
from pathlib import Path


def make_pipe(path: Path) -> None:
    """A pipe that nobody writes to."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def make_device(path: Path) -> None:
    """A device without an end."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def make_folder(path: Path) -> None:
    """A folder."""
    path.unlink(missing_ok=True)
    path.mkdir()


def make_nested(path: Path) -> None:
    """JSON nested deeper than any stack."""
    path.write_bytes(b"[" * 10**6)
