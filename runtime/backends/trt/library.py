"""The modules of TensorRT and of TensorRT for RTX."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

from sdrt.runtime.backends.executor import first_line
from sdrt.runtime.errors import BackendError

TENSORRT: Final = "tensorrt"
RTX: Final = "tensorrt-rtx"
EXTRAS: Final = {TENSORRT: "tensorrt", RTX: "rtx"}


def import_tensorrt(flavour: str) -> Any:
    """The Python module of a flavour, `TENSORRT` or `RTX`.

    Raises:
        BackendError: It is not installed, or its libraries do not load.
    """
    try:
        if flavour == TENSORRT:
            return import_module("tensorrt")
        # NVIDIA's archive and the wheels of PyPI call it differently.
        archive = find_spec("tensorrt_rtx") is not None
        return import_module("tensorrt_rtx" if archive else "tensorrt_rtx_bindings")
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"{flavour} is not installed here, or does not load ({first_line(error)}): "
            f"pip install 'sdrt[{EXTRAS[flavour]}]'"
        ) from error
