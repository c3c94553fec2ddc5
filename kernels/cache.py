"""Where what was computed once is kept for the next process, and how that knows it for this user's own.

Nothing that lies in a cache counts by its name, size or time. Its folders are made for this user alone, and
are not used where somebody else can write; what is read back ends in an HMAC-SHA256 (RFC 2104) under a key
that lies there for this user alone. What others put there, and what a disk made of it, is as if it was not
there. A cache is never needed: a caller that cannot write there does without.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import stat
import time
import warnings
import zlib
from _operator import _compare_digest  # what hmac.compare_digest is
from io import BufferedReader
from pathlib import Path
from typing import Final

# Python's own SHA-256: hashlib and hmac load OpenSSL, which takes 2 to 20 ms and 3 MB for some kilobytes.
try:
    from _sha2 import sha256  # type: ignore[import-not-found]
except ImportError:
    try:
        from _sha256 import sha256  # type: ignore[import-not-found]  # before Python 3.12
    except ImportError:
        from hashlib import sha256  # a Python that was built without

UNUSED_SECONDS: Final = 30 * 24 * 3600.0  # after which what nobody used is removed
KEY_NAME: Final = "key"
_KEY_BYTES: Final = 32
_TAG_BYTES: Final = 32  # of SHA-256
_BLOCK_BYTES: Final = 64
_INNER_PAD: Final = bytes(byte ^ 0x36 for byte in range(256))
_OUTER_PAD: Final = bytes(byte ^ 0x5C for byte in range(256))
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


class CacheWarning(UserWarning):
    """A cache is not used since somebody else could have put something there."""


class UnsafeCacheError(PermissionError):
    """A folder of the cache is a link, belongs to another user, or can be written by others."""


def cache_folder(kind: str) -> Path:
    """``$SDRT_CACHE/kind``, by default ``~/.cache/sdrt/kind``; it need not exist."""
    root = os.environ.get("SDRT_CACHE")
    try:
        folder = Path(root) if root else Path.home() / ".cache" / "sdrt"
    except RuntimeError:  # no home: any place that cannot be written does
        folder = Path(os.devnull)
    return folder / kind


def short_name(key: bytes) -> str:
    """A name of eight hex digits for what is kept under a key; what is kept must hold the whole key."""
    return f"{zlib.crc32(key):08x}"


def private_folder(kind: str, *, make: bool = True) -> Path:
    """`cache_folder` of a kind after a look at every level from the cache's own folder down.

    Args:
        kind: May have several levels, as ``bench/bundles``.
        make: Make what is missing, for this user alone whatever the umask.

    Raises:
        UnsafeCacheError: A level is a link, belongs to another user or can be written by others; the words
            say what to do.
        OSError: It is not there, or cannot be made.
    """
    level = cache_folder("")
    for part in ("", *Path(kind).parts):
        level = level / part
        if make:
            with contextlib.suppress(FileExistsError):
                level.parent.mkdir(parents=True, exist_ok=True)
                level.mkdir(stat.S_IRWXU)  # never more than that, and less only until the next line
                level.chmod(stat.S_IRWXU)
        _check_level(level)
    return level


def usable_folder(kind: str, *, make: bool = False) -> Path | None:
    """`private_folder`, or None where there is none; one that is refused is told, once in a process."""
    try:
        return private_folder(kind, make=make)
    except UnsafeCacheError as error:
        _tell(f"{error.filename} is not used as a cache: {error.strerror}")
    except OSError:
        pass
    return None


def _check_level(level: Path) -> None:
    facts = level.lstat()
    words = ""
    if stat.S_ISLNK(facts.st_mode):
        words = "it is a link; set SDRT_CACHE to a folder of your own, or put a folder in its place"
    elif not stat.S_ISDIR(facts.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(level))
    elif facts.st_uid != os.geteuid():
        words = "it belongs to another user; set SDRT_CACHE to a folder of your own"
    elif facts.st_mode & _OTHERS_WRITE:
        words = f"others can write there; `chmod go-w {level}`, or set SDRT_CACHE to a folder of your own"
    if words:
        raise UnsafeCacheError(errno.EPERM, words, str(level))


@functools.cache
def _tell(message: str) -> None:
    warnings.warn(message, CacheWarning, stacklevel=1)


def open_private(path: Path) -> BufferedReader:
    """Open a regular file that is this user's and that nobody else can write; never follows a link or waits.

    Raises:
        OSError: It is missing, or is not such a file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if facts.st_uid != os.geteuid() or facts.st_mode & _OTHERS_WRITE:
            raise PermissionError(errno.EPERM, "others can write it", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def write_private(path: Path, content: bytes) -> None:
    """Write a file for this user alone, whole or not at all: others may read or write it meanwhile.

    Raises:
        OSError: It cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        _write_new(temporary, content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_new(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        os.fchmod(descriptor, stat.S_IRUSR | stat.S_IWUSR)
        stream.write(content)
        stream.flush()
        os.fsync(descriptor)


def seal(purpose: str, content: bytes) -> bytes:
    """Content with the HMAC behind it by which `unseal` knows it.

    Args:
        purpose: What it is and where it belongs: it is not known for anything else.
        content: Any bytes.

    Raises:
        OSError: There is no key, and none can be written.
    """
    return content + _tag(_key(make=True), purpose, content)


def unseal(purpose: str, sealed: bytes) -> bytes | None:
    """What `seal` was given for this purpose by this user; None for any other bytes."""
    content, tag = sealed[:-_TAG_BYTES], sealed[-_TAG_BYTES:]
    try:
        known = _compare_digest(tag, _tag(_key(make=False), purpose, content))
    except OSError:
        return None
    return content if known else None


def read_kept(kind: str, name: str, limit: int) -> bytes | None:
    """What `write_kept` kept under a name; None where there is nothing that this user kept there.

    Args:
        kind: See `cache_folder`.
        name: Of the file.
        limit: Bytes; what is larger is not read.
    """
    folder = usable_folder(kind)
    if folder is None:
        return None
    return read_sealed(folder / name, f"{kind}/{name}", limit)


def write_kept(kind: str, name: str, content: bytes) -> bool:
    """Keep content under a name for `read_kept`; whether that could be done."""
    folder = usable_folder(kind, make=True)
    if folder is None:
        return False
    try:
        write_private(folder / name, seal(f"{kind}/{name}", content))
    except OSError:
        return False
    return True


def read_sealed(path: Path, purpose: str, limit: int) -> bytes | None:
    """The content of a sealed file of at most ``limit`` bytes, or None; see `unseal`."""
    try:
        with open_private(path) as stream:
            sealed = stream.read(limit + _TAG_BYTES + 1)
    except OSError:
        return None
    return unseal(purpose, sealed) if len(sealed) <= limit + _TAG_BYTES else None


def _tag(key: bytes, purpose: str, content: bytes) -> bytes:
    """``hmac.digest(key, purpose + b"\\0" + content, "sha256")``, without what hmac loads."""
    block = key.ljust(_BLOCK_BYTES, b"\0")
    inner = sha256(block.translate(_INNER_PAD))
    inner.update(purpose.encode() + b"\0")
    inner.update(content)
    return bytes(sha256(block.translate(_OUTER_PAD) + inner.digest()).digest())


def _key(*, make: bool) -> bytes:
    """This user's key: 32 random bytes in the cache's folder, made when something is first kept.

    One that others may have read, or that was cut short, is made anew; what it sealed is then unknown.
    """
    path = private_folder("", make=make) / KEY_NAME
    key = _read_key(path)
    for _ in range(2 if key is None and make else 0):
        with contextlib.suppress(FileExistsError):  # another process was first: its key is as good
            _write_new(path, os.urandom(_KEY_BYTES))
        key = _read_key(path)
        if key is not None:
            break
        path.unlink(missing_ok=True)
    if key is None:
        raise FileNotFoundError(errno.ENOENT, "there is no key", str(path))
    return key


def _read_key(path: Path) -> bytes | None:
    with contextlib.suppress(OSError), open_private(path) as stream:
        key = stream.read(_KEY_BYTES + 1)
        if len(key) == _KEY_BYTES and not os.fstat(stream.fileno()).st_mode & _OTHERS:
            return key
    return None


def mark_used(marker: Path) -> None:
    """Note that the folder of a cache that a marker lies in was used now, if that can be written.

    Args:
        marker: The file that says so by its time; made if it is not there.
    """
    with contextlib.suppress(OSError):
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(marker, flags, 0o600)
        try:
            os.utime(descriptor)
        finally:
            os.close(descriptor)


def remove_unused(parent: Path, names: re.Pattern[str], marker: str) -> None:
    """Remove what we made in a folder and nobody used for `UNUSED_SECONDS`; never anything else.

    Args:
        parent: From `private_folder`.
        names: What such folders are called, the whole of it. Links are none.
        marker: The file in each of them whose time says when it was used: see `mark_used`. A folder without
            it is not ours.
    """
    import shutil  # with its compressors 2 ms, and mostly there is nothing to remove

    with contextlib.suppress(OSError):
        for folder in parent.iterdir():
            if names.fullmatch(folder.name) and _is_unused(folder, marker):
                shutil.rmtree(folder, ignore_errors=True)


def _is_unused(folder: Path, marker: str) -> bool:
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return False
        facts = (folder / marker).lstat()
    except OSError:
        return False
    ours = stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid()
    return ours and time.time() - facts.st_mtime > UNUSED_SECONDS
