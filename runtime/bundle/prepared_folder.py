"""What an engine library made of a component for this CPU, kept from run to run in a folder of its own.

What was made for another CPU or version would be read as garbage, so its key is all that decides what is
made. What goes in is a private copy of the component's listed files, hashed as it is written: a file that is
exchanged meanwhile, or that no list names, has no part in it. What comes out is hashed once after each start
of the system and after each change. A cache that cannot be read or written is no error: the caller does
without.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from sdrt.kernels.cache import (
    cache_folder,
    mark_used,
    open_private,
    private_folder,
    read_sealed,
    remove_unused,
    seal,
    short_name,
    usable_folder,
    write_private,
)
from sdrt.runtime.bundle.manifest import FileEntry
from sdrt.runtime.bundle.verified_files import boot_id, file_state, hashed
from sdrt.runtime.errors import BundleError
from sdrt.runtime.system.files import new_folder
from sdrt.runtime.system.untrusted import open_regular

RECORD_NAME: Final = "record.json"
SOURCE_NAME: Final = "source"  # of the copy that it is made of, gone when it is made
# On the disk: the copy of the weights, the weights, once more those that are packed, and room for others.
ROOM: Final = 3.5
SPARE_BYTES: Final = 1 << 30
WORTH_TELLING: Final = 200_000_000  # bytes of weights, which take seconds
_NAMES: Final = re.compile(r"[0-9a-f]{8}")
_MAX_RECORD_BYTES: Final = 1 << 20
_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """A component's files, compared with the SHA-256 that stand there.

    Attributes:
        folder: Of the bundle.
        model: Which of the files is the graph.
        files: All that the graph consists of, as the manifest lists them.
        again: Hash what was prepared of them also where that was done since the system was started.
    """

    folder: Path
    model: str
    files: tuple[FileEntry, ...]
    again: bool = False


class PreparedFolder:
    """The place of what is prepared of one component; there may be nothing yet.

    Attributes:
        path: The folder.
    """

    def __init__(self, backend: str, source: Source, key: Mapping[str, Any]) -> None:
        """Compute the key.

        Args:
            backend: Whose folder in the cache it is.
            source: What it is made of.
            key: What else decides what is made, but for the CPU: the library's version and options, the
                format.
        """
        self._backend, self._source = backend, source
        self._hashed: dict[str, Any] = {}  # the states of the files that were found whole
        whole = {
            **key,
            "model": source.model,
            "files": [[entry.path, entry.size, entry.sha256] for entry in source.files],
            "cpu": cpu_identity(),
        }
        self._key = json.dumps(whole, sort_keys=True)
        name = short_name(self._key.encode())
        self.path = cache_folder(backend) / name
        self._purpose = f"{backend}/{name}/{RECORD_NAME}"

    def exists(self) -> bool:
        """Whether it was prepared before, for this key, and is whole.

        Its files are hashed, unless that was done since the system was started and none was touched since.
        """
        if usable_folder(self._backend) is None:
            return False
        content = read_sealed(self.path / RECORD_NAME, self._purpose, _MAX_RECORD_BYTES)
        if content is None:
            return False
        record = json.loads(content)
        try:
            return record["key"] == self._key and self._is_whole(record)
        except OSError:
            return False

    def _is_whole(self, record: dict[str, Any]) -> bool:
        if not stat.S_ISDIR(self.path.lstat().st_mode):
            return False
        states = {name: file_state((self.path / name).lstat()) for name in record["files"]}
        boot = boot_id()  # empty where the system does not say: then it may have been started since
        known_before = bool(boot) and record["checked"] == [boot, states] and not self._source.again
        if known_before or states == self._hashed:
            return True
        known: dict[str, Any] = {}
        for name, (size, sha256) in record["files"].items():
            with open_private(self.path / name) as stream:
                if os.fstat(stream.fileno()).st_size != size:
                    return False
                found, known[name] = hashed(stream)
            if found != sha256:
                return False
        if all(known.values()):
            self._hashed = known
            with contextlib.suppress(OSError):
                self._write_record(self.path, {**record, "checked": [boot, known]})
        return True

    def loaded(self) -> None:
        """Note that somebody has use for it."""
        mark_used(self.path / RECORD_NAME)

    def make(self, fill: Callable[[Path, Path], None]) -> bool:
        """Prepare it; whether that could be done.

        Args:
            fill: Given the graph, with its other files beside it as in the bundle, and the folder that it
                writes files into. The graph is gone when it has returned.

        Raises:
            BundleError: A file is not the one that was compared any more, or ``fill`` raises one.
        """
        import logging
        import shutil

        if usable_folder(self._backend, make=True) is None:
            return False
        try:
            parent = private_folder(self._backend)
            remove_unused(parent, _NAMES, RECORD_NAME)  # of bundles, versions and CPUs that are no more
            source_bytes = sum(entry.size for entry in self._source.files)
            if shutil.disk_usage(parent).free < ROOM * source_bytes + SPARE_BYTES:
                return False
            if source_bytes >= WORTH_TELLING:
                size = f"{source_bytes / 1e9:.1f} GB of weights"
                logging.getLogger("sdrt").info(
                    "preparing %s for this CPU, once: the result stays in %s", size, parent
                )
            with new_folder(self.path, replace=True) as folder:
                folder.chmod(stat.S_IRWXU)
                copy = folder / SOURCE_NAME
                for entry in self._source.files:
                    _copy(self._source.folder / entry.path, copy / entry.path, entry)
                fill(copy / self._source.model, folder)
                shutil.rmtree(copy)
                self._write_record(folder, self._record(folder))
        except BundleError:
            raise
        except Exception:  # of the system, or the library's: the plain graph will say what is wrong with it
            return False
        return True

    def _record(self, folder: Path) -> dict[str, Any]:
        """The key, and of every file size and SHA-256; they are on the disk then."""
        files, states = {}, {}
        for file in sorted(folder.iterdir()):
            file.chmod(stat.S_IRUSR | stat.S_IWUSR)
            with open_private(file) as stream:
                # Before the folder has its name: a file of the right size and no content would be loaded.
                os.fsync(stream.fileno())
                sha256, states[file.name] = hashed(stream)
                files[file.name] = [os.fstat(stream.fileno()).st_size, sha256]
        return {
            "key": self._key,
            "files": files,
            "checked": [boot_id(), states] if all(states.values()) else None,
        }

    def _write_record(self, folder: Path, record: dict[str, Any]) -> None:
        write_private(folder / RECORD_NAME, seal(self._purpose, json.dumps(record).encode()))


def _copy(file: Path, target: Path, entry: FileEntry) -> None:
    """Copy a file, which must have the recorded size and SHA-256.

    Raises:
        OSError: It cannot be read or written.
        BundleError: It is another file.
    """
    import hashlib

    target.parent.mkdir(parents=True, exist_ok=True)
    digest, left = hashlib.sha256(), entry.size
    with open_regular(file) as stream, target.open("xb") as copy:
        while chunk := stream.read(min(_CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                break
            digest.update(chunk)
            copy.write(chunk)
    if left or digest.hexdigest() != entry.sha256:
        raise BundleError(f"{file} was altered while it was loaded; export the bundle again")


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
