"""Files and JSON that came from somebody else: read within limits, and without waiting; errors of libraries.

A name in a bundle or a checkpoint may stand for anything: a pipe that nobody writes to, a device without an
end, a file of gigabytes, JSON nested a million deep. Here each of these is a ``ValueError`` that says what
was found; the caller makes it an error of its own kind. (Caches are read by `sdrt.kernels.cache`.)
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

from sdrt.runtime.errors import SdrtError

MAX_JSON_BYTES: Final = 64 << 20  # CLIP's vocabulary as tokenizer.json has 4 MB
MAX_JSON_DEPTH: Final = 64  # what we write nests 8 deep
_PANIC: Final = "PanicException"  # pyo3's, which a module has for itself
_MAX_WORDS: Final = 300  # characters of a library's message

# What people call files that run code when they are loaded.
PICKLE_SUFFIXES: Final = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")

_KINDS: Final = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading, links followed; never waits for a pipe's other end.

    Raises:
        OSError: It is missing or may not be read.
        ValueError: It is something else than a regular file; the message says what.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "no regular file")
        raise ValueError(f"{path} is {kind}: a regular file is wanted")
    return open(path, "rb", opener=lambda _path, _flags: descriptor)


def is_pickle(start: bytes) -> bool:
    """Whether a file that begins so is PyTorch's: a zip, or the bare stream of older versions.

    A safetensors file whose header has 640 bytes begins with the same two bytes as the latter, and then
    with a brace in the ninth place.
    """
    bare = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return start.startswith(b"PK\x03\x04") or (bare and start[8:9] != b"{")


def read_limited(path: str | Path, limit: int) -> bytes:
    """The whole content of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: It is missing or cannot be read.
        ValueError: It is no regular file, or larger.
    """
    with open_regular(path) as stream:
        content = stream.read(limit + 1)  # not the size that is stated: a file may grow
    if len(content) > limit:
        raise ValueError(f"{path} has more than {limit} bytes, which is the limit")
    return content


def parse_json(text: str | bytes, *, depth: int = MAX_JSON_DEPTH) -> Any:
    """What a JSON text holds, nested at most ``depth`` deep.

    Raises:
        ValueError: It is not JSON in UTF-8, nested deeper, or has a number without an end (``NaN``).
    """
    try:
        words = text if isinstance(text, str) else text.decode("utf-8")
        document = json.loads(words, parse_constant=_finite, parse_float=_finite)
    except (RecursionError, MemoryError):
        raise ValueError(f"it is nested more than {depth} deep, which is the limit") from None
    level: list[Any] = [document]
    for _ in range(depth):
        level = [entry for held in level for entry in _entries(held)]
        if not level:
            return document
    raise ValueError(f"it is nested more than {depth} deep, which is the limit")


def read_json(path: str | Path, *, limit: int = MAX_JSON_BYTES, depth: int = MAX_JSON_DEPTH) -> Any:
    """What a JSON file holds; see `read_limited` and `parse_json` for the limits and what is raised."""
    return parse_json(read_limited(path, limit), depth=depth)


@contextlib.contextmanager
def library_errors(error: Callable[[str], SdrtError], what: str) -> Iterator[None]:
    """Inside, whatever a library raises about somebody's data becomes an error of our own.

    A panic of a library in Rust is no ``Exception``, so that it would end the program; interruptions and our
    own errors pass through.

    Args:
        error: The class.
        what: Of the message: what could not be done with which data.
    """
    try:
        yield
    except SdrtError:
        raise
    except BaseException as found:
        if not isinstance(found, Exception) and type(found).__name__ != _PANIC:
            raise
        text = " ".join(str(found).split())[:_MAX_WORDS] or type(found).__name__
        raise error(f"{what} ({text})") from None


def _entries(held: Any) -> list[Any]:
    if isinstance(held, dict):
        return list(held.values())
    return held if isinstance(held, list) else []


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no finite number")
    return number
