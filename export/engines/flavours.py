"""The engine libraries: which is installed, in which version, and for which GPUs it can build."""

from __future__ import annotations

import os
import sys
from typing import Any, Final

from sdrt.export.engines.options import CURRENT, EngineOptions
from sdrt.runtime.backends.libraries import import_library
from sdrt.runtime.backends.onnxruntime_cuda.library import NAME as ORT_CUDA
from sdrt.runtime.backends.trt.library import RTX, TENSORRT, import_tensorrt
from sdrt.runtime.devices.gpu.discovery import find_gpu
from sdrt.runtime.errors import BackendError, UsageError

# What an engine of TensorRT for RTX runs on unless targets are named (its manual, "Compute Capability").
RTX_DEFAULT_TARGETS: Final = ("8.0+",)
_RTX_SWITCH: Final = "POLYGRAPHY_USE_TENSORRT_RTX"  # read when Polygraphy is first imported
_TENSORRT_HINT: Final = (
    "(it downloads NVIDIA's libraries from NVIDIA); "
    "tensorrt-rtx comes from PyPI alone and builds without a GPU"
)


def check_flavour(options: EngineOptions) -> None:
    """Raise, before any work, what a build of this flavour would end with here.

    Raises:
        UsageError: The flavour cannot build for the targets.
        BackendError: It is not installed, or needs a GPU that is not here.
    """
    flavour_version(options.flavour)
    resolve_targets(options.flavour, options.targets)


def import_for_polygraphy(flavour: str) -> Any:
    """The module of `TENSORRT` or `RTX`, which Polygraphy will use; that must not have been imported yet.

    Raises:
        BackendError: It is not installed, or its library does not load.
    """
    os.environ[_RTX_SWITCH] = "1" if flavour == RTX else "0"
    module = import_tensorrt(flavour)
    if flavour == RTX:  # Polygraphy looks for it under the name that it has in NVIDIA's archive
        sys.modules.setdefault("tensorrt_rtx", module)
    return module


def flavour_version(flavour: str) -> str:
    """The installed version, as engines record it.

    Raises:
        BackendError: It is not installed, or its library does not load.
    """
    if flavour == ORT_CUDA:
        return str(import_library("onnxruntime", ORT_CUDA, "export").__version__)
    try:
        return str(import_tensorrt(flavour).__version__)
    except BackendError as error:
        if flavour == TENSORRT:
            raise BackendError(f"{error} {_TENSORRT_HINT}") from error
        raise


def resolve_targets(flavour: str, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The compute capabilities that an engine will be recorded for.

    Raises:
        UsageError: The flavour cannot build for what was asked.
        BackendError: It builds for the GPU of this machine, and there is none.
    """
    if flavour == ORT_CUDA:
        if asked:
            raise UsageError(f"--compute-capability is not for {ORT_CUDA}: its graph runs on any GPU")
        return ()
    if flavour == TENSORRT:
        if asked not in ((), (CURRENT,)):
            raise UsageError(
                f"--compute-capability is {' '.join(asked)}: {TENSORRT} builds for the GPU of the machine "
                f"that it runs on ({CURRENT}); {RTX} builds for others"
            )
        return (current_capability(flavour),)
    if asked == (CURRENT,):
        return (current_capability(flavour),)
    known = rtx_targets()
    if unknown := [target for target in asked if target not in known]:
        raise UsageError(
            f"--compute-capability is {' '.join(unknown)}: {RTX} builds for {', '.join(known)}, {CURRENT}"
        )
    return asked or RTX_DEFAULT_TARGETS


def rtx_targets() -> list[str]:
    """The compute capabilities that the installed TensorRT for RTX can be told to build for."""
    module = import_tensorrt(RTX)
    names = [name[2:] for name in dir(module.ComputeCapability) if name.startswith("SM")]
    return [f"{name[:-1]}.{name[-1]}" for name in sorted(names, key=int)]


def current_capability(flavour: str) -> str:
    """The compute capability of this machine's first GPU, such as ``8.6``.

    Raises:
        BackendError: There is no usable GPU; the message says why.
    """
    try:
        capability = find_gpu().capability
    except BackendError as error:
        more = f"{RTX} builds without one" if flavour == TENSORRT else "name targets such as 8.6, or none"
        raise BackendError(f"{flavour} builds for the GPU of this machine: {error}; {more}") from error
    return f"{capability[0]}.{capability[1]}"
