"""Folders as tests compare them."""

from __future__ import annotations

from pathlib import Path


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, with contents."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
