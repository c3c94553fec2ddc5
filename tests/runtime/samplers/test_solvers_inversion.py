"""The table of DDIM inversion: against diffusers, against the table of ddim, and there and back again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler
from support.references.solver_reference import SHAPE, fake_model, normal, relative_error, widened

import tolerances
from sdrt.kernels.sampler_row import Column
from sdrt.runtime.errors import UsageError
from sdrt.runtime.samplers.registry import SAMPLERS, make_table
from sdrt.runtime.samplers.schedule import PREDICTION_TYPES, TIMESTEP_SPACINGS, FloatArray, NoiseSchedule
from sdrt.runtime.samplers.table import run_table
from sdrt.runtime.samplers.timestep import inversion_table

MEAN, STD = 0.5, 0.7


def diffusers_inversion(schedule: NoiseSchedule, steps: int, x: FloatArray) -> tuple[FloatArray, list[int]]:
    """x_T and the timesteps of diffusers' own loop, in float64."""
    scheduler = DDIMInverseScheduler(**schedule.to_dict(), clip_sample=False)
    with widened(scheduler, schedule):
        first = schedule.alphas_cumprod[0]
        scheduler.initial_alpha_cumprod = torch.tensor(1.0 if schedule.set_alpha_to_one else first).double()
        scheduler.set_timesteps(steps)
        at = torch.from_numpy(x)
        for t in scheduler.timesteps:
            m = torch.from_numpy(fake_model(at.numpy(), float(t)))
            at = scheduler.step(m, t, at).prev_sample
    return at.numpy(), scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])  # DDIMInverseScheduler has no linspace
@pytest.mark.parametrize(
    ("prediction_type", "set_alpha_to_one"),
    # Not ("sample", True): diffusers divides 0 by 0, see below.
    [(prediction, False) for prediction in PREDICTION_TYPES] + [("epsilon", True), ("v_prediction", True)],
)
def test_equals_diffusers(prediction_type: str, set_alpha_to_one: bool, spacing: str, steps: int) -> None:
    schedule = NoiseSchedule(
        prediction_type=prediction_type, set_alpha_to_one=set_alpha_to_one, timestep_spacing=spacing
    )
    table = inversion_table(schedule, steps)
    latents = normal(*SHAPE)
    expected, timesteps = diffusers_inversion(schedule, steps, latents)
    assert table.timesteps.tolist() == timesteps
    assert relative_error(run_table(table, fake_model, latents), expected) <= tolerances.SAMPLER_FORMULAS


def test_predicted_sample_begins_with_some_noise() -> None:
    """diffusers gives NaN; ours is its table for ``set_alpha_to_one=False``."""
    schedule = NoiseSchedule(prediction_type="sample", set_alpha_to_one=True)
    with np.errstate(invalid="ignore"):
        assert np.isnan(diffusers_inversion(schedule, 5, normal(*SHAPE))[0]).all()
    ours, other = (inversion_table(replace(schedule, set_alpha_to_one=one), 5) for one in (True, False))
    np.testing.assert_array_equal(ours.rows, other.rows)


@pytest.mark.parametrize("start", [0, 6])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("steps", [7, 20])
def test_undoes_the_steps_of_ddim(steps: int, set_alpha_to_one: bool, spacing: str, start: int) -> None:
    """With one noise in place of the model's, there and back is where it began: at every level, exactly."""
    schedule = NoiseSchedule(timestep_spacing=spacing, set_alpha_to_one=set_alpha_to_one)
    inversion = inversion_table(schedule, steps, start)
    ddim = make_table("ddim", schedule, steps, start=start)
    assert (inversion.start, inversion.num_inference_steps) == (start, steps)
    assert inversion.timesteps.tolist() == ddim.timesteps[::-1].tolist()
    latents, noise = normal(3, seed=1), normal(3, seed=2)
    latest = run_table(inversion, lambda _x, _t: noise, latents)
    np.testing.assert_allclose(run_table(ddim, lambda _x, _t: noise, latest), latents, rtol=1e-11)

    for row, timestep in zip(inversion.rows, inversion.timesteps, strict=True):
        x = row[Column.SIGNAL] * latents + row[Column.NOISE] * noise
        share = schedule.alphas_cumprod[int(timestep)]
        ends = np.sqrt(share) * latents + np.sqrt(1 - share) * noise
        np.testing.assert_allclose(row[Column.A] * x + row[Column.B0] * noise, ends, rtol=1e-11)


