"""The ``.cu`` files themselves, with every thread of a small grid running at once on the host.

What only a grid has is wrong only there: strides, the ticket that finds the last block, faults from many
threads. A GPU runs the same in `test_on_device`.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.runs.step_runs import STEPS, artificial_table, copied, drive, make_buffers, make_run, same_bits
from support.runs.step_runs import arrays as named_arrays

from sdrt.kernels import check_finite, guidance_rescale, guided_step, image_to_uint8, philox_normal
from sdrt.kernels.compile import SOURCES
from sdrt.kernels.guided_step import StepBuffers
from sdrt.kernels.host_build import HostArray, on_host
from sdrt.kernels.launch import Launch

PARAMS = {
    "check_finite": "CheckFiniteParams",
    "guidance_rescale": "GuidanceRescaleParams",
    "guided_step": "GuidedStepParams",
    "image_to_uint8": "ImageToUint8Params",
    "philox_normal": "PhiloxNormalParams",
}
GRIDS = [
    (1, 1),
    (1, 7),
    (5, 4),
    (3, 16),
]  # blocks, threads: fewer threads than shares
DTYPES = ["float16", "float32"]


class Emulation:
    """Runs launches on a grid of its own choice."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def run(self, launch: Launch, grid: tuple[int, int]) -> None:
        kernel = ctypes.cast(getattr(self._library, launch.entry), ctypes.c_void_p)
        getattr(self._library, f"run_{launch.module}")(kernel, ctypes.byref(launch.params), *grid)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    folder = tmp_path_factory.mktemp("emulation")
    source, library = folder / "grid.cpp", folder / "grid.so"
    lines = [f'#include "{Path(__file__).with_name("emulated_cuda.h")}"']
    for module, params in PARAMS.items():
        in_turn = "true" if "__shared__" in (SOURCES / f"{module}.cu").read_text() else "false"
        lines += [
            "#undef ENTRY",
            f'#include "{SOURCES / module}.cu"',
            f'extern "C" void run_{module}(void (*kernel)(const {params}), const {params} *params,',
            "    unsigned blocks, unsigned threads) {",
            f"  emulate(kernel, *params, blocks, threads, {in_turn});",
            "}",
        ]
    source.write_text("\n".join([*lines, ""]))
    options = ["-std=c++20", "-O0", "-ffp-contract=off", "-fno-strict-aliasing", "-pthread"]
    subprocess.run(["g++", *options, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return Emulation(ctypes.CDLL(str(library)))


@pytest.mark.parametrize("shape", [(2, 3, 3, 5), (1, 4, 8, 8)], ids=["odd", "even"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_whole_run(
    emulation: Emulation, grid: tuple[int, int], parts: int, dtype: str, shape: tuple[int, int, int, int]
) -> None:
    run = make_run(artificial_table(), guided=True, dtype=dtype, shape=shape, parts=parts)
    buffers = make_buffers(run, inpainting=True, denoised=True)
    if parts > 1:
        buffers.factors = np.linspace(0.6, 1.1, shape[0], dtype=np.float32)
    reference = copied(buffers)

    def step(step_buffers: StepBuffers) -> None:
        emulation.run(guided_step.launch(on_host(step_buffers)), grid)
        assert step_buffers.ticket is not None
        assert step_buffers.ticket[0] == 0  # ready for the next launch

    def prepare(step_buffers: StepBuffers) -> None:
        emulation.run(guided_step.launch_prepare_input(on_host(step_buffers)), grid)

    drive(run, buffers, step, prepare, keep_factors)
    step(buffers)  # after the end: nothing
    drive(run, reference, rescale=keep_factors)
    for name, array in named_arrays(buffers).items():
        assert same_bits(array, getattr(reference, name)), name
    assert buffers.counter[0] == STEPS


def keep_factors(_: StepBuffers) -> None:
    """In the place of their kernel, which wants a grid of its own."""


@pytest.mark.parametrize("shape", [(2, 3, 3, 5), (1, 4, 12, 12)], ids=["fewer than lanes", "more"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_factors(emulation: Emulation, dtype: str, shape: tuple[int, int, int, int]) -> None:
    run = make_run(artificial_table(2), guided=True, dtype=dtype, shape=shape)
    buffers = make_buffers(run, phi=0.7)
    buffers.noise_pred[...] = run.predictions[0]
    reference = copied(buffers)
    for step in range(3):  # the last behind the end: nothing
        buffers.counter[0] = reference.counter[0] = step
        launch = guidance_rescale.launch(on_host(buffers))
        emulation.run(launch, (launch.grid, launch.block))
        guidance_rescale.guidance_rescale(reference)
        assert buffers.factors is not None
        assert reference.factors is not None
        assert same_bits(buffers.factors, reference.factors)
        assert not np.any(buffers.factors == 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [slice(None), 0, -1], ids=str)  # 0: its thread goes on to finite ones
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_faults_of_one_thread_and_of_all(emulation: Emulation, place: slice | int, dtype: str) -> None:
    run = make_run(artificial_table(), guided=True, dtype=dtype, shape=(1, 4, 8, 8))
    buffers = make_buffers(run)
    faults = []
    for step in range(4):
        buffers.noise_pred[...] = run.predictions[step]
        if step in (1, 3):
            buffers.noise_pred.reshape(-1)[place] = np.nan
        emulation.run(guided_step.launch(on_host(buffers)), (5, 4))
        faults.append(int(buffers.fault[0]))
    assert faults == [guided_step.NO_FAULT, 1, 1, 1]
    assert buffers.counter[0] == 4


@pytest.mark.parametrize("row", [0, 1, 2], ids=["a draw", "none", "after the last row"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_noise(emulation: Emulation, grid: tuple[int, int], row: int) -> None:
    noise = np.full((3, 4, 3, 5), np.nan, np.float32)
    wanted, seeds = noise.copy(), np.array([0, 7, 2**64 - 1], np.uint64)
    counter, draws = np.array([row], np.int32), np.array([5, philox_normal.NO_DRAW], np.int32)
    arrays = [HostArray(array) for array in (noise, seeds, counter, draws)]
    emulation.run(philox_normal.launch(*arrays), grid)
    philox_normal.fill_philox_normal(wanted, seeds, counter, draws)
    assert same_bits(noise, wanted)
    assert bool(np.isnan(noise).all()) == (row > 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(8, 12), (5, 7)], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_bytes(emulation: Emulation, grid: tuple[int, int], size: tuple[int, int], dtype: str) -> None:
    image = np.random.default_rng(1).uniform(-1.2, 1.2, (2, 3, *size)).astype(dtype)
    pixels = np.zeros((2, *size, 3), np.uint8)
    emulation.run(image_to_uint8.launch(HostArray(image), HostArray(pixels)), grid)
    assert np.array_equal(pixels, image_to_uint8.image_to_uint8(image))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_finding_what_is_not_finite(emulation: Emulation, grid: tuple[int, int], dtype: str) -> None:
    fault = np.zeros(1, np.int32)

    def check(buffer: np.ndarray[Any, Any]) -> int:
        fault[0] = 0
        emulation.run(check_finite.launch(HostArray(buffer), HostArray(fault)), grid)
        return int(fault[0])

    buffer = np.ones(203, dtype)
    assert check(buffer) == 0
    for place in (0, 100, 198, 202):
        changed = buffer.copy()
        changed[place] = -np.inf
        assert check(changed) == 1, place
