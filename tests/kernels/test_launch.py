"""Launches: what they are made of, what they refuse, and how many bytes they move."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from support.runs.step_runs import artificial_table, make_buffers, make_run

from sdrt.kernels import check_finite, guidance_rescale, guided_step, image_to_uint8, philox_normal
from sdrt.kernels.compile import modules, sources
from sdrt.kernels.guided_step import StepBuffers
from sdrt.kernels.host_build import HostArray, on_host
from sdrt.kernels.launch import BLOCK, MAX_GRID, Launch, blocks
from sdrt.kernels.sampler_row import COLUMNS
from sdrt.runtime.samplers.registry import make_table
from sdrt.runtime.samplers.schedule import NoiseSchedule
from sdrt.runtime.samplers.table import SamplerTable

SD15_512 = (1, 4, 64, 64)


def array(shape: tuple[int, ...], dtype: str = "float32") -> HostArray:
    return HostArray(np.zeros(shape, dtype))


def step_buffers(dtype: str = "float16", *, inpainting: bool = True, guided: bool = True) -> StepBuffers:
    run = make_run(artificial_table(), guided=guided, dtype=dtype, shape=SD15_512)
    return make_buffers(run, inpainting=inpainting, phi=0.7 if inpainting else None, denoised=inpainting)


@pytest.mark.parametrize(
    ("groups", "grid"),
    [
        (0, 1),
        (1, 1),
        (BLOCK, 1),
        (BLOCK + 1, 2),
        (BLOCK * MAX_GRID, MAX_GRID),
        (BLOCK * MAX_GRID + 1, MAX_GRID),
    ],
)
def test_the_grid_covers_the_work_up_to_its_bound(groups: int, grid: int) -> None:
    assert blocks(groups) == grid


def test_blocks_are_no_larger_than_the_kernels_are_compiled_for() -> None:
    bounds = [
        int(bound)
        for name, text in sources().items()
        if name.endswith(".cu")
        for bound in re.findall(r"__launch_bounds__\((\d+)\)", text)
    ]
    assert len(bounds) >= len(modules())
    assert set(bounds) == {BLOCK, guidance_rescale.LANES}
    (lanes,) = re.findall(r"LANES = (\d+)", sources()["guidance_rescale.cuh"])
    assert int(lanes) == guidance_rescale.LANES


def test_the_same_buffers_give_the_same_launch_at_every_step() -> None:
    """So it can be captured once: nothing in it is read from the counter."""
    buffers = on_host(step_buffers())

    def fields(launch: Launch) -> tuple[Any, ...]:
        return (launch.module, launch.entry, launch.grid, launch.block, bytes(launch.params))

    first = fields(guided_step.launch(buffers))
    assert isinstance(buffers.counter, HostArray)
    buffers.counter.array[0] = 3
    assert fields(guided_step.launch(buffers)) == first
    assert first[:4] == ("guided_step", "guided_step_f16x4", 32, 128)


def test_a_buffer_that_is_not_there_has_address_zero() -> None:
    params = guided_step.launch(on_host(step_buffers(inpainting=False))).params
    for name in ("mask", "known", "known_noise", "factors", "denoised"):
        assert getattr(params, name) == 0
    assert params.count != 0


def changed(buffers: StepBuffers, name: str, array: object) -> StepBuffers:
    changes: dict[str, Any] = {name: array}
    return dataclasses.replace(buffers, **changes)


WRONG = [
    ("noise_pred", (4, 4, 64, 64), "float16", r"noise_pred has 4 rows: 1 images have 1, or 2 or 3 guided"),
    (
        "noise_pred",
        (2, 4, 64, 32),
        "float16",
        r"noise_pred has shape \(2, 4, 64, 32\): it must be \(2, 4, 64, 64\)",
    ),
    ("noise_pred", (2, 4, 64, 64), "float64", r"noise_pred is float64: it must be float16 or float32"),
    ("sample", (2, 4, 64, 64), "float32", r"sample is float32: it must be float16"),
    ("sample", (4, 4, 64, 64), "float16", r"sample has 4 rows: 1 images have 1, or 2 or 3 guided"),
    ("latents", (4, 64, 64), "float32", r"must have the four axes N, C, h, w"),
    ("latents", (1, 4, 64, 64), "float16", r"latents is float16: it must be float32"),
    ("history", (3, 1, 4, 64, 64), "float32", r"history has shape"),
    ("rows", (12, COLUMNS + 1), "float32", r"rows has shape"),
    ("timesteps", (12,), "float64", r"timesteps is float64"),
    ("timestep", (1,), "float32", r"timestep has shape \(1,\): it must be \(2,\)"),
    ("factors", (), "float32", r"factors has shape \(\)"),
    ("guidance_rescale", (1,), "float64", r"guidance_rescale is float64"),
    ("denoised", (1, 4, 64, 32), "float32", r"denoised has shape"),
    ("counter", (1,), "int64", r"counter is int64: it must be int32"),
    ("mask", (1, 4, 64, 64), "float32", r"mask has shape"),
    ("known", (1, 4, 32, 64), "float32", r"known has shape"),
    ("ticket", (1,), "int32", r"ticket is int32: it must be uint32"),
    ("count", (2,), "int32", r"count has shape"),
]


@pytest.mark.parametrize(("name", "shape", "dtype", "message"), WRONG)
def test_a_step_with_a_wrong_buffer_is_refused(
    name: str, shape: tuple[int, ...], dtype: str, message: str
) -> None:
    buffers = changed(on_host(step_buffers()), name, array(shape, dtype))
    for make in (guided_step.launch, guided_step.launch_prepare_input, guidance_rescale.launch):
        with pytest.raises(ValueError, match=message):
            make(buffers)


@pytest.mark.parametrize("name", ["mask", "known", "known_noise"])
def test_half_an_inpainting_is_refused(name: str) -> None:
    buffers = changed(on_host(step_buffers()), name, None)
    with pytest.raises(ValueError, match="belong together"):
        guided_step.launch(buffers)


@pytest.mark.parametrize(("evaluated", "prepared"), [(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 3)])
def test_rows_read_and_rows_written_are_independent(evaluated: int, prepared: int) -> None:
    buffers = on_host(step_buffers())
    for name, rows in (("noise_pred", evaluated), ("sample", prepared)):
        buffers = changed(buffers, name, array((rows, *SD15_512[1:]), "float16"))
    buffers = changed(buffers, "timestep", array((prepared,), "float32"))
    params = guided_step.launch(buffers).params
    assert (params.evaluated, params.parts) == (evaluated, prepared)


def test_one_block_rescales_one_image() -> None:
    run = make_run(artificial_table(), guided=True, dtype="float32", shape=(3, 4, 5, 6))
    made = guidance_rescale.launch(on_host(make_buffers(run, phi=0.5)))
    assert (made.module, made.entry) == ("guidance_rescale", "guidance_rescale_f32")
    assert (made.grid, made.block) == (3, guidance_rescale.LANES)
    assert (made.params.images, made.params.image_elements) == (3, 120)


def test_rescaling_without_what_it_needs_is_refused() -> None:
    with pytest.raises(ValueError, match="noise_pred has 1 rows for 1 images: two for each are rescaled"):
        guidance_rescale.launch(on_host(step_buffers(guided=False)))
    for name in ("factors", "guidance_rescale"):
        with pytest.raises(ValueError, match=f"{name} missing"):
            guidance_rescale.launch(changed(on_host(step_buffers()), name, None))


def test_a_step_without_a_ticket_is_refused() -> None:
    buffers = changed(on_host(step_buffers()), "ticket", None)
    with pytest.raises(ValueError, match="ticket is missing"):
        guided_step.launch(buffers)
    guided_step.launch_prepare_input(buffers)  # needs none


@dataclasses.dataclass
class Somewhere:
    """An array that is nowhere, as large as wanted."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    address: int = 4096


