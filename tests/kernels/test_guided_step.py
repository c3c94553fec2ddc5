"""The step kernel against the recurrence in float64, and against its own definition bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import tolerances
from sdrt.kernels.guided_step import NO_FAULT, StepBuffers, guided_step, prepare_input
from sdrt.kernels.sampler_row import COLUMNS, HISTORY, Column
from sdrt.runtime.schedule import PREDICTION_TYPES, FloatArray, NoiseSchedule
from sdrt.runtime.solvers import SAMPLERS, SamplerTable, make_table, run_table

STEPS = 9  # twice around the ring and one more
SHAPE = (2, 3, 4, 5)
SPARE_ROWS = 3  # the loop's table has room for more rows than a run needs


@dataclass(frozen=True)
class Run:
    """What goes into a run: predictions that do not depend on x, so that rounding errors only add up."""

    table: SamplerTable
    predictions: NDArray[Any]  # [n, R, C, h, w]
    start: NDArray[np.float32]
    noise: NDArray[np.float32]  # [n, N, C, h, w]
    guidance_scale: float

    @property
    def guided(self) -> FloatArray:
        """The predictions after guidance in float64, [n, N, C, h, w]."""
        exact = self.predictions.astype(np.float64)
        images = len(self.start)
        if exact.shape[1] == images:
            return exact
        unconditional, conditional = exact[:, :images], exact[:, images:]
        result: FloatArray = unconditional + self.guidance_scale * (conditional - unconditional)
        return result


def artificial_table(steps: int = STEPS) -> SamplerTable:
    """A table that uses every column, as no sampler of this version does."""
    random = np.random.default_rng(5)
    rows = random.uniform(-0.5, 0.5, (steps, COLUMNS))
    rows[:, Column.INPUT_SCALE] = random.uniform(0.1, 1.0, steps)
    rows[:, Column.SAVE] = np.arange(steps) % 3 == 0
    rows[1::3, Column.E] = 0.0
    rows[2::4, Column.C] = 0.0
    return SamplerTable("artificial", np.linspace(990.5, 1.25, steps), rows, 1.0)


def make_run(table: SamplerTable, *, guided: bool, dtype: str) -> Run:
    random = np.random.default_rng(3)
    rows = 2 * SHAPE[0] if guided else SHAPE[0]
    steps = len(table.timesteps)
    return Run(
        table,
        random.standard_normal((steps, rows, *SHAPE[1:])).astype(dtype),
        (random.standard_normal(SHAPE) * table.init_noise_sigma).astype(np.float32),
        random.standard_normal((steps, *SHAPE)).astype(np.float32),
        7.5,
    )


def make_buffers(run: Run) -> StepBuffers:
    steps = len(run.table.timesteps)
    rows = np.zeros((steps + SPARE_ROWS, COLUMNS), np.float32)
    rows[:steps] = run.table.rows
    timesteps = np.zeros(steps + SPARE_ROWS, np.float32)
    timesteps[:steps] = run.table.timesteps
    shape = run.start.shape
    return StepBuffers(
        noise_pred=np.zeros_like(run.predictions[0]),
        latents=run.start.copy(),
        history=np.zeros((HISTORY, *shape), np.float32),
        saved=np.zeros(shape, np.float32),
        noise=np.zeros(shape, np.float32),
        rows=rows,
        timesteps=timesteps,
        guidance_scale=np.array([run.guidance_scale], np.float32),
        counter=np.zeros(1, np.int32),
        fault=np.full(1, NO_FAULT, np.int32),
        sample=np.zeros_like(run.predictions[0]),
        timestep=np.zeros(1, np.float32),
    )


def drive(run: Run, buffers: StepBuffers) -> None:
    """All steps, with the U-Net's part played by the run's predictions."""
    prepare_input(buffers)
    for prediction, noise in zip(run.predictions, run.noise, strict=True):
        buffers.noise_pred[...] = prediction
        buffers.noise[...] = noise
        guided_step(buffers)


def exact_run(run: Run) -> FloatArray:
    """The definition in float64 on the same numbers."""
    predictions = iter(run.guided)
    start, noise = run.start.astype(np.float64), run.noise.astype(np.float64)
    return run_table(run.table, lambda _x, _t: next(predictions), start, noise)


def error_bound(run: Run) -> FloatArray:
    """A bound on the rounding error of every element (Higham 2002, section 3.3: running error analysis).

    The recurrence is walked in float64 next to the error that each value can have: what its operands
    carry, times the coefficients, plus ``STEP_TERM`` of each term's size.
    """
    term = tolerances.STEP_TERM
    x, x_error = np.abs(run.start.astype(np.float64)), np.zeros(run.start.shape)
    ring = [(np.zeros_like(x), np.zeros_like(x))] * HISTORY
    saved = ring[0]
    images = len(x)
    for row, prediction, noise in zip(np.abs(run.table.rows), run.predictions, run.noise, strict=True):
        size = np.abs(prediction.astype(np.float64))
        m, m_error = size, np.zeros_like(size)
        if len(size) != images:
            m = size[:images] + run.guidance_scale * (size[:images] + size[images:])
            m_error = tolerances.GUIDANCE * m
        d = row[Column.P] * x + row[Column.Q] * m
        d_error = row[Column.P] * x_error + row[Column.Q] * m_error + term * d
        ring = [(d, d_error), *ring[:-1]]
        terms = [(row[Column.A], x, x_error), (row[Column.E], *saved)]
        terms += [(row[Column.B0 + k], *ring[k]) for k in range(HISTORY)]
        terms += [(row[Column.C], np.abs(noise), np.zeros_like(x))]
        if row[Column.SAVE]:
            saved = (x, x_error)
        x = sum((weight * value for weight, value, _ in terms), np.zeros_like(x))
        x_error = sum((weight * error for weight, _, error in terms), term * x)
    return x_error


TABLES = [
    *(
        make_table(name, NoiseSchedule(prediction_type=prediction), STEPS)
        for name in SAMPLERS
        for prediction in PREDICTION_TYPES
    ),
    make_table("ddim", NoiseSchedule(), STEPS, eta=1.0),
    make_table("dpmpp_2m", NoiseSchedule(), STEPS, karras=True),
    make_table("euler", NoiseSchedule(), 1),
    artificial_table(),
]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_whole_run_equals_the_recurrence_in_float64(table: SamplerTable, guided: bool, dtype: str) -> None:
    run = make_run(table, guided=guided, dtype=dtype)
    buffers = make_buffers(run)
    drive(run, buffers)
    error = np.abs(buffers.latents - exact_run(run))
    bound = error_bound(run)
    assert np.all(error <= bound)
    # The bound must itself be small, or it would prove nothing: a wrong coefficient is an error of size 1.
    assert np.max(bound) < tolerances.STEP_BOUND_IS_TIGHT * np.max(np.abs(exact_run(run)))
    assert buffers.counter[0] == len(table.timesteps)
    assert buffers.fault[0] == NO_FAULT


def test_artificial_table_would_notice_every_column() -> None:
    """Each column of the artificial table changes the result; otherwise the test above proves little."""
    run = make_run(artificial_table(), guided=False, dtype="float32")
    result = exact_run(run)
    for column in Column:
        if column in (Column.INPUT_SCALE, Column.X0_X, Column.X0_M, Column.SIGNAL, Column.NOISE):
            continue
        rows = run.table.rows.copy()
        rows[:, column] = 0.0
        other = Run(
            SamplerTable("other", run.table.timesteps, rows, 1.0),
            run.predictions,
            run.start,
            run.noise,
            run.guidance_scale,
        )
        assert np.max(np.abs(exact_run(other) - result)) > 1e-3, column


def scalar_step(buffers: StepBuffers, index: tuple[int, ...]) -> np.float32:
    """The kernel's definition for one element, one float32 operation after the other."""
    step = int(buffers.counter[0])
    row = buffers.rows[step]
    images = len(buffers.latents)
    prediction = buffers.noise_pred.astype(np.float32)
    m = prediction[index]
    if len(prediction) != images:
        conditional = prediction[(index[0] + images, *index[1:])]
        m = m + buffers.guidance_scale[0] * (conditional - m)
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
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_every_bit_is_defined(guided: bool, dtype: str) -> None:
    """A compiled kernel can be compared bit for bit only if the order of operations is the documented one."""
    run = make_run(artificial_table(), guided=guided, dtype=dtype)
    buffers = make_buffers(run)
    for prediction, noise in zip(run.predictions, run.noise, strict=True):
        buffers.noise_pred[...] = prediction
        buffers.noise[...] = noise
        expected = np.array([scalar_step(buffers, index) for index in np.ndindex(SHAPE)])
        guided_step(buffers)
        assert np.array_equal(buffers.latents.ravel(), expected)


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
        assert buffers.timestep[0] == np.float32(table.timesteps[step])
        buffers.noise_pred[...] = run.predictions[step]
        guided_step(buffers)


