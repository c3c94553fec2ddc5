"""Graphs as ONNX Runtime wants them on this CPU, kept from run to run.

Optimising a graph and repacking its weights for the CPU takes ONNX Runtime 7 to 19 s for Stable Diffusion
1.5 at every load. The result is written once; from then on it is mapped into memory in a second, and the
weights are pages of a file that processes share and the system can drop, in place of memory of their own.

Packed weights of another CPU or version would be read as garbage, so the key holds all that decides how
they are packed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from sdrt.kernels.cache import cache_folder, mark_used, remove_unused
from sdrt.runtime.executor_onnxruntime import open_session, quiet_options
from sdrt.runtime.files import new_folder
from sdrt.runtime.manifest import FileEntry

# ONNX Runtime 1.30 and 1.31 write such graphs as well, but end the process when one of them is run.
PREPARED_SINCE: Final = (1, 32)
FORMAT: Final = 2  # a change of what is written, or of how it is loaded
GRAPH_NAME: Final = "model.onnx"
WEIGHTS_NAME: Final = "model.onnx.data"
RECORD_NAME: Final = "record.json"
# On the disk: the weights, once more those that are packed, and room for others to work in.
ROOM: Final = 2.5
SPARE_BYTES: Final = 1 << 30
WORTH_TELLING: Final = 200_000_000  # bytes of weights, which take seconds
_SAVE: Final = {
    "session.optimized_model_external_initializers_file_name": WEIGHTS_NAME,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    "session.save_external_prepacked_constant_initializers": "1",
}


def can_prepare(ort: Any) -> bool:
    """Whether this ONNX Runtime runs what it prepared.

    Args:
        ort: The module onnxruntime.
    """
    major, minor, *_ = ort.__version__.split(".")
    return (int(major), int(minor)) >= PREPARED_SINCE


class PreparedGraph:
    """The place of one component's prepared graph; there may be nothing yet.

    A cache that cannot be read or written is no error: the plain graph is loaded.
    """

    def __init__(self, ort: Any, files: Sequence[FileEntry]) -> None:
        """Compute the key.

        Args:
            ort: The module onnxruntime.
            files: The component's files with their SHA-256, as the manifest lists them.
        """
        self._ort = ort
        self._source_bytes = sum(entry.size for entry in files)
        key = {
            "format": FORMAT,
            "files": [[entry.path, entry.size, entry.sha256] for entry in files],
            "onnxruntime": [ort.__version__, ort.get_build_info()],
            "cpu": cpu_identity(),
        }
        self._key = json.dumps(key, sort_keys=True)
        # A short name is enough: the record holds the whole key.
        self.folder = cache_folder("onnxruntime-cpu") / f"{zlib.crc32(self._key.encode()):08x}"

    def exists(self) -> bool:
        """Whether it was prepared before, for this key, and nothing was changed or cut off since."""
        try:
            record = json.loads((self.folder / RECORD_NAME).read_text(encoding="utf-8"))
            return bool(record == self._record(self.folder))
        except (OSError, ValueError):
            return False

    def load(self, options: Any) -> Any:
        """A session of it, or None where there is none that can be loaded.

        Args:
            options: Of this session alone.
        """
        if not self.exists():
            return None
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = open_session(self._ort, self.folder / GRAPH_NAME, options)
        except Exception:  # onnxruntime's exceptions share no base class
            return None
        mark_used(self.folder)
        return session

    def make(self, model: Path) -> bool:
        """Prepare it; whether that could be done.

        Args:
            model: The plain ONNX file; its bytes must be the ones that the key's hashes are of.
        """
        import logging
        import shutil

        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            remove_unused(self.folder.parent)  # of bundles, versions and CPUs that are no more
            free = shutil.disk_usage(self.folder.parent).free
            if free < ROOM * self._source_bytes + SPARE_BYTES:
                return False
            if self._source_bytes >= WORTH_TELLING:
                size = f"{self._source_bytes / 1e9:.1f} GB of weights"
                logging.getLogger("sdrt").info(
                    "preparing %s for this CPU, once: the result stays in %s", size, self.folder.parent
                )
            with new_folder(self.folder, replace=True) as folder:
                open_session(self._ort, model, self._saving(folder))
                for name in (GRAPH_NAME, WEIGHTS_NAME):
                    _flush(folder / name)
                (folder / RECORD_NAME).write_text(json.dumps(self._record(folder)), encoding="utf-8")
                _flush(folder / RECORD_NAME)
        except Exception:  # of the system, or ONNX Runtime's: the plain graph will say what is wrong with it
            return False
        return True

    def _record(self, folder: Path) -> dict[str, Any]:
        """The key, and of both files size and time of change, which show that one was touched or cut off."""
        files = (folder / name for name in (GRAPH_NAME, WEIGHTS_NAME))
        facts = {file.name: file.stat() for file in files if file.exists()}
        return {
            "key": self._key,
            "files": {name: [fact.st_size, fact.st_mtime_ns] for name, fact in facts.items()},
        }

    def _saving(self, folder: Path) -> Any:
        options = quiet_options(self._ort)
        options.optimized_model_filepath = str(folder / GRAPH_NAME)
        for name, value in _SAVE.items():
            options.add_session_config_entry(name, value)
        return options


@cache
def cpu_identity() -> tuple[str, ...]:
    """What ONNX Runtime looks at when it chooses kernels: architecture, model and instruction sets."""
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
    if not file.exists():  # a graph without large weights
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
