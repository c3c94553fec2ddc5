"""Where what was computed once is kept for the next process."""

from __future__ import annotations

import os
from pathlib import Path


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
