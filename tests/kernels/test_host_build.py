"""The kernels' headers, compiled for the host, against the NumPy references: bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.runs.step_runs import (
    STEPS,
    TABLES,
    arrays,
    artificial_table,
    copied,
    drive,
    make_buffers,
    make_run,
    same_bits,
)

from sdrt.kernels import (
    check_finite,
    guidance_rescale,
    guided_step,
    host_build,
    image_to_uint8,
    philox_normal,
)
from sdrt.kernels.compile import KernelError
from sdrt.kernels.guided_step import StepBuffers
from sdrt.kernels.host_build import HostArray, on_host, run_on_host
from sdrt.kernels.launch import Launch
from sdrt.kernels.sampler_row import COLUMNS, Column
from sdrt.runtime.samplers.registry import make_table
from sdrt.runtime.samplers.schedule import NoiseSchedule
from sdrt.runtime.samplers.table import SamplerTable

DTYPES = ["float16", "float32"]
ODD = (2, 3, 3, 5)  # a plane of 15: nothing can be moved four at a time
EVEN = (2, 4, 6, 6)


def host_step(buffers: StepBuffers) -> None:
    run_on_host(guided_step.launch(on_host(buffers)))


def host_prepare(buffers: StepBuffers) -> None:
    run_on_host(guided_step.launch_prepare_input(on_host(buffers)))


def host_rescale(buffers: StepBuffers) -> None:
    run_on_host(guidance_rescale.launch(on_host(buffers)))


def assert_same(buffers: StepBuffers, reference: StepBuffers) -> None:
    wanted = arrays(reference)
    for name, array in arrays(buffers).items():
        assert same_bits(array, wanted[name]), name


def moved(array: NDArray[Any], offset: int) -> NDArray[Any]:
    """A copy that starts ``offset`` bytes behind an address that is a multiple of 64."""
    memory = np.zeros(array.nbytes + 64 + offset, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    result = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    result[...] = array
    return result


# guided_step


@pytest.mark.parametrize(("shape", "everything"), [(ODD, False), (EVEN, True)], ids=["odd", "even-all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_step_of_every_sampler(
    table: SamplerTable, guided: bool, dtype: str, everything: bool, shape: tuple[int, int, int, int]
) -> None:
    """Every buffer after every step: x, ring, saved x, next input and timestep, counter, fault, ticket.

    With everything that a step may do: a mask, guidance rescaled, the guess of the clean latents kept.
    """
    run = make_run(table, guided=guided, dtype=dtype, shape=shape)
    phi = 0.7 if everything and guided else None
    buffers = make_buffers(run, inpainting=everything, phi=phi, denoised=everything)
    reference = copied(buffers)
    steps = 0

    def both(_: StepBuffers) -> None:
        nonlocal steps
        reference.noise_pred[...], reference.noise[...] = buffers.noise_pred, buffers.noise
        if phi is not None:
            guidance_rescale.guidance_rescale(reference)
        host_step(buffers)
        guided_step.guided_step(reference)
        assert_same(buffers, reference)
        steps += 1

    guided_step.prepare_input(reference)
    drive(run, buffers, both, host_prepare, host_rescale)
    assert steps == buffers.counter[0] == len(table.timesteps)


def test_the_entry_is_made_for_dtype_and_alignment() -> None:
    entries = {}
    for shape in (ODD, EVEN):
        for dtype in DTYPES:
            buffers = make_buffers(make_run(artificial_table(), guided=True, dtype=dtype, shape=shape))
            buffers = on_host(StepBuffers(**{name: moved(a, 0) for name, a in arrays(buffers).items()}))
            entries[shape, dtype] = guided_step.launch(buffers).entry
    assert entries == {
        (ODD, "float16"): "guided_step_f16",
        (ODD, "float32"): "guided_step_f32",
        (EVEN, "float16"): "guided_step_f16x4",
        (EVEN, "float32"): "guided_step_f32x4",
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name",
    [
        *("noise_pred", "latents", "history", "saved", "noise", "sample", "mask", "known", "known_noise"),
        "denoised",
    ],
)
def test_an_array_that_starts_off_the_grid_is_taken_element_by_element(name: str, dtype: str) -> None:
    """A caller's own latents may start anywhere; a wide load there would be a fault on a GPU."""
    run = make_run(artificial_table(), guided=True, dtype=dtype, shape=EVEN)
    start = make_buffers(run, inpainting=True, denoised=True)
    placed = {key: moved(array, 4 if key == name else 0) for key, array in arrays(start).items()}
    buffers, reference = StepBuffers(**placed), copied(start)
    launch = guided_step.launch(on_host(buffers))
    assert launch.entry == ("guided_step_f16" if dtype == "float16" else "guided_step_f32")
    drive(run, buffers, host_step, host_prepare)
    drive(run, reference)
    assert_same(buffers, reference)


