"""Imports of engine libraries: with a hint where one is missing, and with nothing told of its user.

`sdrt.runtime.system.telemetry` says what is switched off. A program that has imported a library before sdrt
does has made its own choice.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sdrt.runtime.backends.executor import first_line
from sdrt.runtime.errors import BackendError
from sdrt.runtime.system.telemetry import switch_telemetry_off


def import_library(package: str, backend: str, extra: str) -> Any:
    """An engine library's module.

    Args:
        package: The module's name.
        backend: The backend that needs it, for the message.
        extra: The extra of sdrt that installs it.

    Raises:
        BackendError: It is not installed.
    """
    switch_telemetry_off()
    try:
        return import_module(package)
    except ImportError as error:
        raise BackendError(
            f"the backend {backend} needs the package {package} ({first_line(error)}): "
            f"pip install 'sdrt[{extra}]'"
        ) from error
