"""How a command begins: it can be interrupted before anything large is imported."""

from __future__ import annotations

TYPE_CHECKING = False  # nothing is imported yet: until `enter` is called, Ctrl-C shows Python's own traceback
if TYPE_CHECKING:
    from collections.abc import Callable


def enter(name: str, load: Callable[[], Callable[[], int]]) -> int:
    """Run a command whose own this process is.

    Args:
        name: The command's.
        load: Imports it, and gives its function, which returns the exit status.
    """
    import _signal  # type: ignore[import-not-found]  # `signal` without what that imports

    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # for as long as it takes to import the next
    _take_numbers()
    from sdrt.runtime.system import interrupts

    interrupts.watch(name)
    status = 1
    try:
        from sdrt.runtime.console.standard_error import guard_standard_error

        guard_standard_error()
        status = load()()
    except SystemExit as ended:  # of argparse
        status = ended.code if isinstance(ended.code, int) else status
        raise
    finally:
        interrupts.finish(status)
    return status


def _take_numbers() -> None:
    """Where a standard stream is closed, the next file would get its number, and what libraries print."""
    import os

    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
