"""The step's blend with known latents: what is kept, what is drawn, and what lies between."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from support.runs.step_runs import STEPS, Run, artificial_table, copied, drive, make_buffers, make_run

import tolerances
from sdrt.kernels.guided_step import StepBuffers, guided_step
from sdrt.kernels.sampler_row import Column
from sdrt.runtime.samplers.registry import make_table
from sdrt.runtime.samplers.schedule import NoiseSchedule


def parts(buffers: StepBuffers) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Mask, known latents, their noise."""
    assert buffers.mask is not None
    assert buffers.known is not None
    assert buffers.known_noise is not None
    return buffers.mask, buffers.known, buffers.known_noise


def take_step(run: Run, buffers: StepBuffers, step: int) -> None:
    buffers.noise_pred[...] = run.predictions[step]
    buffers.noise[...] = run.noise[step]
    guided_step(buffers)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_where_nothing_is_drawn_x_is_the_known_at_the_next_rows_level(sampler: str) -> None:
    table = make_table(sampler, NoiseSchedule(), STEPS)
    run = make_run(table, guided=True, dtype="float16")
    buffers = make_buffers(run, inpainting=True)
    mask, known, noise = parts(buffers)
    mask[...] = 0.0
    for step in range(STEPS):
        take_step(run, buffers, step)
        if step + 1 < STEPS:
            row = table.rows[step + 1]
            level = row[Column.SIGNAL] * known.astype(np.float64) + row[Column.NOISE] * noise.astype(
                np.float64
            )
            size = np.abs(row[Column.SIGNAL] * known) + np.abs(row[Column.NOISE] * noise)
            assert np.all(np.abs(buffers.latents - level) <= tolerances.BLEND * size)
    assert np.array_equal(buffers.latents, known)


def test_where_all_is_drawn_the_mask_changes_nothing() -> None:
    run = make_run(artificial_table(), guided=True, dtype="float32")
    plain, masked = make_buffers(run), make_buffers(run, inpainting=True)
    parts(masked)[0][...] = 1.0
    drive(run, plain)
    drive(run, masked)
    assert np.array_equal(plain.latents, masked.latents)
    assert np.array_equal(plain.sample, masked.sample)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_every_blend_equals_its_formula_in_float64(guided: bool) -> None:
    """Each step is taken twice from one state, with and without the mask; the blend is what differs."""
    run = make_run(artificial_table(), guided=guided, dtype="float16")
    buffers = make_buffers(run, inpainting=True)
    mask, known, noise = (array.astype(np.float64) for array in parts(buffers))
    assert np.any(mask == 0)
    assert np.any(mask == 1)
    assert np.any((mask > 0) & (mask < 1))
    for step in range(STEPS):
        plain = copied(buffers)
        plain.mask = None
        take_step(run, plain, step)
        take_step(run, buffers, step)
        signal, sigma = 1.0, 0.0
        if step + 1 < STEPS:
            signal, sigma = buffers.rows[step + 1, [Column.SIGNAL, Column.NOISE]].astype(np.float64)
        x = plain.latents.astype(np.float64)
        wanted = mask * x + (1 - mask) * (signal * known + sigma * noise)
        size = mask * np.abs(x) + (1 - mask) * (np.abs(signal * known) + np.abs(sigma * noise))
        assert np.all(np.abs(buffers.latents - wanted) <= tolerances.BLEND * size)
        assert np.array_equal(buffers.history, plain.history)  # d is of the U-Net, not of the blend


def test_one_mask_serves_all_channels_of_its_image() -> None:
    run = make_run(artificial_table(1), guided=False, dtype="float32")
    buffers = make_buffers(run, inpainting=True)
    mask, known, _ = parts(buffers)
    mask[...] = 1.0
    mask[1, 0, 2, 3] = 0.0
    plain = copied(buffers)
    plain.mask = None
    take_step(run, plain, 0)
    take_step(run, buffers, 0)
    changed = np.argwhere(buffers.latents != plain.latents)
    assert changed.tolist() == [[1, channel, 2, 3] for channel in range(known.shape[1])]
