"""The C library, for what Python has no function of."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Final

_SS_DISABLE: Final = 2  # signal.h


class SignalStack(ctypes.Structure):
    """``stack_t`` of sigaltstack(2) on Linux: where this thread's signal handlers run."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


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


def signal_stack() -> SignalStack:
    """The alternate signal stack of the calling thread.

    Raises:
        OSError: There is no such call.
    """
    found = SignalStack(flags=_SS_DISABLE)
    try:
        c_library().sigaltstack(None, ctypes.byref(found))
    except AttributeError as error:
        raise OSError("the C library has no sigaltstack") from error
    return found


@contextlib.contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Whatever the block does, the calling thread's signal handlers go on to run where they did before.

    A library that gives the thread a stack of its own, and frees that some time later, leaves a thread whose
    next signal ends the process: Python's handlers run on such a stack.
    """
    try:
        before = signal_stack()
    except OSError:
        yield
        return
    try:
        yield
    finally:
        c_library().sigaltstack(ctypes.byref(before), None)