def test_after_the_last_row_no_input_is_prepared() -> None:
    run = make_run(artificial_table(2), guided=True, dtype="float32")
    buffers = make_buffers(run)
    buffers.counter[0] = len(buffers.timesteps)
    buffers.sample[...] = 77.0
    buffers.timestep[...] = 77.0
    prepare_input(buffers)
    assert np.all(buffers.sample == 77.0)
    assert buffers.timestep[0] == 77.0


def test_table_that_fills_its_buffer_can_be_walked_to_the_end() -> None:
    run = make_run(artificial_table(), guided=True, dtype="float32")
    buffers, trimmed = make_buffers(run), make_buffers(run)
    trimmed.rows, trimmed.timesteps = trimmed.rows[:STEPS].copy(), trimmed.timesteps[:STEPS].copy()
    drive(run, buffers)
    drive(run, trimmed)
    assert np.array_equal(buffers.latents, trimmed.latents)


def test_guidance_of_one_is_the_conditional_half_and_zero_the_other() -> None:
    run = make_run(artificial_table(), guided=True, dtype="float16")
    for scale, half in ((1.0, run.predictions[:, SHAPE[0] :]), (0.0, run.predictions[:, : SHAPE[0]])):
        with_guidance = Run(run.table, run.predictions, run.start, run.noise, scale)
        plain = Run(run.table, half, run.start, run.noise, 1.0)
        buffers = make_buffers(with_guidance)
        drive(with_guidance, buffers)
        error = np.abs(buffers.latents - exact_run(plain))
        assert np.all(error <= error_bound(with_guidance))


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
    buffers = make_buffers(run)

    def addresses() -> dict[str, int]:
        return {field.name: getattr(buffers, field.name).ctypes.data for field in fields(buffers)}

    before = addresses()
    inputs = {name: getattr(buffers, name).copy() for name in ("rows", "timesteps", "guidance_scale")}
    drive(run, buffers)
    assert addresses() == before
    for name, array in inputs.items():
        assert np.array_equal(getattr(buffers, name), array)
    assert np.array_equal(buffers.noise_pred, run.predictions[-1])
