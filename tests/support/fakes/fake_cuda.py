"""Runs tests on a fake libcuda under the real cuda-bindings, in a process of its own.

``pytest -p support.fakes.fake_cuda`` does so; `fake_libcuda.cpp` is the library. Kernels are compiled and
loaded as for a GPU; what runs is their host build.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
from pathlib import Path

import pytest

from sdrt.kernels import check_finite, guidance_rescale, guided_step, image_to_uint8, philox_normal
from sdrt.kernels.host_build import host_library

SOURCE = Path(__file__).with_name("fake_libcuda.cpp")
NAME = "libcuda.so.1"
KINDS = ("allocations", "pinned", "events", "graphs", "executables", "modules", "streams", "contexts")

_PARAMS = {
    "check_finite": check_finite.Params,
    "guidance_rescale": guidance_rescale.Params,
    "guided_step": guided_step.Params,
    "prepare_input": guided_step.Params,
    "image_to_uint8": image_to_uint8.Params,
    "philox_normal": philox_normal.Params,
}
_Bytes = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)
_Run = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p)


def build(folder: Path) -> Path:
    """Compile the library into a folder, which `environment` names."""
    from cuda.pathfinder import find_nvidia_header_directory

    headers = find_nvidia_header_directory("cudart")
    assert headers, "cuda.h comes with nvidia-cuda-runtime"
    target = folder / NAME
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    subprocess.run([*command, f"-I{headers}", str(SOURCE), "-o", str(target)], check=True)
    return target


def environment(library: Path, **settings: int) -> dict[str, str]:
    """For a process that shall find the library.

    Args:
        library: What `build` gave.
        settings: ``devices``, ``version`` (as cuDriverGetVersion), ``capability`` (as 90), ``memory``
            (bytes), ``pools`` (0 or 1).
    """
    given = {f"FAKE_CUDA_{name.upper()}": str(value) for name, value in settings.items()}
    return {
        **os.environ,
        **given,
        "LD_LIBRARY_PATH": str(library.parent),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }


def _param_bytes(entry: bytes) -> int:
    kernel, _, _ = entry.decode().rpartition("_")
    return ctypes.sizeof(_PARAMS[kernel]) if kernel in _PARAMS else -1


def _run_kernel(entry: bytes, params: int) -> None:
    getattr(host_library(), f"{entry.decode()}_host")(ctypes.c_void_p(params))


_callbacks = _Bytes(_param_bytes), _Run(_run_kernel)  # the library keeps their addresses


def pytest_configure() -> None:
    """Let the library run kernels."""
    ctypes.CDLL(NAME).fake_set_kernels(*_callbacks)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail if anything was not given back."""
    gc.collect()
    library = ctypes.CDLL(NAME)
    left = {kind: library.fake_live(kind.encode()) for kind in KINDS}
    if any(left.values()):
        print(f"\nnot given back: {left}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
