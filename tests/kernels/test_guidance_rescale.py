"""Rescaled guidance against diffusers' function in float64, and what it gives where that has no answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.runs.step_runs import Run, artificial_table, make_buffers, make_run

import tolerances
from sdrt.kernels.guidance_rescale import LANES, guidance_rescale
from sdrt.kernels.guided_step import StepBuffers, guided_step
from sdrt.kernels.sampler_row import COLUMNS, Column
from sdrt.runtime.samplers.schedule import FloatArray
from sdrt.runtime.samplers.table import SamplerTable

SHAPES = [(2, 3, 4, 5), (2, 4, 17, 16)]  # fewer elements than lanes, and no multiple of them
assert np.prod(SHAPES[1][1:]) > LANES


def through_run(*, dtype: str, shape: tuple[int, int, int, int], offset: float = 0.0) -> Run:
    """A run of one row whose result is the prediction."""
    rows = np.zeros((1, COLUMNS))
    rows[:, [Column.Q, Column.B0]] = 1.0
    run = make_run(SamplerTable(np.ones(1), rows, 1.0), guided=True, dtype=dtype, shape=shape)
    return replace(run, predictions=(run.predictions + np.array(offset)).astype(dtype))


def rescaled(run: Run, phi: float) -> StepBuffers:
    buffers = make_buffers(run, phi=phi)
    buffers.noise_pred[...] = run.predictions[0]
    guidance_rescale(buffers)
    guided_step(buffers)
    return buffers


def factors_of(buffers: StepBuffers) -> FloatArray:
    assert buffers.factors is not None
    return buffers.factors.astype(np.float64)


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=["small", "large"])
def test_it_is_diffusers_function(
    shape: tuple[int, int, int, int], dtype: str, offset: float, phi: float
) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    run = through_run(dtype=dtype, shape=shape, offset=offset)
    phi = float(np.float32(phi))
    buffers = rescaled(run, phi)
    guided, exact = run.guided[0], run.predictions[0].astype(np.float64)
    unconditional, conditional = np.split(exact, 2)
    expected = rescale_noise_cfg(torch.from_numpy(guided), torch.from_numpy(conditional), phi).numpy()

    factors = factors_of(buffers)[:, None, None, None]
    guided_error = tolerances.GUIDANCE * (
        np.abs(unconditional) + run.guidance[0] * (np.abs(unconditional) + np.abs(conditional))
    )
    axes = (1, 2, 3)
    std_error = np.sqrt(np.mean(guided_error**2, axes)) / np.std(guided, axes)
    factor_error = tolerances.RESCALE_FACTOR + std_error[:, None, None, None]
    bound = factors * (guided_error + np.abs(guided) * (factor_error + tolerances.RESCALE_PRODUCT))
    assert np.all(np.abs(buffers.latents - expected) <= bound)
    if phi:
        assert np.all(
            np.abs(expected - guided).max(axes) > 100 * bound.max(axes)
        )  # the bound tells them apart
        assert np.all(factors < 0.9)


def test_without_a_share_nothing_changes() -> None:
    run = through_run(dtype="float16", shape=SHAPES[0])
    buffers, plain = rescaled(run, 0.0), make_buffers(run)
    plain.noise_pred[...] = run.predictions[0]
    guided_step(plain)
    assert np.all(factors_of(buffers) == 1.0)
    assert np.array_equal(buffers.latents, plain.latents)


def test_images_of_a_batch_do_not_touch_each_other() -> None:
    run = through_run(dtype="float32", shape=SHAPES[1])
    louder = run.predictions.copy()
    louder[:, 1] *= 3  # the unconditional half of the second image
    before, after = (factors_of(rescaled(one, 0.7)) for one in (run, replace(run, predictions=louder)))
    assert before[0] == after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_a_prediction_that_is_one_number_stays_as_it_is(value: float) -> None:
    """Its standard deviation is exactly 0, whatever the rounding of sums: the factor is 1, not NaN."""
    run = through_run(dtype="float16", shape=SHAPES[1])
    run = replace(run, predictions=np.full_like(run.predictions, value))
    buffers = rescaled(run, 0.7)
    assert np.all(factors_of(buffers) == 1.0)
    assert np.allclose(buffers.latents, np.float16(value), rtol=tolerances.GUIDANCE * 16, atol=0)


def test_one_number_alone_that_differs_is_seen() -> None:
    """The worst case of sums of differences from the first element: the first is the one that differs."""
    run = through_run(dtype="float32", shape=(1, 4, 64, 64))
    predictions = np.zeros_like(run.predictions)
    predictions[0, :, 0, 0, 0] = 1e4, 3e4  # u, c
    buffers = rescaled(replace(run, predictions=predictions), 1.0)
    guided = 1e4 + run.guidance[0] * 2e4
    assert factors_of(buffers)[0] == pytest.approx(3e4 / guided, rel=tolerances.RESCALE_FACTOR)


def test_after_the_last_row_nothing_is_written() -> None:
    run = make_run(artificial_table(2), guided=True, dtype="float32")
    buffers = make_buffers(run, phi=0.7)
    assert buffers.factors is not None
    buffers.counter[0] = 2
    buffers.factors[...] = 77.0
    guidance_rescale(buffers)
    assert np.all(buffers.factors == 77.0)
