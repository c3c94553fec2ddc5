"""EDM models: every sampler that has sigmas against what it does to a model of training timesteps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.references.solver_reference import SHAPE, fake_model, normal, relative_error

import tolerances
from sdrt.kernels.sampler_row import Column
from sdrt.runtime.errors import UsageError
from sdrt.runtime.samplers.edm import EDM_PREDICTION_TYPES, EdmScaling
from sdrt.runtime.samplers.registry import SAMPLERS, make_table
from sdrt.runtime.samplers.schedule import FloatArray, NoiseSchedule, sigma_from_timestep, timestep_from_sigma
from sdrt.runtime.samplers.sigma_sequences import edm_sigmas, exponential_sigmas, karras_sigmas
from sdrt.runtime.samplers.table import SamplerOptions, SamplerTable, run_table
from sdrt.runtime.samplers.timestep import inversion_table

EDM = EdmScaling(sigma_min=0.1, sigma_max=10.0, sigma_data=0.7)
ABLE = [name for name in SAMPLERS if "sigmas" in SAMPLERS[name].options]
SIGMAS = (10.0, 6.0, 3.0, 1.5, 0.6, 0.1, 0.0)


def edm(prediction_type: str = "epsilon") -> NoiseSchedule:
    return NoiseSchedule(edm=EDM, prediction_type=prediction_type)


def run(table: SamplerTable, prediction_type: str, *, preconditioned: bool) -> FloatArray:
    """A run, from a given variance-exploding x, on one and the same denoiser of clean latents.

    The denoiser is put in the words of the table's model: EDM's, or the noise of a variance-preserving x.
    """
    sigmas = np.exp(4 * table.timesteps) if preconditioned else table.sigmas
    rows = zip(table.rows, sigmas, strict=True)

    def model(z: FloatArray, _timestep: float) -> FloatArray:
        row, sigma = next(rows)
        x = z / row[Column.INPUT_SCALE] / row[Column.SIGNAL]
        x0 = fake_model(x / np.hypot(sigma, 1.0), 100 * sigma)
        if not preconditioned:
            return np.asarray((x - x0) / sigma)
        skip, out = EDM.denoised(np.array(sigma), prediction_type)
        return np.asarray((x0 - skip * x) / out)

    x = normal(*SHAPE) * SIGMAS[0] * table.rows[0, Column.SIGNAL]
    return run_table(table, model, x, normal(len(table), *SHAPE, seed=1))


@pytest.mark.parametrize("prediction_type", EDM_PREDICTION_TYPES)
@pytest.mark.parametrize(
    "name", [name for name in ABLE if name != "deis"]
)  # which ends with noise, see below
def test_a_sampler_does_the_same_to_the_same_denoiser(name: str, prediction_type: str) -> None:
    """What is equal to diffusers' on timesteps is right on EDM's scalings, also where diffusers has none."""
    options = SamplerOptions(sigmas=SIGMAS)
    usual = make_table(name, NoiseSchedule(), None, options)
    ours = make_table(name, edm(prediction_type), None, options)
    expected = run(usual, "epsilon", preconditioned=False)
    result = run(ours, prediction_type, preconditioned=True)
    assert relative_error(result, expected) <= tolerances.SAMPLER_FORMULAS
    assert ours.init_noise_sigma == pytest.approx(np.hypot(10.0, 1.0))


@pytest.mark.parametrize("name", ABLE)
def test_the_model_sees_its_own_scale_and_is_told_a_quarter_of_log_sigma(name: str) -> None:
    table = make_table(name, edm(), 7)
    sigmas = np.sqrt(1 / table.rows[:, Column.INPUT_SCALE] ** 2 - 0.7**2)
    assert np.all(table.rows[:, Column.SIGNAL] == 1.0)
    np.testing.assert_allclose(table.timesteps, np.log(sigmas) / 4)
    # The rows that begin a step; within one the level is that of what is kept, at the step's end.
    begins = slice(None, None, 1 if len(table) == 7 else 2)
    np.testing.assert_allclose(table.rows[begins, Column.NOISE], sigmas[begins])
    assert (sigmas[0], sigmas[-1]) == (pytest.approx(10.0), pytest.approx(0.1))


def test_levels_lie_as_the_model_says() -> None:
    np.testing.assert_array_equal(edm_sigmas(EDM, 9), karras_sigmas(9, 0.1, 10.0))
    flat = replace(EDM, rho=1.0)
    np.testing.assert_allclose(edm_sigmas(flat, 9), np.linspace(10.0, 0.1, 9))
    other = replace(EDM, sigma_schedule="exponential")
    np.testing.assert_array_equal(edm_sigmas(other, 9), exponential_sigmas(9, 0.1, 10.0))


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ABLE])
def test_a_sampler_between_training_timesteps_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name} goes from .* this model has none .* use deis, dpm2"):
        make_table(name, edm(), 5)


def test_timesteps_of_training_are_refused() -> None:
    with pytest.raises(UsageError, match="timesteps: this model has no training timesteps"):
        make_table("euler", edm(), None, SamplerOptions(timesteps=(9, 3)))
    with pytest.raises(UsageError, match="spacing: this model"):
        make_table("euler", edm(), 5, SamplerOptions(spacing="trailing"))
    with pytest.raises(UsageError, match=r"inversion .* this model has none"):
        inversion_table(edm(), 5)


def test_sigmas_and_timesteps_of_others_are_as_they_were() -> None:
    schedule = NoiseSchedule()
    at = timestep_from_sigma(schedule, np.array([1.0]))
    assert sigma_from_timestep(schedule, at) == pytest.approx(1.0, rel=1e-3)
    assert schedule.sigma_range == (schedule.sigmas[0], schedule.sigmas[-1])
    assert edm().sigma_range == (0.1, 10.0)
