"""Folders that tests make once: shared with the other workers of a run, and with the runs after it.

They lie in ``out/tests``, each under the hash of all that it was made from. ``make clean`` removes them.
"""

from __future__ import annotations

import fcntl
import functools
import gc
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from types import FunctionType
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
PLACE: Final = ROOT / "out" / "tests"
# All that an export may run or read.
SOURCES: Final = ("src/sdrt/__init__.py", "runtime", "kernels", "export")
KEPT: Final = 2  # of one name: that of the sources as they are, and that of another branch


def made_once(
    name: str, target: Path, make: Callable[[Path], object], *parts: str | Path | Callable[..., Any]
) -> Path:
    """Let ``make`` fill a folder, unless one of the same parts was made before; the caller gets a copy.

    Args:
        name: What is made.
        target: The folder to be.
        make: Called with a path that is not there yet, while nobody else makes one of that name.
        *parts: What the result depends on besides the sources of sdrt, the installed versions and the file
            that ``make`` stands in: options, files or folders that are read, functions that are called (the
            file of each counts).

    Returns:
        The target, which is the caller's alone: a test that damages it by mistake harms no other run.
    """
    key = _key(make, *parts)
    PLACE.mkdir(parents=True, exist_ok=True)
    with _locked(PLACE / f"{name}.lock"):
        made = PLACE / f"{name}-{key}"
        if made.exists():
            made.touch()
        else:
            unfinished = PLACE / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            leave_what_lasts()  # PyTorch's tracer leaves much behind
            unfinished.rename(made)
            _prune(name)
        return Path(shutil.copytree(made, target))


def exported_once(
    name: str, target: Path, export: Callable[[Path], object], *parts: str | Path | Callable[..., Any]
) -> Path:
    """`made_once` for a bundle, which is known afterwards as one that was exported here."""
    from sdrt.runtime.admission.records import accept
    from sdrt.runtime.bundle.bundle import Bundle

    def without_what_lasts(folder: Path) -> None:
        import sdrt.export.writer  # noqa: F401 - what it imports, PyTorch above all, lasts

        leave_what_lasts()
        export(folder)

    manifest = Bundle.open(made_once(name, target, without_what_lasts, *parts, export)).manifest
    for part in manifest.components.values():
        accept(part.files)
    for facts in manifest.tokenizers:
        accept([facts.file])
    return target


def leave_what_lasts() -> None:
    """Take what lasts, imports above all, out of the garbage collector's sight.

    With PyTorch imported, each full collection takes half a second, and an export alone calls for 17.
    """
    gc.collect()
    gc.freeze()


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _prune(name: str) -> None:
    """Remove all but those that were used last."""
    there = [path for path in PLACE.glob(f"{name}-*") if path.name.rpartition("-")[0] == name]
    for old in sorted(there, key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old)


def _key(*parts: str | Path | Callable[..., Any]) -> str:
    digest = hashlib.sha256(_sources_and_versions())
    for part in parts:
        if isinstance(part, str):
            digest.update(f"text {part}\0".encode())
        else:
            digest.update(_of_files(part if isinstance(part, Path) else _file_of(part)))
    return digest.hexdigest()[:20]


def _file_of(function: Callable[..., Any]) -> Path:
    assert isinstance(function, FunctionType)
    return Path(function.__code__.co_filename)


@functools.cache
def _sources_and_versions() -> bytes:
    digest = hashlib.sha256(sys.version.encode())
    for line in sorted({f"{found.name}=={found.version}\n" for found in distributions()}):
        digest.update(line.encode())
    for folder in SOURCES:
        digest.update(_of_files(ROOT / folder))
    return digest.digest()


def _of_files(place: Path) -> bytes:
    """The hash of a file, or of all files of a folder with their names."""
    digest = hashlib.sha256()
    for file in [place] if place.is_file() else sorted(place.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            name = os.fsencode(file.relative_to(place)) if file != place else b""
            digest.update(b"%d %s\0%s" % (file.stat().st_size, name, file.read_bytes()))
    return digest.digest()
