"""Every sampler's table against diffusers' scheduler, against theory, and with bad arguments."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import tolerances
from sdrt.kernels.sampler_row import COLUMNS, HISTORY, Column
from sdrt.runtime.errors import UsageError
from sdrt.runtime.schedule import PREDICTION_TYPES, TIMESTEP_SPACINGS, FloatArray, NoiseSchedule
from sdrt.runtime.solvers import SAMPLERS, SamplerTable, make_table, run_table

Model = Callable[[FloatArray, float], FloatArray]

STEPS = (1, 2, 5, 20, 50)
SAMPLER_OPTIONS = [
    ("ddim", False),
    ("euler", False),
    ("euler", True),
    ("dpmpp_2m", False),
    ("dpmpp_2m", True),
]
SHAPE = (2, 4, 8, 8)


def fake_model(x: FloatArray, timestep: float) -> FloatArray:
    """Smooth, nonlinear, bounded, different at every pixel and timestep."""
    t = timestep / 1000
    neighbour = np.roll(x, 1, axis=-1)
    m: FloatArray = np.tanh(0.9 * x + 0.4 * t) + 0.3 * np.sin(1.5 * neighbour - 2.0 * t) * np.cos(t)
    return m


def normal(*shape: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(shape)


def diffusers_scheduler(name: str, schedule: NoiseSchedule, *, karras: bool) -> Any:
    config = schedule.to_dict()
    alpha_to_one = config.pop("set_alpha_to_one")
    if name == "ddim":
        return DDIMScheduler(**config, set_alpha_to_one=alpha_to_one, clip_sample=False)
    if name == "euler":
        return EulerDiscreteScheduler(**config, use_karras_sigmas=karras)
    return DPMSolverMultistepScheduler(**config, use_karras_sigmas=karras)


def diffusers_run(
    scheduler: Any, model: Model, noise: FloatArray, step_noise: FloatArray | None, **options: Any
) -> FloatArray:
    """diffusers' own loop from its own initial noise, on float64 tensors."""
    x = torch.from_numpy(noise) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        z = scheduler.scale_model_input(x, t)
        m = torch.from_numpy(model(z.numpy(), float(t)))
        if step_noise is not None:
            options["variance_noise"] = torch.from_numpy(step_noise[i])
        x = scheduler.step(m, t, x, **options).prev_sample
    result: FloatArray = x.numpy()
    return result


def relative_error(value: FloatArray, expected: FloatArray) -> float:
    """Largest difference as a share of the largest expected value."""
    assert np.all(np.isfinite(expected))
    return float(np.max(np.abs(value - expected)) / np.max(np.abs(expected)))


def compare(
    name: str, schedule: NoiseSchedule, steps: int, *, karras: bool = False, eta: float = 0.0
) -> float:
    """Relative error of a whole run of the table against diffusers' run; checks timesteps as well."""
    scheduler = diffusers_scheduler(name, schedule, karras=karras)
    scheduler.set_timesteps(steps)
    if name != "ddim":  # else diffusers starts at the wrong row where the first timestep is twice there
        scheduler.set_begin_index(0)
    noise, step_noise = normal(*SHAPE), normal(steps, *SHAPE, seed=1) if eta else None
    options = {"eta": eta} if name == "ddim" else {}
    expected = diffusers_run(scheduler, fake_model, noise, step_noise, **options)

    table = make_table(name, schedule, steps, karras=karras, eta=eta)
    assert_timesteps_equal(table, scheduler)
    start = table.init_noise_sigma * noise
    return relative_error(run_table(table, fake_model, start, step_noise), expected)


