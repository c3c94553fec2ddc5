"""Which files were found to have which SHA-256, so that gigabytes need not be hashed at every start.

A file counts as known while device, inode, size and both of its times are what they were: whatever writes
to it, or puts another one in its place, changes its time of change, which no program can set. What escapes
this is a disk that returns other bytes than were written; `Bundle.verify` hashes everything anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

from sdrt.kernels.cache import read_kept, short_name, write_kept

KIND: Final = "verified"
# A file that was changed just now may be changed again within one tick of the file system's clock.
SETTLED_SECONDS: Final = 2.0
_MAX_RECORD_BYTES: Final = 16 << 20

# Device, inode, size, time of the last writing and of the last change in nanoseconds.
FileState = list[int]


class VerifiedFiles:
    """What is known of the files of one folder. A record that cannot be read or written is no error."""

    def __init__(self, folder: Path) -> None:
        """Read the record.

        Args:
            folder: That the files are in.
        """
        self._folder = folder
        self._path = os.fsencode(folder.absolute())
        self._name = f"{short_name(self._path)}.json"
        content = read_kept(KIND, self._name, _MAX_RECORD_BYTES)
        record = {} if content is None else json.loads(content)
        # Names are short: another folder may have the same.
        ours = record.get("folder") == self._path.hex()
        self._known: dict[str, list[Any]] = record["files"] if ours else {}
        self._changed = False

    def sha256(self, path: str) -> str | None:
        """The SHA-256 that a file was found to have, or None if it is not known or was touched since.

        Args:
            path: Relative to the folder.
        """
        state, sha256 = self._known.get(path, (None, None))
        try:
            return sha256 if state == file_state((self._folder / path).stat()) else None
        except OSError:
            return None

    def remember(self, path: str, sha256: str, state: FileState | None) -> None:
        """Keep what a file was found to have.

        Args:
            path: Relative to the folder.
            sha256: In hex.
            state: Of the very file that was hashed: see `hashed`. Without one nothing is kept.
        """
        if state is not None:
            self._known[path] = [state, sha256]
            self._changed = True

    def save(self) -> None:
        """Write the record if there is anything new."""
        if self._changed:
            record = {"folder": self._path.hex(), "files": self._known}
            self._changed = not write_kept(KIND, self._name, json.dumps(record).encode())


def hashed(stream: BufferedReader) -> tuple[str, FileState | None]:
    """SHA-256 in hex and state of an open file, read from its beginning.

    Both are of the one file that is open, whatever has its name by now. There is no state if it changed
    meanwhile, or so short a time ago that a change might not show.
    """
    import hashlib  # OpenSSL, 3 ms: files that were compared before are not hashed again

    began = time.time()
    before = file_state(os.fstat(stream.fileno()))
    digest = hashlib.file_digest(stream, "sha256").hexdigest()
    settled = began - max(before[-2:]) / 1e9 > SETTLED_SECONDS
    return digest, before if settled and file_state(os.fstat(stream.fileno())) == before else None


def file_state(facts: os.stat_result) -> FileState:
    """By which a file that was hashed is known again."""
    return [facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]


def boot_id() -> str:
    """Another one each time that the system was started; empty where it does not say."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return ""
