"""What the commands have in common: one-line errors, exit statuses, clean interruption."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NoReturn

from sdrt.runtime.checks import did_you_mean
from sdrt.runtime.console.printable import one_line, printable
from sdrt.runtime.errors import EXIT_INTERRUPTED, OutputError, SdrtError, UsageError
from sdrt.runtime.system.interrupts import NOTHING_LEFT, hold, is_watched, last_words, telling, unwinding


class ReaderGoneError(OutputError):
    """Standard output is a pipe that nobody reads any more (``| head``): where the work stands, no error."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit with status 2.

    Attributes:
        also_called: Options by names that other tools have for them, which mean the same here.
        not_called: What to say of names that may mean something else.
    """

    also_called: Mapping[str, str] = MappingProxyType({})
    not_called: Mapping[str, str] = MappingProxyType({})

    def error(self, message: str) -> NoReturn:
        """Print one line, of an option that there is not with the nearest that there is, and exit."""
        line = one_line(message)
        if "unrecognized arguments" in line:
            wrong = [word.partition("=")[0] for word in line.split() if word.startswith("-")]
            questions = [question for question in map(self._did_you_mean, wrong) if question]
            line += f" ({questions[0]})" if questions else ""
        self.exit(UsageError.exit_status, f"{self.prog}: {line} (see {self.prog} --help)\n")

    def own_words(self, words: Sequence[str]) -> list[str]:
        """A command line with its options by our names: of other tools', and with underscores for dashes."""
        found: list[str] = []
        for index, word in enumerate(words):
            if word == "--":
                return [*found, *words[index:]]
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = name.replace("_", "-")
            found.append(self.also_called.get(name, name) + equals + value if name.startswith("-") else word)
        return found

    def _did_you_mean(self, name: str) -> str:
        known = [option for action in self._actions for option in action.option_strings]
        begun = [option for option in known if option.startswith(name)] if name.startswith("--") else []
        also_called = {**({name: begun[0]} if begun else {}), **self.not_called}
        return did_you_mean(name, known, also_called=also_called, cutoff=0.7)


def run_command(name: str, command: Callable[[], None], *, quiet: bool = False) -> int:
    """Run a command's body and turn what it raises into one line on stderr and an exit status.

    In a process of the command's own signals end it as `sdrt.runtime.system.interrupts.watch` says. In
    another program, SIGTERM and SIGHUP end it as Ctrl-C does. With ``quiet`` warnings are not shown.
    """
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no error

    def warn(message: str) -> None:
        if not quiet:
            say(name, f"warning: {message}")

    try:
        with telling(lambda: NOTHING_LEFT), _interrupts(), own_warnings(warn):
            command()
        with _output_errors():  # while they can still be reported
            print(end="", flush=True)  # noqa: T201
    except SdrtError as error:
        say(name, str(error))
        return error.exit_status
    except KeyboardInterrupt:
        say(name, last_words())
        return EXIT_INTERRUPTED
    except Exception as error:
        hold()  # what is removed before the end looks like an error from here
        if os.environ.get("SDRT_TRACEBACK"):
            raise
        say(name, f"internal error: {type(error).__name__}: {error} (SDRT_TRACEBACK=1 shows where)")
        return SdrtError.exit_status
    return 0


def _interrupts() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if is_watched() else unwinding()


_BLAS_THREADS: Final = "OPENBLAS_NUM_THREADS"


@contextlib.contextmanager
def quick_start() -> Iterator[None]:
    """For the imports and the loading of a command; for its process, so no library may use it.

    There is no garbage collection inside. Starting makes many objects and hardly any garbage: collections
    walk through all of them again and again, a tenth of the time. What is there at the end is kept out of
    later collections, that of the interpreter's end among them. NumPy's BLAS gets no threads: nothing large
    is multiplied with it, and its threads, once made, spin for 40 ms.
    """
    chosen = _BLAS_THREADS in os.environ
    os.environ.setdefault(_BLAS_THREADS, "1")
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not chosen:
            os.environ.pop(_BLAS_THREADS, None)  # it has been read; programs that are started need it not
        gc.freeze()
        if collects:
            gc.enable()


def put(line: str) -> None:
    """One line on stdout, at once; control characters as escapes, as they are in JSON.

    Raises:
        ReaderGoneError: Nobody reads it any more.
        OutputError: It cannot be written there for another reason.
    """
    hold()
    with _output_errors():
        print(printable(line), flush=True)  # noqa: T201


@contextlib.contextmanager
def _output_errors() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        _discard_output()
        raise ReaderGoneError("cannot write to standard output: its reader has gone") from error
    except OSError as error:
        from sdrt.runtime.system.files import explain  # 20 ms that `--help` need not wait for

        _discard_output()
        raise OutputError(f"cannot write to standard output: {explain(error)}") from error


def _discard_output() -> None:
    """Let the interpreter's own flush at its end succeed."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(name: str, message: str) -> None:
    """One line on stderr, with the command's name before it; control characters as escapes.

    Where it cannot be written, there is nothing.
    """
    hold()
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"{name}: {one_line(message)}\n")


def tell_of_long_work(name: str) -> None:
    """Show what the library logs of work that takes long, a line each."""
    logger = logging.getLogger("sdrt")
    if not logger.handlers:
        logger.addHandler(_Said(name))
        logger.setLevel(logging.INFO)


class _Said(logging.Handler):
    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def emit(self, record: logging.LogRecord) -> None:
        say(self._name, record.getMessage())


@contextlib.contextmanager
def own_warnings(tell: Callable[[str], object]) -> Iterator[None]:
    """Inside, sdrt's own warnings are told, each once; the libraries' are not shown."""
    shown: set[str] = set()  # each batch of a call says it again

    def show(message: Warning | str, category: type[Warning], *_where: object) -> None:
        if category.__module__.startswith("sdrt") and str(message) not in shown:
            shown.add(str(message))
            tell(str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        warnings.filterwarnings("always", category=UserWarning, module=r"sdrt\..*")
        yield
