"""Where what was computed once is kept for the next process."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Final

UNUSED_SECONDS: Final = 30 * 24 * 3600.0  # after which what nobody used is removed


def cache_folder(kind: str) -> Path:
    """``$SDRT_CACHE/kind``, by default ``~/.cache/sdrt/kind``; it need not exist.

    A cache is never needed: a caller that cannot write there does without.
    """
    root = os.environ.get("SDRT_CACHE")
    try:
        folder = Path(root) if root else Path.home() / ".cache" / "sdrt"
    except RuntimeError:  # no home: any place that cannot be written does
        folder = Path(os.devnull)
    return folder / kind


def mark_used(folder: Path) -> None:
    """Note that a folder of a cache was used now; one that cannot be written keeps its time."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def remove_unused(parent: Path) -> None:
    """Remove the folders in ``parent`` that nobody used for `UNUSED_SECONDS`: see `mark_used`."""
    import shutil  # with its compressors 2 ms, and mostly there is nothing to remove

    with contextlib.suppress(OSError):
        for folder in parent.iterdir():
            with contextlib.suppress(OSError):
                if folder.is_dir() and time.time() - folder.stat().st_mtime > UNUSED_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)
