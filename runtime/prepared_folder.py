"""What an engine library made of a component for this CPU, kept from run to run in a folder of its own.

What was made for another CPU or version would be read as garbage, so its key is all that decides what is
made. A cache that cannot be read or written is no error: the caller does without.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from sdrt.kernels.cache import cache_folder, mark_used, remove_unused
from sdrt.runtime.files import new_folder
from sdrt.runtime.manifest import FileEntry

RECORD_NAME: Final = "record.json"
# On the disk: the weights, once more those that are packed, and room for others to work in.
ROOM: Final = 2.5
SPARE_BYTES: Final = 1 << 30
WORTH_TELLING: Final = 200_000_000  # bytes of weights, which take seconds


class PreparedFolder:
    """The place of what is prepared of one component; there may be nothing yet.

    Attributes:
        path: The folder.
    """

    def __init__(self, backend: str, files: Sequence[FileEntry], key: Mapping[str, Any]) -> None:
        """Compute the key.

        Args:
            backend: Whose folder in the cache it is.
            files: The component's files with their SHA-256, as the manifest lists them; they must be known to
                have it.
            key: What else decides what is made, but for the CPU: the library's version, the format.
        """
        self._source_bytes = sum(entry.size for entry in files)
        whole = {
            **key,
            "files": [[entry.path, entry.size, entry.sha256] for entry in files],
            "cpu": cpu_identity(),
        }
        self._key = json.dumps(whole, sort_keys=True)
        # A short name is enough: the record holds the whole key.
        self.path = cache_folder(backend) / f"{zlib.crc32(self._key.encode()):08x}"

    def exists(self) -> bool:
        """Whether it was prepared before, for this key, and nothing was changed or cut off since."""
        try:
            record = json.loads((self.path / RECORD_NAME).read_text(encoding="utf-8"))
            return bool(record == self._record(self.path))
        except (OSError, ValueError):
            return False

    def loaded(self) -> None:
        """Note that somebody has use for it."""
        mark_used(self.path)

    def make(self, fill: Callable[[Path], None]) -> bool:
        """Prepare it; whether that could be done.

        Args:
            fill: Writes the files into the folder that it is given.
        """
        import logging
        import shutil

        parent = self.path.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            remove_unused(parent)  # of bundles, versions and CPUs that are no more
            if shutil.disk_usage(parent).free < ROOM * self._source_bytes + SPARE_BYTES:
                return False
            if self._source_bytes >= WORTH_TELLING:
                size = f"{self._source_bytes / 1e9:.1f} GB of weights"
                logging.getLogger("sdrt").info(
                    "preparing %s for this CPU, once: the result stays in %s", size, parent
                )
            with new_folder(self.path, replace=True) as folder:
                fill(folder)
                for file in sorted(folder.iterdir()):
                    _flush(file)
                (folder / RECORD_NAME).write_text(json.dumps(self._record(folder)), encoding="utf-8")
                _flush(folder / RECORD_NAME)
        except Exception:  # of the system, or the library's: the plain graph will say what is wrong with it
            return False
        return True

    def _record(self, folder: Path) -> dict[str, Any]:
        """The key, and of every file size and time of change, which show that one was touched or cut off."""
        facts = {file.name: file.stat() for file in folder.iterdir() if file.name != RECORD_NAME}
        files = {name: [fact.st_size, fact.st_mtime_ns] for name, fact in sorted(facts.items())}
        return {"key": self._key, "files": files}


@cache
def cpu_identity() -> tuple[str, ...]:
    """What engine libraries look at when they choose kernels: architecture, model and instruction sets."""
    wanted = (
        "vendor_id",
        "cpu family",
        "model",
        "stepping",
        "flags",
        "CPU implementer",
        "CPU part",
        "Features",
    )
    found = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
        for line in lines:
            name, _, value = line.partition(":")
            if not line.strip():  # the first processor is enough
                break
            found[name.strip()] = value.strip()
    return (platform.machine(), *(found.get(name, "") for name in wanted))


def _flush(file: Path) -> None:
    """On the disk before the folder has its name: a file of the right size and no content would be loaded."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
