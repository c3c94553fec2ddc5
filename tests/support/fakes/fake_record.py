"""What the fakes of peers' libraries share: they note their calls, and fail as they are told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

FAILS = os.environ.get("FAKE_FAILS", "")  # a call that raises, or "shape": pictures of another size


def note(call: str, **arguments: Any) -> None:
    """Add a call to the record, a JSON object a line; raise if it is the one that fails."""
    with Path(os.environ["FAKE_RECORD"]).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"call": call, **{name: plain(value) for name, value in arguments.items()}}))
        stream.write("\n")
    if call == FAILS:
        raise RuntimeError(f"the library\nfails in {call}")


def plain(value: Any) -> Any:
    """As JSON has it: arrays as lists, functions and paths as text."""
    value = getattr(value, "data", value)
    if isinstance(value, memoryview):
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {str(name): plain(entry) for name, entry in value.items()}
    return value if isinstance(value, (str, int, float, bool, list, tuple, type(None))) else str(value)


def pictures(images: int, height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [N, H, W, 3], each picture of its number; one row too few where the shape is to be wrong."""
    shape = (images, height - (FAILS == "shape"), width, 3)
    return np.broadcast_to(np.arange(images, dtype=np.uint8)[:, None, None, None], shape).copy()