def assert_timesteps_equal(table: SamplerTable, scheduler: Any) -> None:
    atol = tolerances.SAMPLER_TIMESTEPS if table.name == "euler" else 0.0
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), rtol=0, atol=atol)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("name", "karras"), SAMPLER_OPTIONS)
def test_equals_diffusers(name: str, karras: bool, prediction_type: str, spacing: str, steps: int) -> None:
    schedule = NoiseSchedule(prediction_type=prediction_type, timestep_spacing=spacing)
    assert compare(name, schedule, steps, karras=karras) <= tolerances.SAMPLER_RUN


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
        NoiseSchedule(beta_schedule="squaredcos_cap_v2"),
        NoiseSchedule(set_alpha_to_one=True, steps_offset=0),
        NoiseSchedule(num_train_timesteps=100),
        NoiseSchedule(num_train_timesteps=200, trained_betas=tuple(np.geomspace(1e-4, 0.2, 200).tolist())),
    ],
    ids=["linear", "cosine", "alpha-to-one", "100-timesteps", "trained-betas"],
)
def test_equals_diffusers_on_other_schedules(
    name: str, prediction_type: str, schedule: NoiseSchedule
) -> None:
    schedule = replace(schedule, prediction_type=prediction_type)
    assert compare(name, schedule, 20) <= tolerances.SAMPLER_RUN


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_with_noise_equals_diffusers(prediction_type: str, eta: float, spacing: str) -> None:
    schedule = NoiseSchedule(prediction_type=prediction_type, timestep_spacing=spacing)
    assert make_table("ddim", schedule, 20, eta=eta).uses_noise
    assert compare("ddim", schedule, 20, eta=eta) <= tolerances.SAMPLER_RUN


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_ddim_equals_diffusers_in_float64(spacing: str, prediction_type: str) -> None:
    """The one scheduler that rounds nothing but its table: with a float64 one, nothing is float32."""
    schedule = NoiseSchedule(prediction_type=prediction_type, timestep_spacing=spacing)
    scheduler = diffusers_scheduler("ddim", schedule, karras=False)
    scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod.copy())
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(50)
    noise, step_noise = normal(*SHAPE), normal(50, *SHAPE, seed=1)
    expected = diffusers_run(scheduler, fake_model, noise, step_noise, eta=0.5)
    result = run_table(make_table("ddim", schedule, 50, eta=0.5), fake_model, noise, step_noise)
    assert relative_error(result, expected) <= tolerances.SAMPLER_RUN_FLOAT64


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize(("name", "karras"), SAMPLER_OPTIONS)
def test_timesteps_equal_diffusers_for_many_counts(
    name: str, karras: bool, spacing: str, beta_schedule: str
) -> None:
    schedule = NoiseSchedule(timestep_spacing=spacing, beta_schedule=beta_schedule)
    scheduler = diffusers_scheduler(name, schedule, karras=karras)
    for steps in [*range(2, 60, 3), 48, 96, 250, 333, 500]:  # 61 is a case of its own in diffusers
        scheduler.set_timesteps(steps)
        assert_timesteps_equal(make_table(name, schedule, steps, karras=karras), scheduler)


@pytest.mark.parametrize(("name", "karras"), SAMPLER_OPTIONS)
def test_start_equals_image_to_image_of_diffusers(name: str, karras: bool) -> None:
    schedule, steps, start = NoiseSchedule(), 20, 7
    scheduler = diffusers_scheduler(name, schedule, karras=karras)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[start:]
    if name != "ddim":
        scheduler.set_begin_index(start)
    image, noise = normal(*SHAPE, seed=2), normal(*SHAPE, seed=3)
    begin = scheduler.add_noise(torch.from_numpy(image), torch.from_numpy(noise), timesteps[:1])

    table = make_table(name, schedule, steps, karras=karras, start=start)
    x = table.rows[0, Column.SIGNAL] * image + table.rows[0, Column.NOISE] * noise
    assert relative_error(x, begin.numpy()) <= tolerances.SAMPLER_RUN

    expected = begin
    for t in timesteps:
        z = scheduler.scale_model_input(expected, t)
        m = torch.from_numpy(fake_model(z.numpy(), float(t)))
        expected = scheduler.step(m, t, expected).prev_sample
    result = run_table(table, fake_model, x)
    assert len(table.rows) == steps - start
    assert relative_error(result, expected.numpy()) <= tolerances.SAMPLER_RUN


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("name", "karras"), SAMPLER_OPTIONS)
def test_x0_columns_find_the_clean_latents(name: str, karras: bool, prediction_type: str) -> None:
    """From SIGNAL, NOISE and an exact model output, X0_X and X0_M give x0 back at every row."""
    schedule = NoiseSchedule(prediction_type=prediction_type)
    x0, noise = normal(*SHAPE, seed=4), normal(*SHAPE, seed=5)
    table = make_table(name, schedule, 20, karras=karras)
    for row in table.rows:
        x = row[Column.SIGNAL] * x0 + row[Column.NOISE] * noise
        scale = row[Column.INPUT_SCALE]
        alpha, sigma = scale * row[Column.SIGNAL], scale * row[Column.NOISE]
        assert alpha**2 + sigma**2 == pytest.approx(1.0)
        m = noise if prediction_type == "epsilon" else alpha * noise - sigma * x0
        np.testing.assert_allclose(row[Column.X0_X] * x + row[Column.X0_M] * m, x0, atol=1e-11)


