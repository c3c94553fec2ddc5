"""The step kernel against the recurrence in float64, and against its own definition bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.runs.step_runs import (
    SHAPE,
    STEPS,
    TABLES,
    Run,
    arrays,
    artificial_table,
    drive,
    make_buffers,
    make_run,
)

import tolerances
from sdrt.kernels.guided_step import NO_FAULT, StepBuffers, guided_step, prepare_input
from sdrt.kernels.sampler_row import HISTORY, Column
from sdrt.runtime.samplers.registry import SAMPLERS, make_table
from sdrt.runtime.samplers.schedule import PREDICTION_TYPES, FloatArray, NoiseSchedule
from sdrt.runtime.samplers.table import SamplerTable, run_table


def exact_run(run: Run) -> FloatArray:
    """The definition in float64 on the same numbers."""
    predictions = iter(run.guided)
    start, noise = run.start.astype(np.float64), run.noise.astype(np.float64)
    return run_table(run.table, lambda _x, _t: next(predictions), start, noise)


def guidance_error(run: Run, step: int) -> FloatArray:
    """How far a step's guided prediction may be off, float64 [N, C, h, w]."""
    size, images = np.abs(run.predictions[step].astype(np.float64)), len(run.start)
    first, picture, last = size[:images], size[images:-images], size[-images:]
    error: FloatArray = np.zeros_like(first)
    if len(size) == 2 * images:
        error = tolerances.GUIDANCE * (first + run.guidance[step] * (first + last))
    if len(size) == 3 * images:
        text, image = run.guidance[step] * (last + picture), run.image_guidance * (picture + first)
        error = tolerances.PICTURE_GUIDANCE * (first + text + image)
    return error


def assert_each_step_is_the_recurrence(run: Run, guided: FloatArray) -> StepBuffers:
    """Walk the run, and compare every step with one step in float64 from the kernel's own x before it.

    The bound is that of the roundings of this step and of the d that it reads (Higham 2002, section 3.3),
    each ``STEP_TERM`` of a term's size; so it is small beside the terms, whatever the sampler cancels.

    Args:
        run: What the kernel is given.
        guided: float64 [n, N, C, h, w], the predictions after guidance.
    """
    term = tolerances.STEP_TERM
    buffers = make_buffers(run)
    saved = np.zeros(run.start.shape)
    ring = [(saved, saved)] * HISTORY  # d and its error, the newest first
    for step, (row, m) in enumerate(zip(run.table.rows, guided, strict=True)):
        x = buffers.latents.astype(np.float64)
        m_error = guidance_error(run, step)
        terms = row[Column.P] * x, row[Column.Q] * m
        d_error = term * (np.abs(terms[0]) + np.abs(terms[1])) + np.abs(row[Column.Q]) * (1 + term) * m_error
        ring = [(terms[0] + terms[1], d_error), *ring[:-1]]
        noise = run.noise[step].astype(np.float64)
        weighted = [row[Column.A] * x, row[Column.E] * saved, row[Column.C] * noise]
        weighted += [row[Column.B0 + k] * d for k, (d, _) in enumerate(ring)]
        bound = sum(term * np.abs(value) for value in weighted)
        bound += sum(np.abs(row[Column.B0 + k]) * (1 + term) * error for k, (_, error) in enumerate(ring))
        if row[Column.SAVE]:
            saved = x
        buffers.noise_pred[...], buffers.noise[...] = run.predictions[step], run.noise[step]
        guided_step(buffers)
        assert np.all(np.abs(buffers.latents - sum(weighted)) <= bound), f"step {step}"
    return buffers


ALL_TABLES = [
    *TABLES,
    *(
        make_table(name, NoiseSchedule(prediction_type=prediction), STEPS)
        for name in SAMPLERS
        for prediction in PREDICTION_TYPES[1:]
    ),
]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("table", ALL_TABLES, ids=lambda table: table.name)
def test_every_step_of_a_run_equals_the_recurrence_in_float64(
    table: SamplerTable, guided: bool, dtype: str
) -> None:
    run = make_run(table, guided=guided, dtype=dtype)
    buffers = assert_each_step_is_the_recurrence(run, run.guided)
    assert buffers.counter[0] == len(table.timesteps)
    assert buffers.fault[0] == NO_FAULT


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_guidance_by_text_and_picture(dtype: str) -> None:
    run = make_run(artificial_table(), guided=True, dtype=dtype, parts=3)
    assert_each_step_is_the_recurrence(run, run.guided)


def test_artificial_table_would_notice_every_column() -> None:
    """Each column of the artificial table changes the result; otherwise the test above proves little."""
    run = make_run(artificial_table(), guided=False, dtype="float32")
    result = exact_run(run)
    for column in Column:
        if column == Column.INPUT_SCALE or column > Column.SAVE:  # not of the recurrence
            continue
        rows = run.table.rows.copy()
        rows[:, column] = 0.0
        other = Run(
            SamplerTable(run.table.timesteps, rows, 1.0),
            run.predictions,
            run.start,
            run.noise,
            run.guidance,
        )
        assert np.max(np.abs(exact_run(other) - result)) > 1e-3, column