FLOATS = st.floats(-4, 4, width=32) | st.sampled_from([0.0, -0.0, 1.0, 2.0**-30, 6e4])
HALVES = st.floats(-8, 8, width=16) | st.sampled_from([0.0, -0.0, 65504.0, -65504.0, 2.0**-24])


@st.composite
def step_cases(draw: st.DrawFn) -> StepBuffers:
    """Any shapes, rows with any zeros, any place in the run, numbers at the ends of half precision."""
    shape = draw(st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(1, 5)] * 2))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    steps = draw(st.integers(1, 7))
    rows = random.uniform(-2, 2, (steps, COLUMNS)) * (random.uniform(size=(steps, COLUMNS)) < 0.7)
    table = SamplerTable(random.uniform(0, 999, steps), rows, 1.0)
    dtype, parts = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 3))
    run = make_run(table, guided=True, dtype=dtype, shape=shape, parts=parts)
    buffers = make_buffers(
        run, inpainting=draw(st.booleans()), count=draw(st.booleans()), denoised=draw(st.booleans())
    )
    buffers.counter[0] = draw(st.integers(0, steps + 4))
    buffers.rows[:, Column.GUIDANCE] = draw(FLOATS)
    buffers.rows[:, Column.IMAGE_GUIDANCE] = draw(FLOATS)
    if draw(st.booleans()):
        buffers.factors = random.uniform(0.3, 1.1, shape[0]).astype(np.float32)
    prepared = draw(st.integers(1, 3)) * shape[0]
    buffers.sample = np.zeros((prepared, *shape[1:]), buffers.sample.dtype)
    buffers.timestep = np.zeros(prepared, np.float32)
    for array in (buffers.latents, buffers.history, buffers.saved, buffers.noise):
        array[...] = random.standard_normal(array.shape)
    buffers.latents.flat[0] = draw(FLOATS)
    buffers.noise_pred[...] = random.standard_normal(buffers.noise_pred.shape)
    buffers.noise_pred.flat[-1] = draw(HALVES)
    return buffers


@settings(derandomize=True, deadline=None, max_examples=200)
@given(buffers=step_cases())
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # 6e4 times a scale above 1
def test_any_single_step(buffers: StepBuffers) -> None:
    reference = copied(buffers)
    host_step(buffers)
    guided_step.guided_step(reference)
    assert_same(buffers, reference)
    host_prepare(buffers)
    guided_step.prepare_input(reference)
    assert_same(buffers, reference)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, 3, STEPS - 1])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_fault_is_the_first_step_that_was_not_finite(first: int, dtype: str, half: int, value: float) -> None:
    run = make_run(artificial_table(), guided=True, dtype=dtype)
    for step in (first, min(first + 2, STEPS - 1)):
        run.predictions[step, half * len(run.start), 1, 2, 3] = value
    buffers, reference = make_buffers(run), make_buffers(run)
    drive(run, buffers, host_step, host_prepare)
    drive(run, reference)
    assert buffers.fault[0] == first
    assert_same(buffers, reference)


def test_what_a_row_does_not_use_it_does_not_read() -> None:
    run = make_run(make_table("ddim", NoiseSchedule(), 3), guided=False, dtype="float32")
    clean, dirty = make_buffers(run), make_buffers(run)
    for buffer in (dirty.noise, dirty.saved, dirty.history):
        buffer[...] = np.nan
    for prediction in run.predictions:
        for buffers in (clean, dirty):
            buffers.noise_pred[...] = prediction
            host_step(buffers)
    assert same_bits(clean.latents, dirty.latents)
    assert dirty.fault[0] == guided_step.NO_FAULT


