"""Graphs as ONNX Runtime wants them on this CPU, kept from run to run.

Optimising a graph and repacking its weights for the CPU takes ONNX Runtime 7 to 19 s for Stable Diffusion
1.5 at every load. The result is written once; from then on it is mapped into memory in a second, and the
weights are pages of a file that processes share and the system can drop, in place of memory of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from sdrt.runtime.backends.onnxruntime_cpu.library import NAME
from sdrt.runtime.backends.onnxruntime_sessions import open_on_cpu, quiet_options
from sdrt.runtime.bundle.prepared_folder import PreparedFolder, Source

# ONNX Runtime 1.30 and 1.31 write such graphs as well, but end the process when one of them is run.
PREPARED_SINCE: Final = (1, 32)
FORMAT: Final = 3  # a change of what is written, or of how it is loaded
GRAPH_NAME: Final = "model.onnx"
WEIGHTS_NAME: Final = "model.onnx.data"
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
    """One component's prepared graph; there may be nothing yet."""

    def __init__(self, ort: Any, source: Source) -> None:
        """Find its place.

        Args:
            ort: The module onnxruntime.
            source: The files that it is prepared of.
        """
        self._ort = ort
        key = {"format": FORMAT, "onnxruntime": [ort.__version__, ort.get_build_info()], "options": _SAVE}
        self._place = PreparedFolder(NAME, source, key)
        self.folder = self._place.path
        self.file = self.folder / GRAPH_NAME

    def exists(self) -> bool:
        """Whether it was prepared before, and is whole."""
        return self._place.exists()

    def load(self, options: Any) -> Any:
        """A session of it, or None where there is none that can be loaded.

        Args:
            options: The options of this session alone.
        """
        if not self.exists():
            return None
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = open_on_cpu(self._ort, self.file, options)
        except Exception:  # onnxruntime's exceptions share no base class
            return None
        self._place.loaded()
        return session

    def make(self) -> bool:
        """Prepare it; whether that could be done."""
        return self._place.make(self._save)

    def _save(self, model: Path, folder: Path) -> None:
        options = quiet_options(self._ort)
        options.optimized_model_filepath = str(folder / GRAPH_NAME)
        for name, value in _SAVE.items():
            options.add_session_config_entry(name, value)
        open_on_cpu(self._ort, model, options)
