"""What people give, checked: numbers of any numeric type, NumPy's too, but never True or NaN; choices; names.

Each function takes the argument's name for its message, and gives the value in Python's own type.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

from sdrt.runtime.errors import UsageError

Word = TypeVar("Word", bound=str)
Function = TypeVar("Function", bound=Callable[..., object])


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number of any real type, NaN and infinity among them; True is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def whole(name: str, value: Any) -> int:
    """A whole number of any integer type; True is none.

    Raises:
        UsageError: It is none.
    """
    try:
        if isinstance(value, bool):  # NumPy's is no index anyway
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{name} is {value!r}: a whole number is wanted") from None


def whole_from(name: str, value: object, low: int, high: int) -> int:
    """A whole number of Python's own type, ``low`` and ``high`` included.

    Raises:
        UsageError: It is none, or beyond them.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}: allowed are whole numbers from {low} to {high}")
    return value


def number(name: str, value: Any) -> float:
    """A finite number of any real type.

    Raises:
        UsageError: It is none.
    """
    if not is_number(value):
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


def flag(name: str, value: Any, words: str = ": True or False is wanted") -> bool:
    """True or False; ``words`` end the message.

    Raises:
        UsageError: It is neither.
    """
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}{words}")
    return value


def choice(name: str, value: object, allowed: Sequence[Word], words: str = ": allowed are") -> Word:
    """One of the words that are allowed; ``words`` come before them in the message.

    Raises:
        UsageError: It is none of them.
    """
    for known in allowed:
        if isinstance(value, str) and value == known:
            return known
    raise UsageError(f"{name} is {value!r}{words} {', '.join(allowed)}")


def function(name: str, value: Function | None) -> Function | None:
    """A function, or None.

    Raises:
        UsageError: It is neither.
    """
    if value is not None and not callable(value):
        raise UsageError(f"{name} is {type(value).__name__}: a function is wanted")
    return value


def did_you_mean(
    given: str,
    allowed: Iterable[str] | Mapping[str, str],
    *,
    also_called: Mapping[str, str] | None = None,
    cutoff: float = 0.6,
) -> str:
    """The question after the nearest name that there is, or nothing.

    Args:
        given: The name that there is not.
        allowed: Names that there are, or what people may write for them.
        also_called: What the names are elsewhere; it comes before likeness.
        cutoff: Likeness that a name must have, 0 to 1.
    """
    import difflib  # 2 ms that a command without a mistake need not wait for

    near = (also_called or {}).get(given)
    if near is None:
        found = difflib.get_close_matches(given, list(allowed), n=1, cutoff=cutoff)
        near = found[0] if found else None
        if near is not None and isinstance(allowed, Mapping):
            near = allowed[near]
    return "" if near is None else f"did you mean {near}?"