@pytest.mark.parametrize("column", Column)
def test_each_column_is_read_from_its_place(column: Column) -> None:
    """Rows of few numbers, one of them the column's: a wrong index in the header cannot hide."""
    rows = np.zeros((5, COLUMNS))
    rows[:, [Column.INPUT_SCALE, Column.Q, Column.A, Column.B0, Column.SAVE]] = 1.0
    rows[:, column] = 0.75
    table, parts = SamplerTable(np.arange(5.0), rows, 1.0), 3 if column == Column.IMAGE_GUIDANCE else 2
    run = make_run(table, guided=True, dtype="float32", parts=parts)
    buffers, reference, without = (make_buffers(run, inpainting=True, denoised=True) for _ in range(3))
    drive(run, buffers, host_step, host_prepare)
    drive(run, reference)
    assert_same(buffers, reference)
    without.rows[:, column] = 0.0
    drive(run, without, host_step, host_prepare)
    assert any(
        not same_bits(getattr(buffers, name), getattr(without, name))
        for name in ("latents", "sample", "saved", "history", "denoised")
    )


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_numbers_are_rounded_to_half_precision_as_numpy_does() -> None:
    """Every half, the midpoints between them, the neighbours of those, and float32 numbers of any bits."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    middles = (finite[:-1] + finite[1:]) / 2
    beyond = np.array([65519.996, 65520.0, 65536.0, 3e38, np.inf, np.nan], np.float32)
    sweep = np.random.default_rng(2).integers(0, 2**32, 2**16, dtype=np.uint32).view(np.float32)
    values = np.concatenate(
        [halves, middles, np.nextafter(middles, 9e9), np.nextafter(middles, -9e9), beyond, -beyond, sweep]
    ).astype(np.float32)
    values = np.resize(values, (1, 1, 4, -(-len(values) // 4)))
    run = make_run(artificial_table(1), guided=True, dtype="float16", shape=values.shape)
    buffers = make_buffers(run)
    buffers.latents[...] = values
    buffers.rows[0, Column.INPUT_SCALE] = 1.0
    host_prepare(buffers)
    for half in buffers.sample:
        assert same_bits(half, values[0].astype(np.float16))


def test_every_half_is_widened_as_numpy_does() -> None:
    values = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(1, 1, 256, 256)
    run = make_run(artificial_table(1), guided=False, dtype="float16", shape=values.shape)
    buffers = make_buffers(run)
    buffers.rows[0] = 0.0
    buffers.rows[0, Column.Q] = 1.0
    buffers.latents[...] = 0.0
    buffers.noise_pred[...] = values
    host_step(buffers)
    wanted = values.astype(np.float32)
    wanted[wanted == 0] = 0.0  # d = 0 x + 1 m, and +0 - 0 is +0
    assert same_bits(buffers.history[0], wanted)
    assert buffers.fault[0] == 0


# guidance_rescale


@st.composite
def rescale_cases(draw: st.DrawFn) -> StepBuffers:
    """Fewer elements than lanes and more; constant halves; numbers far from zero and at the ends."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), *[st.integers(1, 14)] * 2))
    run = make_run(artificial_table(2), guided=True, dtype=draw(st.sampled_from(DTYPES)), shape=shape)
    buffers = make_buffers(run, count=draw(st.booleans()), phi=draw(st.floats(0, 1, width=32)))
    buffers.counter[0] = draw(st.integers(0, 6))
    buffers.rows[:, Column.GUIDANCE] = draw(FLOATS)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 100.0]))
    buffers.noise_pred[...] = draw(HALVES) + scale * random.standard_normal(buffers.noise_pred.shape)
    buffers.noise_pred.flat[draw(st.integers(0, buffers.noise_pred.size - 1))] = draw(HALVES)
    return buffers


@settings(derandomize=True, deadline=None, max_examples=200)
@given(buffers=rescale_cases())
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_any_factors(buffers: StepBuffers) -> None:
    reference = copied(buffers)
    host_rescale(buffers)
    guidance_rescale.guidance_rescale(reference)
    assert_same(buffers, reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_prediction_that_is_not_finite_is_still_a_fault_after_rescaling(dtype: str, value: float) -> None:
    run = make_run(artificial_table(), guided=True, dtype=dtype, shape=EVEN)
    run.predictions[2].flat[-1] = value
    buffers, reference = make_buffers(run, phi=0.7), make_buffers(run, phi=0.7)
    drive(run, buffers, host_step, host_prepare, host_rescale)
    drive(run, reference)
    assert buffers.fault[0] == 2
    assert_same(buffers, reference)


# philox_normal


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    row=st.none() | st.integers(0, 3),
    draws=st.lists(st.just(philox_normal.NO_DRAW) | st.integers(0, 2**31 - 1), min_size=1, max_size=3),
    draw=st.sampled_from([0, 1, 7, 2**32 - 1, 2**63 - 1]),
)
def test_noise_of_any_seed_and_draw(
    seeds: list[int], shape: tuple[int, ...], row: int | None, draws: list[int], draw: int
) -> None:
    noise = np.full((len(seeds), *shape), np.nan, np.float32)
    wanted = noise.copy()
    words = np.array(seeds, np.uint64)
    of_row = () if row is None else (np.array([row], np.int32), np.array(draws, np.int32))
    given = [HostArray(array) for array in (noise, words, *of_row)]
    run_on_host(philox_normal.launch(*given, draw=draw))
    philox_normal.fill_philox_normal(wanted, words, *of_row, draw=draw)
    assert same_bits(noise, wanted)


