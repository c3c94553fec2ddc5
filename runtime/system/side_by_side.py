"""Work on a few threads that whoever waits for it can leave at any moment."""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Generic, Self, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")
AT_EXIT: Final = 10.0  # seconds that the interpreter's end waits for what was left: it is in a library's call


class SideBySide(Generic[Key, Value]):
    """One result for every key, in the keys' order.

    Not a ThreadPoolExecutor: an interrupt that leaves its block, and the interpreter's end, wait until all of
    its threads have ended. One of them may need a module that the interrupted import has left locked.
    """

    def __init__(self, work: Callable[[Key], Value], keys: Sequence[Key], threads: int) -> None:
        """Begin.

        Args:
            work: The function that is called with every key.
            keys: The keys, each once.
            threads: The number of calls at once.

        Raises:
            RuntimeError: The system gives no thread.
        """
        self._work, self._keys = work, tuple(keys)
        self._waiting = deque(keys)
        self._found: dict[Key, Value] = {}
        self._error: BaseException | None = None
        self._running = 0
        self._then: Callable[[], object] | None = None  # what is left for the last thread to do
        self._ended = threading.Condition()
        for _ in range(min(threads, len(keys))):
            thread = threading.Thread(target=self._run, name="sdrt-side", daemon=True)
            with self._ended:  # it waits for this
                thread.start()
                self._running += 1

    def results(self) -> dict[Key, Value]:
        """Wait for all of them, and give them away.

        Raises:
            BaseException: What the first call that failed has raised. No other is running then.
        """
        with self._ended:
            self._ended.wait_for(lambda: not self._running)
            error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        found, self._found = self._found, {}
        return {key: found[key] for key in self._keys}

    def __enter__(self) -> Self:
        """The object itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """See `leave`."""
        self.leave(lambda: None)

    def leave(self, then: Callable[[], object]) -> None:
        """Begin nothing more, and drop what there is; do not wait.

        Args:
            then: The function that is called when nothing is running: now, or by the last thread.
        """
        with self._ended:
            self._waiting.clear()
            self._found.clear()
            if self._running:
                self._then = then
                atexit.register(self._wait_at_exit)
                return
        then()

    def _run(self) -> None:
        while True:
            with self._ended:
                if not self._waiting:
                    break
                key = self._waiting.popleft()
            try:
                found = self._work(key)
            except BaseException as error:
                with self._ended:
                    self._waiting.clear()
                    self._error = self._error or error
            else:
                with self._ended:
                    self._found[key] = found
                del found
        with self._ended:
            self._running -= 1
            left = self._then if not self._running else None
            if left is not None:
                self._found.clear()
                self._error = None
            self._ended.notify_all()
        if left is not None:
            atexit.unregister(self._wait_at_exit)
            with contextlib.suppress(Exception):  # there is nobody to tell
                left()

    def _wait_at_exit(self) -> None:
        with self._ended:
            self._ended.wait_for(lambda: not self._running, AT_EXIT)