def test_levels_are_those_of_x() -> None:
    schedule = NoiseSchedule(set_alpha_to_one=True)
    table = inversion_table(schedule, 4)
    assert table.timesteps.tolist() == [1, 251, 501, 751]
    shares = np.array([1.0, *schedule.alphas_cumprod[[1, 251, 501]]])
    np.testing.assert_allclose(table.rows[:, Column.SIGNAL], np.sqrt(shares), rtol=1e-14)
    np.testing.assert_allclose(table.rows[:, Column.NOISE], np.sqrt(1 - shares), rtol=1e-12)
    assert not table.uses_noise
    assert (table.num_history, table.init_noise_sigma) == (0, 1.0)
    assert table.name not in SAMPLERS


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_finite_without_signal_at_the_end(prediction_type: str, spacing: str) -> None:
    schedule = NoiseSchedule(
        prediction_type=prediction_type, timestep_spacing=spacing, rescale_betas_zero_snr=True
    )
    rows = inversion_table(schedule, 20).rows
    assert np.all(np.isfinite(rows))
    assert rows[-1, Column.A] == 0.0 or spacing == "leading"


def exact_output(schedule: NoiseSchedule, x: FloatArray, timestep: float) -> FloatArray:
    """What the exact model of N(MEAN, STD^2) says of x at a timestep."""
    share = schedule.alphas_cumprod[int(timestep)]
    alpha, sigma = np.sqrt(share), np.sqrt(1 - share)
    noise = (x - alpha * MEAN) * sigma / (share * STD**2 + sigma**2)
    x0 = (x - sigma * noise) / alpha
    v = alpha * noise - sigma * x0
    outputs: dict[str, FloatArray] = {"epsilon": noise, "v_prediction": v, "sample": x0}
    return outputs[schedule.prediction_type]


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_there_and_back_again_converges(prediction_type: str, set_alpha_to_one: bool) -> None:
    """On the exact model of a Gaussian the error of inversion and sampling falls at first order.

    As a real model, it is told each row's timestep and does not know that x is one step below it.
    """
    schedule = NoiseSchedule(
        prediction_type=prediction_type, set_alpha_to_one=set_alpha_to_one, steps_offset=0
    )
    latents = np.linspace(-2.0, 3.0, 11)

    def model(x: FloatArray, timestep: float) -> FloatArray:
        return exact_output(schedule, x, timestep)

    def error(steps: int) -> float:
        noise = run_table(inversion_table(schedule, steps), model, latents)
        return relative_error(run_table(make_table("ddim", schedule, steps), model, noise), latents)

    assert error(50) < 0.1
    order = np.log(error(50) / error(200)) / np.log(4)
    assert order >= 1 - tolerances.SAMPLER_ORDER
    # A sample predicted for the wrong level is divided by the lowest sigma, which 200 steps do not resolve.
    if prediction_type != "sample":
        assert order == pytest.approx(1.0, abs=tolerances.SAMPLER_ORDER)


@pytest.mark.parametrize(
    ("steps", "start", "message"),
    [
        (0, 0, "num_inference_steps is 0: allowed are whole numbers from 1 to 1000"),
        (2.5, 0, "num_inference_steps is 2.5"),
        (20, 20, "start is 20: allowed are whole numbers from 0 to 19"),
        (20, -1, "start is -1"),
    ],
)
def test_refuses(steps: int, start: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        inversion_table(NoiseSchedule(), steps, start)
