"""Cubins from NVRTC and nvcc, without a GPU: what is in them, how they are kept, what a failure says."""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sdrt.kernels import (
    check_finite,
    guidance_rescale,
    guided_step,
    host_build,
    image_to_uint8,
    philox_normal,
)
from sdrt.kernels import compile as compilation
from sdrt.kernels.compile import ARCHITECTURES, KernelError, cubin, modules
from sdrt.kernels.host_build import host_library

ENTRIES = {
    "check_finite": {"check_finite_f16", "check_finite_f32"},
    "guidance_rescale": {"guidance_rescale_f16", "guidance_rescale_f32"},
    "guided_step": {
        f"{kernel}_{dtype}{width}"
        for kernel in ("guided_step", "prepare_input")
        for dtype in ("f16", "f32")
        for width in ("", "x4")
    },
    "image_to_uint8": {f"image_to_uint8_{dtype}{width}" for dtype in ("f16", "f32") for width in ("", "x4")},
    "philox_normal": {"philox_normal_f32"},
}
STRUCTS = {
    "check_finite": ("CheckFiniteParams", check_finite.Params),
    "guidance_rescale": ("GuidanceRescaleParams", guidance_rescale.Params),
    "guided_step": ("GuidedStepParams", guided_step.Params),
    "image_to_uint8": ("ImageToUint8Params", image_to_uint8.Params),
    "philox_normal": ("PhiloxNormalParams", philox_normal.Params),
}
EM_CUDA = 190
REGISTERS = 64  # of a thread: 65,536 of a multiprocessor then hold 8 blocks of 128


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; where its files will lie."""
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def source_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources that a test may change, in the place of the real ones."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name, text in compilation.sources().items():
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(compilation, "SOURCES", folder)
    return folder


def elf_sections(code: bytes) -> dict[str, int]:
    """Name → size of the sections of a 64-bit little-endian ELF file (System V ABI, chapter 4)."""
    assert code[:6] == b"\x7fELF\x02\x01"
    (table,) = struct.unpack_from("<Q", code, 40)
    entry_size, count, names_index = struct.unpack_from("<HHH", code, 58)
    headers = [struct.unpack_from("<IIQQQQ", code, table + k * entry_size) for k in range(count)]
    names = headers[names_index][4]
    return {code[names + h[0] : code.index(b"\0", names + h[0])].decode(): h[5] for h in headers}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("module", modules())
def test_cubin_holds_every_entry_point_for_its_architecture(module: str, arch: str, cache: Path) -> None:
    code = cubin(module, arch)
    (machine,) = struct.unpack_from("<H", code, 18)
    assert machine == EM_CUDA
    (flags,) = struct.unpack_from("<I", code, 48)
    number = int(arch.removeprefix("sm_"))
    assert number in (flags & 0xFF, flags >> 8 & 0xFF)  # where it stands depends on the ABI's version
    sections = elf_sections(code)
    functions = {
        name.removeprefix(".text.") for name, size in sections.items() if name.startswith(".text.") and size
    }
    assert functions == ENTRIES[module]


def test_every_entry_has_its_host_build() -> None:
    assert set(ENTRIES) == set(modules())
    library = host_library()
    for entries in ENTRIES.values():
        for entry in entries:
            assert hasattr(library, f"{entry}_host"), entry


def layout_assertions(module: str) -> str:
    """C++ that compiles only if the struct is laid out as its ctypes mirror is."""
    name, mirror = STRUCTS[module]
    equal = {f"sizeof({name})": ctypes.sizeof(mirror)}
    for field, kind in ((item[0], item[1]) for item in mirror._fields_):
        equal[f"__builtin_offsetof({name}, {field})"] = getattr(mirror, field).offset
        equal[f"sizeof({name}::{field})"] = ctypes.sizeof(kind)
    lines = (f'static_assert({what} == {size}, "{what}");' for what, size in equal.items())
    return "\n".join(["", *lines, ""])


@pytest.mark.parametrize("module", modules())
def test_params_have_the_layout_of_the_header(module: str, cache: Path, source_copy: Path) -> None:
    header, kernel = source_copy / f"{module}.cuh", source_copy / f"{module}.cu"
    kernel.write_text(kernel.read_text() + layout_assertions(module))
    cubin(module, "sm_90")
    header.write_text(header.read_text() + layout_assertions(module))
    host_build.host_library.__wrapped__()
    # The assertions bite: a field more, and neither compiler takes it.
    text = kernel.read_text()
    kernel.write_text(text.replace("static_assert(sizeof(", "static_assert(1 + sizeof(", 1))
    with pytest.raises(KernelError, match="static assertion failed"):
        cubin(module, "sm_90")


def ptx(module: str, arch: str) -> str:
    nvrtc = compilation._load_nvrtc()
    texts = compilation.sources()
    headers = [name for name in texts if name.endswith(".cuh")]
    encoded = [texts[name].encode() for name in headers]
    names = [name.encode() for name in headers]
    source = texts[f"{module}.cu"].encode()
    _, program = nvrtc.nvrtcCreateProgram(source, b"kernel.cu", len(headers), encoded, names)
    options = [option.encode() for option in (f"--gpu-architecture={arch}", *compilation.OPTIONS)]
    nvrtc.nvrtcCompileProgram(program, len(options), options)
    text = bytearray(nvrtc.nvrtcGetPTXSize(program)[1])
    nvrtc.nvrtcGetPTX(program, text)
    nvrtc.nvrtcDestroyProgram(program)
    return text.decode()


@pytest.mark.parametrize("module", modules())
def test_no_multiply_add_saves_a_rounding(module: str) -> None:
    """Products of float32 say how they round, which forbids the assembler, too, to contract them."""
    text = ptx(module, "sm_90")
    assert not re.search(r"\b(?:fma|mad)[.\w]*f32\b|\b(?:mul|add|sub)\.f32\b", text)
    assert not re.search(r"\.(?:ftz|approx)[.\w]*f32\b", text)
    if module != "check_finite":
        assert "mul.rn.f32" in text


def test_no_multiply_add_saves_a_rounding_of_the_double_sums() -> None:
    text = ptx("guidance_rescale", "sm_90")
    assert not re.search(r"\b(?:fma|mad)[.\w]*f64\b|\b(?:mul|add|sub)\.f64\b|\.approx[.\w]*f64\b", text)
    for operation in ("mul.rn.f64", "div.rn.f64", "sqrt.rn.f64"):
        assert operation in text


@pytest.mark.parametrize(
    ("module", "access", "at_least"),
    [
        ("guided_step", "ld.global.v4.f32", 8),
        ("guided_step", "ld.global.v4.u16", 2),
        ("guided_step", "st.global.v4.f32", 3),
        ("guided_step", "st.global.v4.u16", 2),
        ("image_to_uint8", "ld.global.v4.f32", 3),
        ("image_to_uint8", "ld.global.v4.u16", 3),
        ("check_finite", "ld.global.v4.u32", 2),
    ],
)
def test_memory_is_moved_in_wide_pieces(module: str, access: str, at_least: int) -> None:
    accesses = Counter(re.findall(r"\b(?:ld|st)\.global[.\w]*", ptx(module, "sm_75")))
    assert accesses[access] >= at_least


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc: NVRTC alone compiled the kernels")
@pytest.mark.parametrize("module", modules())
def test_nvcc_takes_the_sources_without_a_warning_and_keeps_them_in_registers(
    module: str, tmp_path: Path
) -> None:
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (75, 90, 120)]
    options = ["-std=c++17", "-fmad=false", "-Werror=all-warnings", "-Xptxas=-v", *targets, "-fatbin"]
    result = subprocess.run(
        ["nvcc", *options, "-o", str(tmp_path / "out.fatbin"), str(compilation.SOURCES / f"{module}.cu")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", result.stderr)]
    assert len(registers) == len(targets) * len(ENTRIES[module])
    assert max(registers) <= REGISTERS
    assert set(re.findall(r"(\d+) bytes spill stores", result.stderr)) == {"0"}


# The cache


def test_compiled_code_is_kept_by_source_architecture_and_module(
    cache: Path, source_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cubin("check_finite", "sm_90")
    (kept,) = cache.iterdir()
    assert re.fullmatch(r"check_finite-sm_90-[0-9a-f]{16}\.cubin", kept.name)
    cubin("check_finite", "sm_80")
    cubin("image_to_uint8", "sm_90")
    assert len(list(cache.iterdir())) == 3
    with monkeypatch.context() as without_compiler:
        without_compiler.setattr(compilation, "_compile", None)
        assert cubin("check_finite", "sm_90") == first
    header = source_copy / "portable.cuh"
    header.write_text(header.read_text() + "// another version\n")
    cubin("check_finite", "sm_90")
    assert len(list(cache.iterdir())) == 4


def cut(content: bytes) -> bytes:
    return content[:-100]


def flip(content: bytes) -> bytes:
    return content[:200] + bytes([content[200] ^ 1]) + content[201:]


def empty(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_file_is_noticed_and_made_anew(damage: Any, cache: Path) -> None:
    made = cubin("check_finite", "sm_90")
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert cubin("check_finite", "sm_90") == made
    assert kept.read_bytes() == whole
    assert list(cache.iterdir()) == [kept]  # and nothing half written beside it


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "file"))
    assert cubin("check_finite", "sm_90").startswith(b"\x7fELF")


def test_the_cache_is_in_the_home_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDRT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    cubin("check_finite", "sm_90")
    assert len(list((tmp_path / ".cache" / "sdrt" / "kernels").iterdir())) == 1


# Faults


def test_a_source_that_does_not_compile_gives_the_compilers_log(cache: Path, source_copy: Path) -> None:
    header = source_copy / "guided_step.cuh"
    header.write_text(header.read_text().replace("float q", "flaot q").replace("plan.q =", "plan.qq ="))
    with pytest.raises(
        KernelError, match=r"cannot compile guided_step\.cu for sm_90:\n.*guided_step\.cuh\(\d+\): error"
    ):
        cubin("guided_step", "sm_90")
    with pytest.raises(
        KernelError, match=r"(?s)g\+\+ cannot compile the kernels.*guided_step\.cuh:\d+:\d+: error"
    ):
        host_build.host_library.__wrapped__()
    assert not cache.exists()
    assert cubin("check_finite", "sm_90")  # the others still do


def test_an_unknown_module_or_architecture_is_named(cache: Path) -> None:
    with pytest.raises(
        KernelError, match="no kernel module 'guided': choose one of check_finite, guidance_rescale"
    ):
        cubin("guided", "sm_90")
    with pytest.raises(KernelError, match=r"compiles nothing for sm_35: it knows .*sm_90"):
        cubin("guided_step", "sm_35")


def test_without_nvrtc_the_error_says_what_to_install(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(KernelError, match=r"pip install cuda-bindings nvidia-cuda-nvrtc"):
        cubin("guided_step", "sm_90")


def test_a_failing_call_of_nvrtc_is_an_error() -> None:
    nvrtc = compilation._load_nvrtc()
    with pytest.raises(KernelError, match="NVRTC_ERROR_INVALID_PROGRAM"):
        compilation._checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(nvrtc.nvrtcProgram(0)))
