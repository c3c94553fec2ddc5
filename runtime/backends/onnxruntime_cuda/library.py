"""ONNX Runtime with its CUDA provider."""

from __future__ import annotations

from typing import Any, Final

from sdrt.runtime.backends.libraries import import_library
from sdrt.runtime.errors import BackendError

NAME: Final = "onnxruntime-cuda"
EXTRA: Final = "cuda"
PROVIDER: Final = "CUDAExecutionProvider"


def import_with_cuda() -> Any:
    """The module onnxruntime of a build that has the CUDA provider.

    Raises:
        BackendError: It is not installed, or is the build for the CPU.
    """
    ort = import_library("onnxruntime", NAME, EXTRA)
    providers = ort.get_available_providers()
    if PROVIDER not in providers:
        raise BackendError(
            f"the onnxruntime {ort.__version__} that is installed has no {PROVIDER}, only "
            f"{', '.join(providers)}: pip uninstall onnxruntime, then pip install 'sdrt[cuda]' "
            "(onnxruntime and onnxruntime-gpu install over each other)"
        )
    return ort