def test_more_elements_than_an_index_can_count_are_refused() -> None:
    huge = Somewhere((2**10, 3, 2**10, 2**10), np.dtype(np.float32))
    pixels = Somewhere((2**10, 2**10, 2**10, 3), np.dtype(np.uint8))
    with pytest.raises(ValueError, match=r"has 3221225472 elements: at most 2147483647"):
        image_to_uint8.launch(huge, pixels)
    with pytest.raises(ValueError, match=r"at most 2147483647"):
        philox_normal.launch(huge, Somewhere((2**10,), np.dtype(np.uint64)))
    assert (
        check_finite.launch(huge, array((1,), "int32")).params.elements == 3221225472
    )  # its index has 64 bits


def test_other_kernels_refuse_wrong_arrays() -> None:
    noise, seeds, counter = array((2, 4, 8, 8)), array((2,), "uint64"), array((1,), "int32")
    draws = array((9,), "int32")
    for arguments, message in (
        ((array((2, 4), "float16"), seeds, counter, draws), "noise is float16"),
        ((array(()), seeds, counter, draws), "noise has no axis"),
        ((noise, array((3,), "uint64"), counter, draws), r"seeds has shape \(3,\): it must be \(2,\)"),
        ((noise, array((2,), "int64"), counter, draws), "seeds is int64"),
        ((noise, seeds, array((1,), "uint32"), draws), "counter is uint32"),
        ((noise, seeds, counter, array((9,))), "draws is float32"),
        ((noise, seeds, counter, array((9, 1), "int32")), r"draws has shape \(9, 1\): it must be \(9,\)"),
        ((noise, seeds, counter), "counter and draws belong together"),
        ((noise, seeds, None, draws), "counter and draws belong together"),
    ):
        with pytest.raises(ValueError, match=message):
            philox_normal.launch(*arguments)
    for draw in (-1, 2**63):
        with pytest.raises(ValueError, match="draw is"):
            philox_normal.launch(noise, seeds, draw=draw)
    for image, pixels, message in (
        (array((1, 4, 8, 8)), array((1, 8, 8, 4), "uint8"), r"it must be \[N, 3, H, W\]"),
        (array((1, 3, 8, 8), "float64"), array((1, 8, 8, 3), "uint8"), "image is float64"),
        (array((1, 3, 8, 8)), array((1, 3, 8, 8), "uint8"), r"pixels has shape \(1, 3, 8, 8\)"),
        (array((1, 3, 8, 8)), array((1, 8, 8, 3), "int8"), "pixels is int8"),
    ):
        with pytest.raises(ValueError, match=message):
            image_to_uint8.launch(image, pixels)
    with pytest.raises(ValueError, match="buffer is int32: it must be float16 or float32"):
        check_finite.launch(array((4,), "int32"), array((1,), "int32"))
    with pytest.raises(ValueError, match="fault is float32"):
        check_finite.launch(array((4,)), array((1,)))


