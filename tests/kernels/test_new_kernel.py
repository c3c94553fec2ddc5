"""Adding a kernel, as docs/architecture.md tells: two sources and two lines of the host build, in a copy."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from sdrt.kernels import compile as compilation
from sdrt.kernels import host_build
from sdrt.kernels.host_build import HostArray, run_on_host
from sdrt.kernels.launch import BLOCK, Launch, blocks

HEADER = """
#pragma once
#include "portable.cuh"
struct ScaleParams { float *values; unsigned elements; float factor; };
SDRT_BOTH void scale_element(const ScaleParams &params, unsigned i) { params.values[i] *= params.factor; }
"""
SOURCE = """
#include "scale.cuh"
extern "C" __global__ void scale_f32(const __grid_constant__ ScaleParams params) {
  const unsigned workers = gridDim.x * blockDim.x;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < params.elements; i += workers)
    scale_element(params, i);
}
"""
ON_THE_HOST = """
void scale(const ScaleParams &params) {
  for (unsigned i = 0; i < params.elements; ++i) scale_element(params, i);
}
HOST_ENTRY(scale_f32, ScaleParams, scale)
"""


class Params(ctypes.Structure):
    """``ScaleParams`` of the header."""

    _fields_ = (("values", ctypes.c_uint64), ("elements", ctypes.c_uint32), ("factor", ctypes.c_float))


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kernels with one more."""
    for name, text in compilation.sources().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "scale.cuh").write_text(HEADER)
    (tmp_path / "scale.cu").write_text(SOURCE)
    host = tmp_path / "host.cuh"
    host.write_text(f'#include "scale.cuh"\n{host.read_text()}{ON_THE_HOST}')
    monkeypatch.setattr(compilation, "SOURCES", tmp_path)
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_new_kernel_compiles_and_equals_numpy(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "scale" in compilation.modules()
    assert b"scale_f32" in compilation.cubin("scale", "sm_90")
    library = host_build.host_library.__wrapped__()
    monkeypatch.setattr(host_build, "host_library", lambda: library)
    values = np.linspace(-3, 3, 1001, dtype=np.float32)
    wanted = values * np.float32(0.7)
    params = Params(HostArray(values).address, values.size, 0.7)
    run_on_host(Launch("scale", "scale_f32", blocks(values.size), BLOCK, params))
    assert np.array_equal(values, wanted)
