"""Which files were found to have which SHA-256, so that gigabytes need not be hashed at every start.

A file counts as known while device, inode, size and both of its times are what they were: whatever writes
to it, or puts another one in its place, changes its time of change, which no program can set. What escapes
this is a disk that returns other bytes than were written; `Bundle.verify` hashes everything anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from pathlib import Path
from typing import Any, Final

from sdrt.kernels.cache import cache_folder
from sdrt.runtime.errors import OutputError
from sdrt.runtime.files import write_atomically

# A file that was changed just now may be changed again within one tick of the file system's clock.
SETTLED_SECONDS: Final = 2.0


class VerifiedFiles:
    """What is known of the files of one folder. A record that cannot be read or written is no error."""

    def __init__(self, folder: Path) -> None:
        """Read the record.

        Args:
            folder: That the files are in.
        """
        self._folder = folder
        # Two folders of one name here would only write over each other's record: inodes differ.
        name = zlib.crc32(os.fsencode(folder.absolute()))
        self._record = cache_folder("verified") / f"{name:08x}.json"
        self._known: dict[str, list[Any]] = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._record.read_text(encoding="utf-8"))
            self._known = found if isinstance(found, dict) else {}
        self._changed = False

    def sha256(self, path: str) -> str | None:
        """The SHA-256 that a file was found to have, or None if it is not known or was touched since.

        Args:
            path: Relative to the folder.
        """
        entry = self._known.get(path)
        try:
            if not isinstance(entry, list) or entry[:-1] != _state(self._folder / path):
                return None
        except OSError:
            return None
        return str(entry[-1])

    def remember(self, path: str, sha256: str, began: float) -> None:
        """Keep what a file was found to have.

        Args:
            path: Relative to the folder.
            sha256: In hex.
            began: When reading it began, as `time.time` says.
        """
        with contextlib.suppress(OSError):
            state = _state(self._folder / path)
            if began - max(state[-2:]) / 1e9 > SETTLED_SECONDS:
                self._known[path] = [*state, sha256]
                self._changed = True

    def save(self) -> None:
        """Write the record if there is anything new."""
        if not self._changed:
            return
        with contextlib.suppress(OSError, OutputError):
            self._record.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._record, json.dumps(self._known).encode())
            self._changed = False


def _state(file: Path) -> list[int]:
    facts = file.stat()
    return [facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
