"""Which components may be loaded without being tried first: this user exported them, or they were tried.

A record is of a component's files, all of them with their SHA-256, and of a backend; exported ones are good
for each. A record that cannot be read or written is no error: then the component is tried again.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Sequence
from typing import Final

from sdrt.kernels.cache import cache_folder
from sdrt.runtime.errors import OutputError
from sdrt.runtime.manifest import FileEntry
from sdrt.runtime.untrusted import read_limited

EXPORTED: Final = "exported"  # in a backend's place: good for all of them
_MAX_BYTES: Final = 1 << 20
_KNOWN: set[str] = set()  # of this process, where nothing can be written


def accepted(files: Sequence[FileEntry], backend: str) -> bool:
    """Whether files may be loaded on a backend as they are.

    Args:
        files: All that the engine library will read, with the SHA-256 that they were found to have.
        backend: Its name.
    """
    return any(_is_recorded(_key(files, name)) for name in (EXPORTED, backend))


def accept(files: Sequence[FileEntry], backend: str = EXPORTED) -> None:
    """Remember that files may be loaded; the arguments are those of `accepted`."""
    key = _key(files, backend)
    _KNOWN.add(key)
    folder = cache_folder("accepted")
    with contextlib.suppress(OSError, OutputError):
        from sdrt.runtime.files import write_atomically

        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(folder / _name(key), key.encode())


def _is_recorded(key: str) -> bool:
    if key not in _KNOWN:
        with contextlib.suppress(OSError, ValueError):
            if read_limited(cache_folder("accepted") / _name(key), _MAX_BYTES) == key.encode():
                _KNOWN.add(key)
    return key in _KNOWN


def _key(files: Sequence[FileEntry], backend: str) -> str:
    entries = sorted([entry.path, entry.size, entry.sha256] for entry in files)
    return json.dumps({"backend": backend, "files": entries})


def _name(key: str) -> str:
    """Short, since the record holds the whole key."""
    return f"{zlib.crc32(key.encode()):08x}.json"
