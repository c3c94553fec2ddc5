"""Runs of the step kernel that its tests share: tables, predictions that do not depend on x, buffers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.guidance_rescale import guidance_rescale
from sdrt.kernels.guided_step import NO_FAULT, StepBuffers, guided_step, prepare_input
from sdrt.kernels.sampler_row import COLUMNS, HISTORY, Column
from sdrt.runtime.samplers.registry import SAMPLERS, make_table
from sdrt.runtime.samplers.schedule import FloatArray, NoiseSchedule
from sdrt.runtime.samplers.table import SamplerTable

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
    guidance: FloatArray  # [n], w of each row
    image_guidance: float = 1.5  # v of all rows, where the predictions have three parts

    @property
    def guided(self) -> FloatArray:
        """The predictions after guidance in float64, [n, N, C, h, w]."""
        exact = self.predictions.astype(np.float64)
        images = len(self.start)
        if exact.shape[1] == images:
            return exact
        unconditional, picture, conditional = exact[:, :images], exact[:, images:-images], exact[:, -images:]
        w = self.guidance[:, None, None, None, None]
        result: FloatArray
        if exact.shape[1] == 2 * images:
            result = unconditional + w * (conditional - unconditional)
        else:
            result = unconditional + w * (conditional - picture)
            result += self.image_guidance * (picture - unconditional)
        return result


def artificial_table(steps: int = STEPS) -> SamplerTable:
    """A table that uses every column of a sampler, as no sampler of this version does."""
    random = np.random.default_rng(5)
    rows = random.uniform(-0.5, 0.5, (steps, COLUMNS))
    rows[:, Column.INPUT_SCALE] = random.uniform(0.1, 1.0, steps)
    rows[:, Column.SAVE] = np.arange(steps) % 3 == 0
    rows[1::3, Column.E] = 0.0
    rows[2::4, Column.C] = 0.0
    rows[:, Column.GUIDANCE] = 0.0
    return SamplerTable(np.linspace(990.5, 1.25, steps), rows, 1.0, name="artificial")


TABLES = [
    *(make_table(name, NoiseSchedule(), STEPS) for name in SAMPLERS),
    make_table("ddim", NoiseSchedule(), STEPS, eta=1.0),
    make_table("dpmpp_2m", NoiseSchedule(), STEPS, karras=True),
    make_table("euler", NoiseSchedule(), 1),
    artificial_table(),
]


def make_run(
    table: SamplerTable,
    *,
    guided: bool,
    dtype: str,
    shape: tuple[int, int, int, int] = SHAPE,
    parts: int = 2,
) -> Run:
    """Random numbers for a whole run of N, C, h, w = ``shape``; ``parts`` are what guidance combines."""
    random = np.random.default_rng(3)
    rows = parts * shape[0] if guided else shape[0]
    steps = len(table.timesteps)
    return Run(
        table,
        random.standard_normal((steps, rows, *shape[1:])).astype(dtype),
        (random.standard_normal(shape) * table.init_noise_sigma).astype(np.float32),
        random.standard_normal((steps, *shape)).astype(np.float32),
        7.5 - 0.25 * np.arange(steps, dtype=np.float64),
    )


def make_buffers(
    run: Run,
    *,
    inpainting: bool = False,
    count: bool = True,
    phi: float | None = None,
    denoised: bool = False,
) -> StepBuffers:
    """Buffers at the start of a run.

    Args:
        run: Whose.
        inpainting: With a mask whose values are 0, 1 and between.
        count: Whether the rows in use are counted; otherwise the spare rows are walked too.
        phi: Of the rescaling of guidance; None for none.
        denoised: Whether the guess of the clean latents is kept.
    """
    steps = len(run.table.timesteps)
    rows = np.zeros((steps + SPARE_ROWS, COLUMNS), np.float32)
    rows[:steps] = run.table.rows
    rows[:steps, Column.GUIDANCE] = run.guidance
    rows[:steps, Column.IMAGE_GUIDANCE] = run.image_guidance
    timesteps = np.zeros(steps + SPARE_ROWS, np.float32)
    timesteps[:steps] = run.table.timesteps
    shape = run.start.shape
    buffers = StepBuffers(
        noise_pred=np.zeros_like(run.predictions[0]),
        latents=run.start.copy(),
        history=np.zeros((HISTORY, *shape), np.float32),
        saved=np.zeros(shape, np.float32),
        noise=np.zeros(shape, np.float32),
        rows=rows,
        timesteps=timesteps,
        counter=np.zeros(1, np.int32),
        fault=np.full(1, NO_FAULT, np.int32),
        sample=np.zeros_like(run.predictions[0]),
        timestep=np.zeros(len(run.predictions[0]), np.float32),
        ticket=np.zeros(1, np.uint32),
        count=np.array([steps], np.int32) if count else None,
    )
    if inpainting:
        random = np.random.default_rng(11)
        mask = random.uniform(-0.5, 1.5, (shape[0], 1, *shape[2:])).clip(0, 1).astype(np.float32)
        known, known_noise = random.standard_normal((2, *shape)).astype(np.float32)
        buffers = dataclasses.replace(buffers, mask=mask, known=known, known_noise=known_noise)
    if phi is not None:
        buffers.guidance_rescale, buffers.factors = np.array([phi], np.float32), np.ones(shape[0], np.float32)
    if denoised:
        buffers.denoised = np.zeros(shape, np.float32)
    return buffers


def arrays(buffers: StepBuffers) -> dict[str, NDArray[Any]]:
    """Name → array of those that are there."""
    named = {field.name: getattr(buffers, field.name) for field in dataclasses.fields(buffers)}
    return {name: array for name, array in named.items() if array is not None}


def copied(buffers: StepBuffers) -> StepBuffers:
    """The same numbers in other memory."""
    return dataclasses.replace(buffers, **{name: array.copy() for name, array in arrays(buffers).items()})


def drive(
    run: Run,
    buffers: StepBuffers,
    step: Callable[[StepBuffers], None] = guided_step,
    prepare: Callable[[StepBuffers], None] = prepare_input,
    rescale: Callable[[StepBuffers], None] = guidance_rescale,
) -> None:
    """All steps, with the U-Net's part played by the run's predictions; rescaled if there are factors."""
    prepare(buffers)
    for prediction, noise in zip(run.predictions, run.noise, strict=True):
        buffers.noise_pred[...] = prediction
        buffers.noise[...] = noise
        if buffers.factors is not None:
            rescale(buffers)
        step(buffers)


def same_bits(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Equal shape, dtype and bits; but any NaN equals any other, since no standard fixes their bits."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    bits = f"u{one.dtype.itemsize}"
    equal = one.view(bits) == other.view(bits)
    return bool(np.all(equal | (np.isnan(one) & np.isnan(other))))