def test_recurrence_reads_history_saved_and_noise() -> None:
    """run_table against the formula written out, on rows that use every column."""
    rng = np.random.default_rng(6)
    rows = rng.uniform(-1, 1, (4, COLUMNS))
    rows[:, Column.SAVE] = [0, 1, 0, 0]
    table = SamplerTable("made up", np.array([30.0, 20.0, 10.0, 0.5]), rows, 1.0)
    noise, x = rng.standard_normal((4, 3)), rng.standard_normal(3)
    assert (table.num_history, table.uses_noise) == (HISTORY - 1, True)

    xs, ds = [x], []
    for i, (scale, p, q, a, *b, e, c, _, _, _, _, _) in enumerate(rows):
        ds.append(p * xs[i] + q * fake_model(scale * xs[i], table.timesteps[i]))
        past = sum(b[k] * ds[i - k] for k in range(i + 1))
        saved = xs[1] if i > 1 else 0.0
        xs.append(a * xs[i] + past + e * saved + c * noise[i])
    np.testing.assert_allclose(run_table(table, fake_model, x, noise), xs[-1], rtol=1e-14)


def test_tables_say_what_they_need() -> None:
    schedule = NoiseSchedule()
    needs = {name: make_table(name, schedule, 5).num_history for name in SAMPLERS}
    assert needs == {"ddim": 0, "euler": 0, "dpmpp_2m": 1}
    assert not any(make_table(name, schedule, 5).uses_noise for name in SAMPLERS)
    table = make_table("euler", schedule, 5)
    assert table.rows.shape == (5, COLUMNS)
    assert table.rows.dtype == table.timesteps.dtype == np.float64
    for array in (table.rows, table.timesteps):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.0
    with pytest.raises(UsageError, match="adds noise"):
        run_table(make_table("ddim", schedule, 2, eta=1.0), fake_model, normal(3))


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize(("name", "karras"), SAMPLER_OPTIONS)
def test_finite_for_every_count(name: str, karras: bool, spacing: str) -> None:
    schedule = NoiseSchedule(num_train_timesteps=100, timestep_spacing=spacing, steps_offset=0)
    most = 99 if (name, spacing) == ("dpmpp_2m", "leading") and not karras else 100
    for steps in range(1, most + 1):
        table = make_table(name, schedule, steps, karras=karras)
        assert len(table.rows) == len(table.timesteps) == steps
        assert np.all(np.isfinite(table.rows))
        assert np.all((table.timesteps >= 0) & (table.timesteps <= 99))
        assert np.all(np.diff(table.timesteps) <= 0)


