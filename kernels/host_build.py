"""The kernels' headers compiled for the host: the same maths, checked where there is no GPU.

g++ builds one shared library with a function ``<entry>_host(const Params *)`` for every entry point, which
does what the whole grid does. Tests compare it with the NumPy references bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.compile import KernelError, cached, source_hash, sources
from sdrt.kernels.guided_step import StepBuffers
from sdrt.kernels.launch import Launch

# Contraction to multiply-add would save a rounding that NumPy makes.
OPTIONS: Final = (
    "-x",
    "c++",
    "-std=c++17",
    "-O2",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Werror",
)


@dataclass(frozen=True, slots=True)
class HostArray:
    """A NumPy array as a kernel sees one; keeps it alive.

    Raises:
        ValueError: The array is not C-contiguous.
    """

    array: NDArray[Any]

    def __post_init__(self) -> None:
        if not self.array.flags.c_contiguous:
            raise ValueError("the array is not C-contiguous, and kernels know no strides")

    @property
    def address(self) -> int:
        """See `sdrt.kernels.launch.DeviceArray`."""
        return self.array.ctypes.data

    @property
    def shape(self) -> tuple[int, ...]:
        """See `sdrt.kernels.launch.DeviceArray`."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """See `sdrt.kernels.launch.DeviceArray`."""
        return self.array.dtype


def on_host(buffers: StepBuffers) -> StepBuffers:
    """The same buffers with every NumPy array wrapped, for `sdrt.kernels.guided_step.launch`."""
    wrapped: dict[str, Any] = {}
    for field in fields(buffers):
        array = getattr(buffers, field.name)
        wrapped[field.name] = None if array is None else HostArray(array)
    return StepBuffers(**wrapped)


def run_on_host(launch: Launch) -> None:
    """Do on host memory what the launch does on a GPU's; returns when it is done."""
    entry = getattr(host_library(), f"{launch.entry}_host")
    entry(ctypes.byref(launch.params))


@functools.cache
def host_library() -> ctypes.CDLL:
    """The shared library; built once per change of the sources, kept where `sdrt.kernels.compile` keeps its.

    Raises:
        KernelError: There is no g++, or it refuses the sources; its messages are in the text.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise KernelError("the host build of the kernels needs g++, and there is none on PATH")
    version = subprocess.run([compiler, "-dumpfullversion", "-dumpmachine"], capture_output=True, check=True)
    key = source_hash((*OPTIONS, version.stdout.decode()))
    library = cached(f"host-{key}.so", lambda: _build(compiler))
    # A cached library is loaded from a private copy: its file may be replaced while it is mapped.
    with tempfile.TemporaryDirectory(prefix="sdrt-kernels-") as folder:
        path = Path(folder) / "kernels.so"
        path.write_bytes(library)
        return ctypes.CDLL(str(path))


def _build(compiler: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="sdrt-kernels-") as folder:
        for name, text in sources().items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        target = Path(folder) / "kernels.so"
        command = [compiler, *OPTIONS, "-shared", "-fPIC", str(Path(folder) / "host.cuh"), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise KernelError(f"g++ cannot compile the kernels for the host:\n{result.stderr}")
        return target.read_bytes()
