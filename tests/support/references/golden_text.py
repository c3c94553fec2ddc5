"""Golden numbers as text: digits that give the same bits again, and files that can be read and compared."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray


def short(array: NDArray[Any]) -> list[Any]:
    """The fewest digits that give the array's numbers when they are rounded to its dtype again.

    A matrix is a list of rows; what has more axes is one list, the last axis the fastest.
    """
    values = array if array.ndim < 3 else array.ravel()
    # NumPy's digits of a float16 are few, too, but not those of the number as it is.
    printed = values.astype(np.float32) if array.dtype == np.float16 else values
    result = np.array([float(str(value)) for value in printed.ravel()]).reshape(values.shape)
    assert np.array_equal(result.astype(array.dtype), values)
    numbers: list[Any] = result.tolist()
    return numbers


def text_of(data: dict[str, Any]) -> str:
    """A file of one case a line, so that a change can be seen."""
    lines = []
    for key, value in data.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            cases = ",\n  ".join(map(_line, value))
            lines.append(f"{json.dumps(key)}: [\n  {cases}\n ]")
        else:
            lines.append(f"{json.dumps(key)}: {_line(value)}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def _line(value: Any) -> str:
    return json.dumps(_plain(value), separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> Any:
    """Whole numbers without a point: most entries of a row are 0 or 1."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