def gaussian_error(table: SamplerTable, prediction_type: str, std: float, x: FloatArray) -> float:
    """Error of a run with the exact model of N(0, std^2) data, up to the last row's noise level.

    The probability-flow ODE of a Gaussian keeps x0 + sigma * noise at the same quantile: it shrinks
    from sigma to sigma' by sqrt((std^2 + sigma'^2) / (std^2 + sigma^2)) (Karras et al. 2022, eq. 4).
    """
    alphas = table.rows[:, Column.INPUT_SCALE] * table.rows[:, Column.SIGNAL]
    sigmas = table.rows[:, Column.NOISE] / table.rows[:, Column.SIGNAL]
    rows = iter(zip(alphas, alphas * sigmas, strict=True))

    def model(z: FloatArray, _timestep: float) -> FloatArray:
        alpha, sigma = next(rows)
        gain = 1 / (alpha**2 * std**2 + sigma**2)
        noise: FloatArray = sigma * gain * z
        x0: FloatArray = alpha * std**2 * gain * z
        return noise if prediction_type == "epsilon" else alpha * noise - sigma * x0

    most = replace(table, timesteps=table.timesteps[:-1], rows=table.rows[:-1])
    first, last = table.rows[0, Column.SIGNAL], table.rows[-1, Column.SIGNAL]
    shrink = np.sqrt((std**2 + sigmas[-1] ** 2) / (std**2 + sigmas[0] ** 2))
    exact = last * shrink * (x / first)
    return relative_error(run_table(most, model, x), exact)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("name", "karras", "order"),
    [("ddim", False, 1), ("euler", False, 1), ("euler", True, 1), ("dpmpp_2m", True, 2)],
)
@settings(max_examples=20, deadline=None)
@given(std=st.floats(0.5, 2.0), x=st.floats(0.1, 3.0), negative=st.booleans())
def test_converges_at_its_order(
    name: str, karras: bool, order: int, prediction_type: str, std: float, x: float, negative: bool
) -> None:
    """Four times the steps divide the error by 4 to the power of the order."""
    schedule = NoiseSchedule(prediction_type=prediction_type, set_alpha_to_one=True, steps_offset=0)
    start = np.array([-x if negative else x])
    few, many = (
        gaussian_error(make_table(name, schedule, steps, karras=karras), prediction_type, std, start)
        for steps in (50, 200)
    )
    assert few / many == pytest.approx(4**order, rel=tolerances.SAMPLER_ORDER)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0: allowed are .* 1 to 1000"),
        ({"num_inference_steps": 10**6}, "num_inference_steps is 1000000"),
        ({"num_inference_steps": -3}, "from 1 to 1000"),
        ({"num_inference_steps": 2.5}, "whole numbers"),
        ({"num_inference_steps": True}, "whole numbers"),
        ({"num_inference_steps": 1000}, "steps do not fit .* ask for fewer"),
        ({"name": "eular"}, "did you mean euler.* allowed are ddim, dpmpp_2m, euler"),
        ({"name": "DPM++ 2M"}, "did you mean dpmpp_2m"),
        ({"name": "dpmpp_2m_karras"}, "did you mean dpmpp_2m"),
        ({"name": "zzz"}, "unknown sampler 'zzz': allowed are"),
        ({"karras": True}, "ddim has no karras: use it with dpmpp_2m, euler"),
        ({"name": "euler", "eta": 0.5}, "euler has no eta: use it with ddim"),
        ({"eta": float("nan")}, "eta is nan: allowed are numbers from 0 to 1"),
        ({"eta": float("inf")}, "eta is inf"),
        ({"eta": -0.1}, "eta is -0.1"),
        ({"start": 20}, "start is 20: allowed are whole numbers from 0 to 19"),
        ({"start": -1}, "start is -1"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    given_arguments = {"name": "ddim", "num_inference_steps": 20, **arguments}
    with pytest.raises(UsageError, match=message):
        make_table(schedule=NoiseSchedule(), **given_arguments)


def test_imports_no_torch() -> None:
    code = (
        "import sys, sdrt.runtime.schedule, sdrt.runtime.solvers\n"
        "sys.exit(','.join({'torch', 'diffusers', 'scipy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
