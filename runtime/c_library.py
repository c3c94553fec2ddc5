"""The C library, for what Python has no function of."""

from __future__ import annotations

import contextlib
import ctypes
from functools import cache


@cache
def c_library() -> ctypes.CDLL:
    """The C library; loaded once, since each time leaves reference cycles.

    Raises:
        OSError: There is none that can be loaded.
    """
    return ctypes.CDLL(None, use_errno=True)


def trim_memory() -> None:
    """Return what was freed to the system: glibc keeps freed blocks of up to 32 MB for itself.

    Does nothing where the library is another.
    """
    with contextlib.suppress(OSError, AttributeError):
        c_library().malloc_trim(0)