def test_a_whole_latents_worth_of_noise() -> None:
    noise = np.zeros((2, 4, 128, 128), np.float32)
    wanted, seeds = noise.copy(), np.array([0, 2**64 - 1], np.uint64)
    run_on_host(philox_normal.launch(HostArray(noise), HostArray(seeds)))
    philox_normal.fill_philox_normal(wanted, seeds)
    assert same_bits(noise, wanted)


# image_to_uint8


def host_image(image: NDArray[Any], offset: int = 0) -> tuple[NDArray[np.uint8], Launch]:
    images, channels, height, width = image.shape
    pixels = moved(np.full((images, height, width, channels), 77, np.uint8), offset)
    launch = image_to_uint8.launch(HostArray(image), HostArray(pixels))
    run_on_host(launch)
    return pixels, launch


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_bytes_of_every_number_of_half_precision() -> None:
    values = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(1, 1, 256, 256)
    image = moved(np.concatenate([values, values[:, :, ::-1], values[:, :, :, ::-1]], axis=1), 0)
    pixels, launch = host_image(image)
    assert launch.entry == "image_to_uint8_f16x4"
    assert np.array_equal(pixels, image_to_uint8.image_to_uint8(image))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_bytes_of_float32_near_every_half_and_anywhere() -> None:
    near = np.array([(2 * k + 1) / 255 - 1 for k in range(-3, 259)], np.float32)
    sweep = np.random.default_rng(4).integers(0, 2**32, 2**16, dtype=np.uint32).view(np.float32)
    values = np.concatenate([near, np.nextafter(near, 9), np.nextafter(near, -9), sweep])
    image = moved(np.resize(values, (2, 3, 128, 128)), 0)
    pixels, launch = host_image(image)
    assert launch.entry == "image_to_uint8_f32x4"
    assert np.array_equal(pixels, image_to_uint8.image_to_uint8(image))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "offset"), [((2, 3, 5, 7), 0), ((3, 3, 1, 1), 0), ((1, 3, 4, 4), 1)])
def test_bytes_of_odd_sizes_and_places(shape: tuple[int, ...], offset: int, dtype: str) -> None:
    image = np.random.default_rng(6).uniform(-1.2, 1.2, shape).astype(dtype)
    pixels, launch = host_image(image, offset)
    assert launch.entry in ("image_to_uint8_f16", "image_to_uint8_f32")
    assert np.array_equal(pixels, image_to_uint8.image_to_uint8(image))


# check_finite


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_found_anywhere(value: float, offset: int, dtype: str) -> None:
    """21 elements: whole vectors and a rest in both dtypes."""
    for place in range(21):
        buffer = moved(np.zeros(21, dtype), offset)
        buffer[place] = value
        fault = np.zeros(1, np.int32)
        run_on_host(check_finite.launch(HostArray(buffer), HostArray(fault)))
        assert fault[0] == 1, place


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", [0, 1])
def test_finite_numbers_leave_the_fault_as_it_is(fault: int, dtype: str) -> None:
    information = np.finfo(dtype)
    values = [0.0, -0.0, information.max, information.min, information.smallest_subnormal]
    for function in (check_on_host, check_finite.check_finite):
        faults = np.array([fault], np.int32)
        function(np.resize(np.array(values, dtype), (3, 7)), faults)
        assert faults[0] == fault


def check_on_host(buffer: NDArray[Any], fault: NDArray[np.int32]) -> None:
    run_on_host(check_finite.launch(HostArray(buffer), HostArray(fault)))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40), dtype=st.sampled_from(DTYPES))
def test_any_bits_are_judged_as_numpy_judges_them(bits: list[int], dtype: str) -> None:
    buffer = np.array(bits, np.uint32).view(dtype)
    faults = np.zeros((2, 1), np.int32)
    check_on_host(buffer, faults[0])
    check_finite.check_finite(buffer, faults[1])
    assert faults[0] == faults[1]


# The build itself


def test_an_array_with_gaps_is_refused() -> None:
    with pytest.raises(ValueError, match="not C-contiguous"):
        HostArray(np.zeros((4, 4), np.float32)[:, ::2])


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """The library's maker without the memory of this process."""
    return host_build.host_library.__wrapped__


def test_the_library_is_kept_and_made_anew_when_damaged(
    fresh_library: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path))
    fresh_library()
    (library,) = (tmp_path / "kernels").iterdir()
    made = library.read_bytes()
    library.write_bytes(made[: len(made) // 2])
    fresh_library()
    assert len(library.read_bytes()) == len(made)
    monkeypatch.setattr(host_build, "_build", None)  # not called any more
    fresh_library()


def test_no_compiler_is_said(fresh_library: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(KernelError, match=r"needs g\+\+"):
        fresh_library()
