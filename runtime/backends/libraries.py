"""The engine libraries, each imported in one place, after what it would tell of its user is switched off.

OpenVINO's import forks a process that reports to a web analytics service; for the others see
`sdrt.runtime.system.telemetry`. A program that has imported a library before sdrt does has made its own
choice.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

from sdrt.runtime.backends.executor import first_line
from sdrt.runtime.errors import BackendError
from sdrt.runtime.system.telemetry import switch_telemetry_off

_OPENVINO_TELEMETRY: Final = "openvino_telemetry"


def import_onnxruntime(backend: str, extra: str) -> Any:
    """The module onnxruntime.

    Args:
        backend: Whose message it is if the module is not there.
        extra: Of sdrt, that brings it.

    Raises:
        BackendError: It is not installed.
    """
    switch_telemetry_off()
    return _imported("onnxruntime", backend, extra)


def import_openvino(backend: str, extra: str) -> Any:
    """The module openvino; arguments and errors as `import_onnxruntime`."""
    with _without_openvino_telemetry():
        return _imported("openvino", backend, extra)


def _imported(package: str, backend: str, extra: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise BackendError(
            f"the backend {backend} needs the package {package} ({first_line(error)}): "
            f"pip install 'sdrt[{extra}]'"
        ) from error


@contextmanager
def _without_openvino_telemetry() -> Iterator[None]:
    """Inside, OpenVINO finds the package that would report to be missing, and takes its own stub for it.

    No variable switches it off but that of a continuous integration, which other libraries read too.
    """
    there = _OPENVINO_TELEMETRY in sys.modules
    if not there:
        sys.modules[_OPENVINO_TELEMETRY] = None  # type: ignore[assignment]  # so `import` takes it for missing
    try:
        yield
    finally:
        if not there:
            sys.modules.pop(_OPENVINO_TELEMETRY, None)  # another thread may have been here, too


def import_tensorrt(flavour: str) -> Any:
    """The Python module of a flavour, ``tensorrt`` or ``tensorrt-rtx``.

    Raises:
        BackendError: It is not installed, or its libraries do not load.
    """
    try:
        if flavour == "tensorrt":
            return import_module("tensorrt")
        # NVIDIA's archive and the wheels of PyPI call it differently.
        archive = find_spec("tensorrt_rtx") is not None
        return import_module("tensorrt_rtx" if archive else "tensorrt_rtx_bindings")
    except (ImportError, OSError, RuntimeError) as error:
        extra = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}[flavour]
        raise BackendError(
            f"{flavour} is not installed here, or does not load ({first_line(error)}): "
            f"pip install 'sdrt[{extra}]'"
        ) from error
