"""OpenVINO, imported without the process that would report to a web analytics service."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from sdrt.runtime.backends.libraries import import_library

NAME: Final = "openvino-cpu"
EXTRA: Final = "openvino"
PACKAGE: Final = "openvino"
_TELEMETRY: Final = "openvino_telemetry"


def import_openvino() -> Any:
    """The module openvino.

    Raises:
        BackendError: It is not installed.
    """
    with _without_telemetry():
        return import_library(PACKAGE, NAME, EXTRA)


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Inside, OpenVINO finds the package that would report to be missing, and takes its own stub for it.

    Its import forks a process that reports. No variable switches it off but that of a continuous integration,
    which other libraries read too.
    """
    there = _TELEMETRY in sys.modules
    if not there:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # so `import` takes it for missing
    try:
        yield
    finally:
        if not there:
            sys.modules.pop(_TELEMETRY, None)  # another thread may have been here, too
