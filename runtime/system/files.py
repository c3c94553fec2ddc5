"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Final

from sdrt.runtime.errors import OutputError
from sdrt.runtime.system.c_library import c_library
from sdrt.runtime.system.interrupts import finishing, undone

_ANYONE_WRITES: Final = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
_AT_FDCWD: Final = -100  # linux/fcntl.h
_RENAME_NOREPLACE: Final = 1  # linux/fs.h
_RENAME_EXCHANGE: Final = 2
_ASIDE: Final = "-old"  # ends the name of a folder that is away while another takes its place
# Names of what is not finished, as `write_all_atomically` and `new_folder` make them.
_FILE: Final = re.compile(r"\.sdrt-\d+-\d+-[0-9a-f]{8}\.tmp")
_FOLDER: Final = re.compile(rf"\.sdrt-(.+)\.part-[0-9a-f]{{16}}({_ASIDE})?", re.DOTALL)


def place_of(path: Path) -> Path:
    """Where a file that a user named is written: at a symbolic link's end, which stays a link.

    Raises:
        OutputError: A file is there that is read-only (for root too, whom the system would let), or links
            lead in a circle.
    """
    linked = os.path.islink(path)  # noqa: PTH114 - Path.is_symlink raises for a name that is too long
    place = Path(os.path.realpath(path)) if linked else path
    try:
        mode = place.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):  # new, or a folder that whoever writes will miss
        return place
    except OSError as error:
        raise OutputError(f"cannot write {path}: {explain(error)}") from error
    if stat.S_ISREG(mode) and not (mode & _ANYONE_WRITES and os.access(place, os.W_OK)):
        raise OutputError(f"cannot write {path}: the file is read-only; give another name, or chmod u+w it")
    return place


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
    waiting: dict[Path, Path] = {}
    path = Path()
    with finishing():
        try:
            with contextlib.ExitStack() as opened:  # closing a file may fail once more as writing it did
                for path, data in files.items():
                    if path.is_dir():
                        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                    _write(opened.enter_context(_new_file(path, waiting)), data)
                for path, temporary in waiting.items():
                    temporary.replace(path)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {explain(error)}") from error
        finally:
            for temporary in waiting.values():
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)


def _new_file(path: Path, waiting: dict[Path, Path]) -> IO[bytes]:
    """A file beside ``path``, whose name is put into ``waiting``; it is locked until it is closed."""
    # Not `tempfile`, whose files ignore the umask.
    while True:
        name = f".sdrt-{len(waiting)}-{os.getpid()}-{os.urandom(4).hex()}.tmp"
        waiting[path] = path.parent / name
        stream = waiting[path].open("xb")
        with contextlib.suppress(BlockingIOError):
            if _lock(stream.fileno()):
                return stream
        stream.close()  # another process took it for one that was left behind


