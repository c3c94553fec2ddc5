"""CUDA C++ → cubin with NVRTC, kept in a cache. Needs cuda-bindings and NVRTC, and no GPU."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from sdrt.kernels.cache import read_kept, write_kept

SOURCES: Final = Path(__file__).parent
ARCHITECTURES: Final = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")  # those tested

# Contraction to multiply-add would save a rounding that NumPy makes, and so change bits.
OPTIONS: Final = ("--std=c++17", "-fmad=false")

_KIND: Final = "kernels"  # of cache
_MAX_BYTES: Final = 64 << 20  # what is compiled has some 100 kB


class KernelError(RuntimeError):
    """A kernel cannot be compiled; the message holds the compiler's log."""


def cubin(module: str, arch: str) -> bytes:
    """Machine code of ``kernels/<module>.cu`` for one architecture.

    Compiled code is kept under ``$SDRT_CACHE``, else ``~/.cache/sdrt``, in the folder ``kernels``, by the
    hash of all sources, the options, NVRTC's version and the architecture. A file there that was damaged, or
    that somebody else wrote, is made anew; a folder that cannot be written only costs the compilation at
    every start (0.1 to 0.5 s each).

    Args:
        module: One of `modules`.
        arch: ``sm_90`` for compute capability 9.0, and so on; what NVRTC knows.

    Raises:
        KernelError: No NVRTC, an architecture that it does not know, or a source that it refuses.
    """
    if module not in modules():
        raise KernelError(f"there is no kernel module {module!r}: choose one of {', '.join(modules())}")
    nvrtc = _load_nvrtc()
    version = _checked(nvrtc, nvrtc.nvrtcVersion())
    known = [f"sm_{number}" for number in _checked(nvrtc, nvrtc.nvrtcGetSupportedArchs())]
    if arch not in known:
        raise KernelError(
            f"NVRTC {version[0]}.{version[1]} compiles nothing for {arch}: it knows {', '.join(known)}"
        )
    key = source_hash((module, arch, *OPTIONS, f"nvrtc {version[0]}.{version[1]}"))
    return cached(f"{module}-{arch}-{key}.cubin", lambda: _compile(nvrtc, module, arch))


def modules() -> tuple[str, ...]:
    """The names of the ``.cu`` files: each is compiled by itself, and has the entry points of one kernel."""
    return tuple(sorted(path.stem for path in SOURCES.glob("*.cu")))


def sources() -> dict[str, str]:
    """Name → text of every ``.cu`` and ``.cuh`` file."""
    files = sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")])
    return {path.name: path.read_text(encoding="utf-8") for path in files}


def source_hash(also: Iterable[str]) -> str:
    """16 hexadecimal digits that change with any source and with any of the strings ``also``."""
    digest = hashlib.sha256()
    for text in (*also, *(part for item in sources().items() for part in item)):
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:16]


def cached(name: str, make: Callable[[], bytes]) -> bytes:
    """The bytes that the cache holds under ``name``, else those that ``make`` gives, which it then holds."""
    content = read_kept(_KIND, name, _MAX_BYTES)
    if content is None:
        content = make()
        write_kept(_KIND, name, content)
    return content


def _load_nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the library
    except (ImportError, RuntimeError) as error:
        raise KernelError(
            f"the CUDA kernels are compiled with NVRTC, which cannot be loaded ({error}): "
            "pip install cuda-bindings nvidia-cuda-nvrtc"
        ) from error
    return nvrtc


def _compile(nvrtc: Any, module: str, arch: str) -> bytes:
    texts = sources()
    headers = [name for name in texts if name.endswith(".cuh")]
    program = _checked(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            texts[f"{module}.cu"].encode(),
            f"{module}.cu".encode(),
            len(headers),
            [texts[name].encode() for name in headers],
            [name.encode() for name in headers],
        ),
    )
    try:
        options = [option.encode() for option in (f"--gpu-architecture={arch}", *OPTIONS)]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelError(f"NVRTC cannot compile {module}.cu for {arch}:\n{_log(nvrtc, program)}")
        code = bytearray(_checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, code))
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _log(nvrtc: Any, program: Any) -> str:
    log = bytearray(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
    _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
    return log.rstrip(b"\0").decode(errors="replace")


def _checked(nvrtc: Any, answer: tuple[Any, ...]) -> Any:
    """What an NVRTC call gives besides its result code: nothing, one value, or several."""
    result, *values = answer
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelError(f"NVRTC failed: {result.name}")
    return values[0] if len(values) == 1 else values
