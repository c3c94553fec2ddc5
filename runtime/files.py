"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from sdrt.runtime.errors import OutputError

_AT_FDCWD: Final = -100  # linux/fcntl.h
_RENAME_EXCHANGE: Final = 2  # linux/fs.h


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary name beside ``path``, then rename it there.

    Raises:
        OutputError: The folder does not exist or cannot be written, or the disk is full. Nothing is left
            behind, and an older file at ``path`` is kept.
    """
    write_all_atomically({path: data})


def write_all_atomically(files: Mapping[Path, bytes]) -> None:
    """Write several files, or none: only when all are on the disk under temporary names are they renamed.

    Raises:
        OutputError: As for `write_atomically`; no new file is left and every older one is kept.
    """
    # Not `tempfile`, whose files ignore the umask.
    suffix = f"{os.getpid()}-{secrets.token_hex(4)}.tmp"
    waiting = {path: path.parent / f".sdrt-{index}-{suffix}" for index, path in enumerate(files)}
    path = Path()
    try:
        for path, data in files.items():
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            _write_new(waiting[path], data)
        for path, temporary in waiting.items():
            temporary.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {explain(error)}") from error
    finally:
        for temporary in waiting.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _write_new(file: Path, data: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def explain(error: OSError) -> str:
    """The operating system's reason in words, with what to do where that is clear."""
    hints = {
        errno.ENOENT: "the folder does not exist: make it first",
        errno.ENOTDIR: "a part of the path is not a folder",
        errno.EACCES: "no permission to write there",
        errno.EROFS: "the file system is read-only",
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EISDIR: "there is a folder of that name",
        errno.ENAMETOOLONG: "the file name is too long",
    }
    return hints.get(error.errno or 0, error.strerror or str(error))


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place when the block ends without an error.

    With ``replace`` an older folder is exchanged in one system call, so that at every moment (SIGKILL
    included) there is either the old folder or the new one under the name.

    Raises:
        OutputError: ``path`` exists and ``replace`` is false, or the place cannot be written.
    """
    path = path.absolute()
    if os.path.lexists(path) and not replace:
        raise OutputError(f"{path} exists already; give another name, or --force to replace it")
    prefix = f".{path.name}.part-"
    try:
        _remove_abandoned(path.parent, prefix)
        temporary = path.with_name(f"{prefix}{os.getpid()}-{secrets.token_hex(4)}")
        temporary.mkdir()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {explain(error)}") from error
    try:
        yield temporary
        _move_into_place(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {explain(error)}") from error
    finally:
        # After an exchange this is the old folder; after an error the unfinished one.
        _remove(temporary)


def _move_into_place(temporary: Path, path: Path) -> None:
    if not os.path.lexists(path):
        temporary.rename(path)
    elif not _exchange(temporary, path):
        # Not Linux, or a file system without the exchange: the old folder is away for an instant.
        aside = temporary.with_name(temporary.name + "-old")
        path.rename(aside)
        try:
            temporary.rename(path)
        except OSError:
            aside.rename(path)
            raise
        _remove(aside)


def _remove(path: Path) -> None:
    """Delete a folder, or the link or file that stood in a folder's place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names with renameat2(2); False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    status = renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE))
    return bool(status == 0)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Delete the unfinished folders of processes that are gone (killed, power cut)."""
    for found in parent.iterdir():  # not `glob`: the name may hold its special characters
        pid = found.name.removeprefix(prefix).split("-")[0]
        if found.name.startswith(prefix) and pid.isdecimal() and not _alive(int(pid)):
            _remove(found)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
