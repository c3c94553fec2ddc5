"""ONNX Runtime for the CPU."""

from __future__ import annotations

from typing import Any, Final

from sdrt.runtime.backends.libraries import import_library

NAME: Final = "onnxruntime-cpu"
EXTRA: Final = "cpu"
PACKAGE: Final = "onnxruntime"


def import_onnxruntime() -> Any:
    """The module onnxruntime.

    Raises:
        BackendError: It is not installed.
    """
    return import_library(PACKAGE, NAME, EXTRA)
