"""Numbers as people give them: of any numeric type, NumPy's too, but never True or NaN."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import numpy as np

from sdrt.runtime.errors import UsageError


def whole(name: str, value: Any) -> int:
    """A whole number of any integer type; True is none.

    Raises:
        UsageError: It is none.
    """
    try:
        if isinstance(value, bool | np.bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{name} is {value!r}: a whole number is wanted") from None


def number(name: str, value: Any) -> float:
    """A finite number of any real type.

    Raises:
        UsageError: It is none.
    """
    if isinstance(value, bool | np.bool) or not isinstance(value, numbers.Real):
        raise UsageError(f"{name} is {value!r}: a number is wanted")
    try:
        result = float(value)
    except OverflowError:  # a whole number beyond all floats
        result = math.inf
    if not math.isfinite(result):
        raise UsageError(f"{name} is {result!r}: a finite number is wanted")
    return result


def share(name: str, value: Any) -> float:
    """A number from 0 to 1.

    Raises:
        UsageError: It is none.
    """
    result = number(name, value)
    if not 0.0 <= result <= 1.0:
        raise UsageError(f"{name} is {value!r}: a number from 0 to 1 is wanted")
    return result


def flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        UsageError: It is neither.
    """
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}: True or False is wanted")
    return value