def test_bytes_of_a_step() -> None:
    """One guided image of 512² in half precision: halves of 2 bytes, a state of 4."""
    state = 4 * 64 * 64 * 4
    halves = 2 * state // 2
    buffers = step_buffers(inpainting=False)
    multistep = make_table("dpmpp_2m", NoiseSchedule(), 20)
    base = halves + 3 * state + halves  # prediction, x in and out, d out, sample
    assert guided_step.bytes_moved(buffers, multistep.rows, 0) == base
    assert guided_step.bytes_moved(buffers, multistep.rows, 5) == base + state
    assert guided_step.bytes_moved(buffers, multistep.rows, 19) == base - halves  # no first-order last row
    euler = make_table("euler", NoiseSchedule(), 2)
    masked = step_buffers()
    assert guided_step.bytes_moved(masked, euler.rows, 0) == base + 3 * state + state // 4  # and the guess
    masked.denoised = None
    assert guided_step.bytes_moved(masked, euler.rows, 0) == base + 2 * state + state // 4
    every = SamplerTable(np.ones(2), np.ones((2, COLUMNS)), 1.0)
    assert guided_step.bytes_moved(buffers, every.rows, 0) == base + 6 * state  # 3 d, saved in and out, noise
    plain = step_buffers("float32", inpainting=False, guided=False)
    assert guided_step.bytes_moved(plain, euler.rows, 0) == 5 * state


def test_bytes_of_the_other_kernels() -> None:
    assert philox_normal.bytes_moved(array((2, 4, 8, 8))) == 2 * 4 * 8 * 8 * 4
    assert image_to_uint8.bytes_moved(array((1, 3, 512, 512), "float16")) == 2_359_296
    assert check_finite.bytes_moved(array((1, 3, 512, 512), "float16")) == 1_572_864
    assert guidance_rescale.bytes_moved(step_buffers()) == 2 * 4 * 64 * 64 * 2


def test_figures_in_the_texts_are_those_that_the_functions_give() -> None:
    rows = make_table("dpmpp_2m", NoiseSchedule(), 20).rows
    figures = {
        guided_step: guided_step.bytes_moved(step_buffers(inpainting=False), rows, 5),
        guidance_rescale: guidance_rescale.bytes_moved(step_buffers()),
        image_to_uint8: image_to_uint8.bytes_moved(array((1, 3, 512, 512), "float16")),
        check_finite: check_finite.bytes_moved(array((1, 3, 512, 512), "float16")),
        philox_normal: philox_normal.bytes_moved(array(SD15_512)),
    }
    for module, nbytes in figures.items():
        text = module.__doc__ or ""
        assert f"{nbytes:,}" in text, module
        microseconds = re.search(r"([\d.]+) µs\s+at", text)
        assert microseconds, module
        assert float(microseconds[1]) == pytest.approx(
            nbytes / 3.3e12 * 1e6, abs=0.05 if nbytes > 1e6 else 0.005
        )


def test_making_launches_imports_nothing_of_cuda() -> None:
    modules = "check_finite, compile, guidance_rescale, guided_step, image_to_uint8, launch, philox_normal"
    code = f"import sys; from sdrt.kernels import {modules}; sys.exit('cuda' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
