"""How a command ends when it is told to, by Ctrl-C, SIGTERM or a closed terminal: soon, and at any moment.

A KeyboardInterrupt that comes while a module is imported can leave that module locked for ever, and none
comes while the main thread is in a call of a library. So nothing is raised in a process that is a command's
own (`watch`): a thread, which the signal wakes, removes what is half written, says so, and ends the process.
In other programs, and where a command has something to do after an interrupt, it is a KeyboardInterrupt
(`unwinding`). What must not be cut in two is done inside `finishing`, which both wait for.

This is what a command imports first: from here on it can be interrupted. It imports hardly anything.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time

from sdrt.runtime.errors import EXIT_INTERRUPTED

TYPE_CHECKING = False  # `typing` alone would take as long as all of this
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Final

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TOGETHER: Final = 0.5  # seconds: a closing terminal sends SIGHUP more than once, and means one interrupt
NOTHING_LEFT: Final = "interrupted; nothing unfinished was left behind"


class _Process:
    """What is known of this process.

    Attributes:
        name: Of the command that the process is; empty in a program of somebody else's.
        gate: Held by whom the end must wait for, and at the end by that.
        undo: What is called before the end.
        words: Gives the last words.
        ending: Whether the last words are being said.
        status: Of a command that has done its work; None before.
        unwinds: How many blocks there are in which an interrupt is raised.
        raised: Whether that was done.
        depth: Blocks of the main thread that are finished first.
        pending: Whether an interrupt waits for them.
    """

    def __init__(self) -> None:
        self.name = ""
        self.gate = _thread.RLock()
        self.undo: dict[object, Callable[[], object]] = {}
        self.words: Callable[[], str] = lambda: NOTHING_LEFT
        self.ending = False
        self.status: int | None = None
        self.unwinds, self.raised = 0, False
        self.depth, self.pending = 0, False


_PROCESS: Final = _Process()


def watch(name: str) -> None:
    """From now on signals end this process; for a command's own, and its main thread, alone.

    Signals that whoever started the command has it ignore (``nohup``) are ignored.

    Args:
        name: The command's, for its last words.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    _thread.start_new_thread(_wait, (read,))
    _PROCESS.name = name
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _woken)


def is_watched() -> bool:
    """Whether `watch` was called: whether this process is a command's own."""
    return bool(_PROCESS.name)


def finish(status: int) -> None:
    """The command has done its work: a signal that comes now ends the process with this status."""
    with _PROCESS.gate:  # if it was interrupted before, the end comes here
        _PROCESS.status = status


def last_words() -> str:
    """What is said of an interrupt."""
    return _PROCESS.words()


def hold() -> None:
    """Wait for the end of the process, if it is ending: nothing is said after the last words."""
    if _PROCESS.ending:
        with _PROCESS.gate:
            pass


def _woken(_number: int, _frame: object) -> None:
    """The thread has been told (`signal.set_wakeup_fd`): a call that the signal broke off is no error yet.

    Not for ever: the main thread may hold a lock that somebody needs to clear up.
    """
    if not _PROCESS.depth:
        time.sleep(TOGETHER)


def _next(read: int) -> None:
    """Wait for a signal that means an end; libraries may have handlers for others."""
    while os.read(read, 1)[0] not in SIGNALS:
        pass


def _wait(read: int) -> None:
    while True:
        _next(read)
        if not _PROCESS.unwinds or _PROCESS.raised:
            _end(read)
        _PROCESS.raised = True


def _end(read: int) -> None:
    _tried(lambda: _thread.start_new_thread(_insist, (read,)))
    with _PROCESS.gate:
        if _PROCESS.status is None:
            _PROCESS.ending = True
            for undo in reversed(list(_PROCESS.undo.values())):
                _tried(undo)
            _tried(lambda: sys.stderr.write(f"{_PROCESS.name}: {last_words()}\n"))
        os._exit(EXIT_INTERRUPTED if _PROCESS.status is None else _PROCESS.status)


def _insist(read: int) -> None:
    """Whoever interrupts once more does not want to wait."""
    began = time.monotonic()
    while time.monotonic() - began < TOGETHER:
        _next(read)
    os._exit(EXIT_INTERRUPTED)


def _tried(work: Callable[[], object]) -> None:
    try:
        work()
    except Exception:  # the end comes, whatever happens
        return


def _raise(_number: int, _frame: object) -> None:
    if _PROCESS.depth:
        _PROCESS.pending = True
        return
    raise KeyboardInterrupt


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


class undone:  # noqa: N801 - used as the context managers of contextlib, which takes long to import
    """``with undone(call):`` if an interrupt ends the process inside, ``call`` is called, in a thread."""

    def __init__(self, call: Callable[[], object]) -> None:
        """Nothing happens yet."""
        self._call = call

    def __enter__(self) -> None:
        """From now on."""
        _PROCESS.undo[self] = self._call

    def __exit__(self, *_: object) -> None:
        """No longer."""
        _PROCESS.undo.pop(self, None)


class telling:  # noqa: N801
    """``with telling(words):`` what is said of an interrupt inside is what ``words`` gives."""

    def __init__(self, words: Callable[[], str]) -> None:
        """Nothing happens yet."""
        self._words, self._before = words, _PROCESS.words

    def __enter__(self) -> None:
        """From now on."""
        self._before, _PROCESS.words = _PROCESS.words, self._words

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """No longer; but an interrupt on its way out is told of as here."""
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            _PROCESS.words = self._before


class finishing:  # noqa: N801
    """``with finishing():`` an interrupt comes after the block. It must be one of short work."""

    def __enter__(self) -> None:
        """From now on."""
        if _in_main_thread():
            _PROCESS.depth += 1
        _PROCESS.gate.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """No longer.

        Raises:
            KeyboardInterrupt: It came meanwhile.
        """
        _PROCESS.gate.release()
        if not _in_main_thread():
            return
        _PROCESS.depth -= 1
        if _PROCESS.pending and not _PROCESS.depth:
            _PROCESS.pending = False
            if kind is None:
                raise KeyboardInterrupt


class unwinding:  # noqa: N801
    """``with unwinding():`` the first signal is a KeyboardInterrupt in the main thread, as in any program.

    Handlers that others have set are left alone, and so is everything outside of the main thread.
    """

    def __enter__(self) -> None:
        """From now on."""
        self._before = {}
        ours = (_woken, signal.SIG_DFL, signal.default_int_handler)
        if _in_main_thread():
            before = {number: signal.getsignal(number) for number in SIGNALS}
            self._before = {number: handler for number, handler in before.items() if handler in ours}
            _PROCESS.raised = False
            _PROCESS.unwinds += 1
            for number in self._before:
                signal.signal(number, _raise)

    def __exit__(self, *_: object) -> None:
        """No longer."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        _PROCESS.unwinds -= bool(self._before)