def scalar_step(buffers: StepBuffers, index: tuple[int, ...]) -> np.float32:
    """The kernel's definition for one element, one float32 operation after the other."""
    step = int(buffers.counter[0])
    row = buffers.rows[step]
    images = len(buffers.latents)
    prediction = buffers.noise_pred.astype(np.float32)
    unconditional, *others = (part[index] for part in np.split(prediction, len(prediction) // images))
    m = unconditional
    if len(others) == 1:
        m = m + row[Column.GUIDANCE] * (others[0] - unconditional)
    if len(others) == 2:
        m = m + row[Column.GUIDANCE] * (others[1] - others[0])
        m = m + row[Column.IMAGE_GUIDANCE] * (others[0] - unconditional)
    if buffers.factors is not None:
        m = buffers.factors[index[0]] * m
    x = buffers.latents[index]
    d = row[Column.P] * x + row[Column.Q] * m
    result = row[Column.A] * x + row[Column.B0] * d
    for back in range(1, HISTORY):
        if row[Column.B0 + back]:
            result += row[Column.B0 + back] * buffers.history[((step - back) % HISTORY, *index)]
    if row[Column.E]:
        result += row[Column.E] * buffers.saved[index]
    if row[Column.C]:
        result += row[Column.C] * buffers.noise[index]
    assert isinstance(result, np.float32)
    return result


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_every_bit_is_defined(parts: int, dtype: str) -> None:
    """A compiled kernel can be compared bit for bit only if the order of operations is the documented one."""
    run = make_run(artificial_table(), guided=True, dtype=dtype, parts=parts)
    buffers = make_buffers(run)
    if parts > 1:
        buffers.factors = np.array([0.7, 1.1], np.float32)
    for prediction, noise in zip(run.predictions, run.noise, strict=True):
        buffers.noise_pred[...] = prediction
        buffers.noise[...] = noise
        expected = np.array([scalar_step(buffers, index) for index in np.ndindex(SHAPE)])
        guided_step(buffers)
        assert np.array_equal(buffers.latents.ravel(), expected)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_the_guess_of_the_clean_latents(guided: bool) -> None:
    """Of x before the step and of the prediction after guidance; and keeping it changes nothing else."""
    run = make_run(artificial_table(), guided=guided, dtype="float32")
    buffers, without = make_buffers(run, inpainting=True, denoised=True), make_buffers(run, inpainting=True)
    for step, (row, m) in enumerate(zip(run.table.rows, run.guided, strict=True)):
        x, m_error = buffers.latents.astype(np.float64), guidance_error(run, step)
        terms = row[Column.X0_X] * x, row[Column.X0_M] * m
        bound = tolerances.STEP_TERM * (np.abs(terms[0]) + np.abs(terms[1]))
        bound += np.abs(row[Column.X0_M]) * (1 + tolerances.STEP_TERM) * m_error
        for one in (buffers, without):
            one.noise_pred[...], one.noise[...] = run.predictions[step], run.noise[step]
            guided_step(one)
        assert buffers.denoised is not None
        assert np.all(np.abs(buffers.denoised - sum(terms)) <= bound)
        assert np.array_equal(buffers.latents, without.latents)


def test_each_row_has_its_guidance() -> None:
    """A row whose w is 1 gives the conditional half's x to within roundings, one whose w is 0 the other's."""
    run = make_run(artificial_table(2), guided=True, dtype="float32")
    both = replace(run, guidance=np.array([1.0, 0.0]))
    half = run.predictions[0, SHAPE[0] :], run.predictions[1, : SHAPE[0]]
    assert_each_step_is_the_recurrence(both, np.stack(half).astype(np.float64))


@pytest.mark.parametrize(("evaluated", "prepared"), [(1, 2), (2, 1), (1, 3), (3, 1)])
def test_all_parts_are_written_whichever_were_read(evaluated: int, prepared: int) -> None:
    """So a step without guidance can be followed by one with it, and the other way round."""
    run = make_run(artificial_table(), guided=True, dtype="float16", parts=evaluated)
    buffers, usual = make_buffers(run), make_buffers(run)
    other = np.zeros((SHAPE[0] * prepared, *SHAPE[1:]), np.float16)
    drive(run, usual)
    drive(run, replace(buffers, sample=other, timestep=np.zeros(len(other), np.float32)))
    assert np.array_equal(buffers.latents, usual.latents)
    for part in np.split(other, prepared):
        assert np.array_equal(part, usual.sample[: SHAPE[0]])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("halves", [1, 2])
def test_unet_input_of_every_step(halves: int, dtype: str) -> None:
    table = make_table("euler", NoiseSchedule(), STEPS)  # scales its input and has fractional timesteps
    run = make_run(table, guided=halves == 2, dtype=dtype)
    buffers = make_buffers(run)
    prepare_input(buffers)
    for step in range(STEPS):
        scale = np.float32(table.rows[step, Column.INPUT_SCALE])
        expected = np.concatenate([(buffers.latents * scale).astype(dtype)] * halves)
        assert np.array_equal(buffers.sample, expected)
        assert buffers.sample.dtype == dtype
        assert buffers.timestep.tolist() == [np.float32(table.timesteps[step])] * len(expected)
        buffers.noise_pred[...] = run.predictions[step]
        guided_step(buffers)


def test_after_the_last_row_no_input_is_prepared() -> None:
    run = make_run(artificial_table(2), guided=True, dtype="float32")
    for buffers in (make_buffers(run), make_buffers(run, count=False)):
        buffers.counter[0] = 2 if buffers.count is not None else len(buffers.timesteps)
        buffers.sample[...] = 77.0
        buffers.timestep[...] = 77.0
        prepare_input(buffers)
        assert np.all(buffers.sample == 77.0)
        assert np.all(buffers.timestep == 77.0)


def test_after_the_last_row_a_step_does_nothing() -> None:
    """A graph replayed once too often must not walk off the table."""
    run = make_run(artificial_table(), guided=True, dtype="float32")
    buffers = make_buffers(run, inpainting=True)
    drive(run, buffers)
    before = {name: array.copy() for name, array in arrays(buffers).items()}
    guided_step(buffers)
    for name, array in arrays(buffers).items():
        assert np.array_equal(array, before[name]), name


def test_rows_in_use_can_be_counted_or_fill_the_table() -> None:
    run = make_run(artificial_table(), guided=True, dtype="float32")
    counted, uncounted = make_buffers(run), make_buffers(run, count=False)
    drive(run, counted)
    drive(run, uncounted)
    assert np.array_equal(counted.latents, uncounted.latents)
    assert np.all(counted.timestep == np.float32(run.table.timesteps[-1]))  # no row after it was prepared
    assert not uncounted.timestep.any()


def test_table_that_fills_its_buffer_can_be_walked_to_the_end() -> None:
    run = make_run(artificial_table(), guided=True, dtype="float32")
    buffers, trimmed = make_buffers(run), make_buffers(run, count=False)
    trimmed.rows, trimmed.timesteps = trimmed.rows[:STEPS].copy(), trimmed.timesteps[:STEPS].copy()
    drive(run, buffers)
    drive(run, trimmed)
    assert np.array_equal(buffers.latents, trimmed.latents)


def test_guidance_of_one_is_the_conditional_half_and_zero_the_other() -> None:
    run = make_run(artificial_table(), guided=True, dtype="float16")
    for scale, half in ((1.0, run.predictions[:, SHAPE[0] :]), (0.0, run.predictions[:, : SHAPE[0]])):
        with_guidance = replace(run, guidance=np.full(STEPS, scale))
        assert_each_step_is_the_recurrence(with_guidance, half.astype(np.float64))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("first", [0, 3, STEPS - 1])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_fault_is_the_first_step_that_was_not_finite(first: int, dtype: str, half: int, value: float) -> None:
    run = make_run(artificial_table(), guided=True, dtype=dtype)
    for step in (first, min(first + 2, STEPS - 1)):
        run.predictions[step, half * SHAPE[0], 1, 2, 3] = value
    buffers = make_buffers(run)
    drive(run, buffers)
    assert buffers.fault[0] == first
    assert buffers.counter[0] == STEPS


def test_what_a_row_does_not_use_it_does_not_read() -> None:
    """A NaN that lies about is harmless where its coefficient is zero, also in the first rows."""
    run = make_run(make_table("ddim", NoiseSchedule(), 3), guided=False, dtype="float32")
    clean, dirty = make_buffers(run), make_buffers(run)
    for buffer in (dirty.noise, dirty.saved, dirty.history):
        buffer[...] = np.nan
    for prediction in run.predictions:
        for buffers in (clean, dirty):
            buffers.noise_pred[...] = prediction
            guided_step(buffers)
    assert np.array_equal(clean.latents, dirty.latents)
    assert dirty.fault[0] == NO_FAULT


def test_buffers_stay_where_they_are_and_inputs_as_they_are() -> None:
    """Their addresses are bound to the U-Net, and on a GPU baked into a graph."""
    run = make_run(artificial_table(), guided=True, dtype="float16")
    buffers = make_buffers(run, inpainting=True, phi=0.0, denoised=True)

    def addresses() -> dict[str, int]:
        return {name: array.ctypes.data for name, array in arrays(buffers).items()}

    before = addresses()
    names = ("rows", "timesteps", "mask", "known", "known_noise", "count", "factors", "guidance_rescale")
    inputs = {name: getattr(buffers, name).copy() for name in names}
    drive(run, buffers)
    assert addresses() == before
    for name, array in inputs.items():
        assert np.array_equal(getattr(buffers, name), array)
    assert np.array_equal(buffers.noise_pred, run.predictions[-1])
