"""Bundle to pictures, without torch.

::

    from sdrt.runtime import Pipeline

    pipeline = Pipeline.load()  # the embedded model; or the folder that sd-export made
    output = pipeline("a red apple", seed=3)
    output.images[0].save("apple.png")

The names below are loaded on first use, so that ``sd-run --help`` does not wait for NumPy.
"""

from __future__ import annotations

TYPE_CHECKING = False  # a command imports this before it can be interrupted: nothing here may take long
if TYPE_CHECKING:
    from typing import Any

    from sdrt.runtime.bundle.bundle import Bundle
    from sdrt.runtime.drawing.finished_images import BlackImageWarning
    from sdrt.runtime.drawing.text_conditioning import PromptTruncatedWarning
    from sdrt.runtime.errors import (
        BackendError,
        BundleError,
        CancelledError,
        DeviceMemoryError,
        NumericsError,
        OutputError,
        SdrtError,
        UsageError,
    )
    from sdrt.runtime.lora.library import LoraPartialWarning
    from sdrt.runtime.pictures.metadata import read_recipe
    from sdrt.runtime.pictures.writing import save_image, save_png
    from sdrt.runtime.pipeline import Pipeline
    from sdrt.runtime.request.output import PipelineOutput
    from sdrt.runtime.request.request import Request
    from sdrt.runtime.text.syntax import PromptSyntaxWarning

_HOME = {
    "BackendError": "errors",
    "BlackImageWarning": "drawing.finished_images",
    "Bundle": "bundle.bundle",
    "BundleError": "errors",
    "CancelledError": "errors",
    "DeviceMemoryError": "errors",
    "LoraPartialWarning": "lora.library",
    "NumericsError": "errors",
    "OutputError": "errors",
    "Pipeline": "pipeline",
    "PipelineOutput": "request.output",
    "PromptSyntaxWarning": "text.syntax",
    "PromptTruncatedWarning": "drawing.text_conditioning",
    "Request": "request.request",
    "SdrtError": "errors",
    "UsageError": "errors",
    "read_recipe": "pictures.metadata",
    "save_image": "pictures.writing",
    "save_png": "pictures.writing",
}

__all__ = [
    "BackendError",
    "BlackImageWarning",
    "Bundle",
    "BundleError",
    "CancelledError",
    "DeviceMemoryError",
    "LoraPartialWarning",
    "NumericsError",
    "OutputError",
    "Pipeline",
    "PipelineOutput",
    "PromptSyntaxWarning",
    "PromptTruncatedWarning",
    "Request",
    "SdrtError",
    "UsageError",
    "read_recipe",
    "save_image",
    "save_png",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"sdrt.runtime.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