def _write(stream: IO[bytes], data: bytes) -> None:
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
        errno.ELOOP: "links lead in a circle",
        errno.EISDIR: "there is a folder of that name",
        errno.ENAMETOOLONG: "the file name is too long",
    }
    return hints.get(error.errno or 0, error.strerror or str(error))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, an error of the operating system is an OutputError about ``path``."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {explain(error)}") from error


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place when the block ends without an error.

    With ``replace`` an older folder is exchanged in one system call, so that at every moment (SIGKILL
    included) there is either the old folder or the new one under the name. Without it, whatever has come
    into being at ``path`` meanwhile is left alone. Where the system has no such call (not Linux, some
    network file systems) there is an instant with neither; the old folder is then put back by the next call.

    Errors of the block itself pass through.

    Raises:
        OutputError: ``path`` exists and ``replace`` is false, or the place cannot be written.
    """
    path = path.absolute()
    if os.path.lexists(path) and not replace:
        raise _taken(path)
    with contextlib.ExitStack() as undo:
        with writing(path):
            clear_leftovers(path.parent)
        with finishing(), writing(path):
            temporary = _unfinished_folder(path, undo)
        yield temporary
        with finishing(), writing(path):
            _move_into_place(temporary, path, replace=replace)
            _remove(temporary)  # after an exchange this is the old folder


def _unfinished_folder(path: Path, undo: contextlib.ExitStack) -> Path:
    """A new folder beside ``path``, locked; ``undo`` removes it, and so does an interrupt."""
    while True:
        temporary = path.with_name(f".sdrt-{path.name}.part-{os.urandom(8).hex()}")
        temporary.mkdir()
        undo.callback(_remove, temporary)
        undo.enter_context(undone(partial(_remove_while_written, temporary)))
        # Another process may take it for one that was left behind, until it is locked.
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            undo.enter_context(_locked(temporary))
            if os.path.lexists(temporary):
                return temporary


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path``, on a disk that has room for what is made there; it is gone afterwards.

    What a SIGKILL leaves of it is deleted by the next call for the same place, or by `new_folder`.

    Raises:
        OutputError: The place cannot be written.
    """
    path = path.absolute()
    with contextlib.ExitStack() as undo:
        with writing(path):
            clear_leftovers(path.parent)
        with finishing(), writing(path):
            folder = _unfinished_folder(path, undo)
        yield folder


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder where the system has its temporary files; it is gone afterwards, whatever ends the block."""
    import tempfile

    with contextlib.ExitStack() as undo:
        with finishing():
            folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="sdrt-")))
            undo.enter_context(undone(partial(_remove_while_written, folder)))
        yield folder


def _taken(path: Path) -> OutputError:
    return OutputError(f"{path} exists already; give another name, or --force to replace it")


def _move_into_place(temporary: Path, path: Path, *, replace: bool) -> None:
    outcome = _renameat2(temporary, path, _RENAME_EXCHANGE if replace else _RENAME_NOREPLACE)
    if outcome == 0:
        return
    if outcome == errno.EEXIST:
        raise _taken(path)
    if not os.path.lexists(path):  # nothing to exchange with, or no such system call
        temporary.rename(path)
        return
    if not replace:
        raise _taken(path)
    aside = temporary.with_name(temporary.name + _ASIDE)
    path.rename(aside)
    try:
        temporary.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    _remove(aside)


def _renameat2(old: Path, new: Path, flags: int) -> int:
    """renameat2(2): 0, or the error number; ENOSYS where the system has no such call."""
    try:
        renameat2 = c_library().renameat2
    except (OSError, AttributeError):
        return errno.ENOSYS
    names = os.fsencode(old), os.fsencode(new)
    status = renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(flags))
    return 0 if status == 0 else ctypes.get_errno()


def _remove(path: Path) -> None:
    """Delete a folder, or the link or file that stood in a folder's place."""
    if path.is_dir() and not path.is_symlink():
        import shutil

        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _remove_while_written(path: Path) -> None:
    """The same, of a folder that another thread writes into for a moment longer."""
    for _ in range(100):
        _remove(path)
        if not os.path.lexists(path):
            return
        time.sleep(0.01)


def clear_leftovers(folder: Path) -> None:
    """Delete what processes of this user that are gone (killed, power cut) left unfinished in a folder.

    It may be a folder of the user's own: what has such a name but is of another kind is left alone. A live
    process holds a lock on what it writes, which other containers and hosts that share the file system see
    too; a process id they would not. A folder that was away when its process was killed is put back.

    Raises:
        OSError: The folder cannot be read.
    """
    for found in folder.iterdir():
        unfinished = _FOLDER.fullmatch(found.name)
        if not unfinished and not _FILE.fullmatch(found.name):
            continue
        with contextlib.suppress(OSError):  # somebody's, or gone
            if unfinished and unfinished[2]:
                _clear_aside(found, folder / unfinished[1])
            elif not _is_ours(found, stat.S_ISDIR if unfinished else stat.S_ISREG):
                continue
            elif found.is_symlink():
                found.unlink()
            else:
                with _locked(found):
                    _remove(found)


def _clear_aside(aside: Path, place: Path) -> None:
    """Put back what was at ``place``, or delete it, unless whoever put it aside is still at work."""
    with contextlib.suppress(FileNotFoundError), _locked(aside.with_name(aside.name.removesuffix(_ASIDE))):
        pass
    if not os.path.lexists(place):
        aside.rename(place)
    elif _is_ours(aside, stat.S_ISDIR):
        _remove(aside)


def _is_ours(found: Path, is_kind: Callable[[int], bool]) -> bool:
    """Whether it is this user's and of a kind, or a link, which may have made room for a folder."""
    facts = found.lstat()
    return facts.st_uid == os.geteuid() and (is_kind(facts.st_mode) or stat.S_ISLNK(facts.st_mode))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder or file; BlockingIOError if another process has it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock what is open there, until it is closed; whether it still has a name.

    Raises:
        BlockingIOError: Another process has it.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return os.fstat(descriptor).st_nlink > 0
