"""Every sampler's table against diffusers' scheduler with the same options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.references.solver_reference import (
    REFERENCES,
    SHAPE,
    diffusers_run,
    diffusers_scheduler,
    fake_model,
    normal,
    relative_error,
    set_timesteps,
    step_options,
    widened,
)

import tolerances
from sdrt.kernels.sampler_row import Column
from sdrt.runtime.samplers.registry import SAMPLERS, first_step, make_table
from sdrt.runtime.samplers.schedule import PREDICTION_TYPES, TIMESTEP_SPACINGS, FloatArray, NoiseSchedule
from sdrt.runtime.samplers.sigma_sequences import SIGMA_SCHEDULES
from sdrt.runtime.samplers.table import SamplerOptions, SamplerTable, run_table

STEPS = (1, 2, 5, 20, 50)
TWO_ROWS = ("heun", "dpm2", "dpm2_a", "dpmpp_sde")
# What diffusers has of our options; where it has less, another test compares with what it has.
WITH_SIGMA_SCHEDULES = [n for n, s in SAMPLERS.items() if "sigma_schedule" in s.options and n != "euler_a"]
WITH_TIMESTEPS = ["ddpm", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "euler", "heun", "lcm", "tcd"]
WITH_ZERO_SNR = ["ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "euler", "euler_a", "lcm", "tcd"]
WITH_ZERO_SNR += ["unipc"]
# "Align your steps" for Stable Diffusion 1.5 (Sabour et al. 2024).
TIMESTEPS = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)
SIGMAS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0)


pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")


def tolerance(schedule: NoiseSchedule) -> float:
    """As SAMPLER_FORMULAS says, for another largest x."""
    return tolerances.SAMPLER_FORMULAS * max(1.0, float(schedule.sigmas[-1]) / 14.6)


def known(name: str, prediction_type: str) -> bool:
    return prediction_type != "sample" or REFERENCES[name].samples


LEVELS = {name: sampler.options for name, sampler in SAMPLERS.items()}
KNOWN = [
    (name, prediction) for name in SAMPLERS for prediction in PREDICTION_TYPES if known(name, prediction)
]


def row_noise(name: str, table: SamplerTable) -> FloatArray:
    noise = normal(len(table), *SHAPE, seed=1)
    if name == "ddpm":  # diffusers adds 1e-10 of noise to the result, we do not
        noise[-1] = 0.0
    return noise


def formula_error(
    name: str, schedule: NoiseSchedule, steps: int, options: SamplerOptions | None = None, *, keep: int = 0
) -> float:
    """Relative error of a run, or of all but its last ``keep`` rows, against a diffusers without float32."""
    options = options or SamplerOptions()
    schedule = replace(schedule)  # its sigmas are about to be widened
    scheduler = diffusers_scheduler(name, schedule, options)
    with widened(scheduler, schedule):
        set_timesteps(scheduler, steps, options)
        table = make_table(name, schedule, steps, options)
        assert len(scheduler.timesteps) == len(table)
        start, noise = normal(*SHAPE) * table.init_noise_sigma, row_noise(name, table)
        more = step_options(name, options)
        run = diffusers_run(name, scheduler, fake_model, start, noise, told=table.timesteps, **more)
    rows = len(table) - keep
    table = replace(table, timesteps=table.timesteps[:rows], rows=table.rows[:rows], steps=table.steps[:rows])
    return relative_error(run_table(table, fake_model, start, noise), run.xs[rows])


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize(("name", "prediction_type"), KNOWN)
def test_formulas_are_those_of_diffusers(name: str, prediction_type: str, spacing: str) -> None:
    schedule = NoiseSchedule(prediction_type=prediction_type, timestep_spacing=spacing)
    errors = {steps: formula_error(name, schedule, steps) for steps in STEPS}
    assert max(errors.values()) <= tolerances.SAMPLER_FORMULAS, errors


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not REFERENCES[name].samples])
def test_diffusers_has_no_predicted_sample(name: str) -> None:
    """So that what is compared grows with diffusers."""
    with pytest.raises((ValueError, NotImplementedError)):
        formula_error(name, NoiseSchedule(prediction_type="sample"), 2)


@pytest.mark.parametrize(("name", "prediction_type"), KNOWN)
def test_equals_diffusers_as_it_is(name: str, prediction_type: str) -> None:
    """With the float32 tables and steps that diffusers has; timesteps and first noise level, too."""
    schedule = NoiseSchedule(prediction_type=prediction_type)
    scheduler = diffusers_scheduler(name, schedule)
    set_timesteps(scheduler, 20)
    table = make_table(name, schedule, 20)
    assert_timesteps_equal(table, scheduler)
    assert table.init_noise_sigma == pytest.approx(float(scheduler.init_noise_sigma), rel=tolerances.SIGMAS)
    start, noise = normal(*SHAPE) * table.init_noise_sigma, row_noise(name, table)
    expected = diffusers_run(
        name, scheduler, fake_model, start, noise, **step_options(name, SamplerOptions())
    ).last
    most = tolerances.SAMPLER_RUN_DEIS if name == "deis" else tolerances.SAMPLER_RUN
    assert relative_error(run_table(table, fake_model, start, noise), expected) <= most


def assert_timesteps_equal(table: SamplerTable, scheduler: Any) -> None:
    whole = not np.any(table.timesteps % 1)
    atol = 0.0 if whole else tolerances.SAMPLER_TIMESTEPS
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), rtol=0, atol=atol)


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("sigma_schedule", SIGMA_SCHEDULES)
@pytest.mark.parametrize("name", WITH_SIGMA_SCHEDULES)
def test_sigma_schedules_are_those_of_diffusers(name: str, sigma_schedule: str, beta_schedule: str) -> None:
    options = SamplerOptions(sigma_schedule=sigma_schedule)
    schedule = NoiseSchedule(beta_schedule=beta_schedule, timestep_spacing="linspace")
    errors = {steps: formula_error(name, schedule, steps, options) for steps in (5, 20, 50)}
    assert max(errors.values()) <= tolerance(schedule), errors


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("sigma_schedule", SIGMA_SCHEDULES)
@pytest.mark.parametrize("name", WITH_SIGMA_SCHEDULES)
def test_sigma_schedules_with_other_spacings(name: str, sigma_schedule: str, spacing: str) -> None:
    """They lie between the first and the last sigma of a spacing, or of training."""
    options = SamplerOptions(sigma_schedule=sigma_schedule)
    schedule = NoiseSchedule(timestep_spacing=spacing)
    assert formula_error(name, schedule, 20, options) <= tolerances.SAMPLER_FORMULAS


@pytest.mark.parametrize("sigma_schedule", SIGMA_SCHEDULES)
def test_euler_a_has_the_sigma_schedules_of_euler(sigma_schedule: str) -> None:
    """diffusers' EulerAncestralDiscreteScheduler has none."""
    options = SamplerOptions(sigma_schedule=sigma_schedule)
    ours, euler = (make_table(name, NoiseSchedule(), 20, options) for name in ("euler_a", "euler"))
    np.testing.assert_array_equal(ours.timesteps, euler.timesteps)
    np.testing.assert_array_equal(ours.rows[:, Column.NOISE], euler.rows[:, Column.NOISE])
    assert ours.uses_noise


@pytest.mark.parametrize("spacing", [*TIMESTEP_SPACINGS, "sgm_uniform"])
@pytest.mark.parametrize("name", [n for n, s in SAMPLERS.items() if "spacing" in s.options])
def test_spacing_takes_the_place_of_the_schedules(name: str, spacing: str) -> None:
    options = SamplerOptions(spacing=spacing)
    named = "trailing" if spacing == "sgm_uniform" else spacing
    scheduler = diffusers_scheduler(name, NoiseSchedule(), SamplerOptions(spacing=named))
    for steps in (2, 7, 20, 50, 96):
        set_timesteps(scheduler, steps)
        table = make_table(name, NoiseSchedule(), steps, options)
        if name not in ("dpm2", "dpm2_a"):
            assert_timesteps_equal(table, scheduler)
        else:  # what diffusers interpolates in float32 is compared in float64 elsewhere
            theirs = scheduler.timesteps.numpy()[::2]
            np.testing.assert_allclose(
                table.timesteps[::2], theirs, rtol=0, atol=tolerances.SAMPLER_TIMESTEPS
            )


@pytest.mark.parametrize(
    ("name", "order", "lower_order_final"),
    [
        (name, order, lower)
        for name, sampler in SAMPLERS.items()
        if sampler.max_order > 1
        for order in range(1, sampler.max_order + 1)
        # Without it diffusers' last row of UniPC is not finite; see the next test.
        for lower in ((True, False) if name not in ("lms", "unipc") else (True,))
    ],
)
def test_orders_are_those_of_diffusers(name: str, order: int, lower_order_final: bool) -> None:
    options = SamplerOptions(solver_order=order, lower_order_final=lower_order_final)
    errors = {steps: formula_error(name, NoiseSchedule(), steps, options) for steps in (5, 14, 15, 20, 50)}
    assert max(errors.values()) <= tolerances.SAMPLER_FORMULAS, errors


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_without_lower_orders_equals_diffusers_up_to_the_last_row(
    order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = torch.linalg.solve
    with (
        monkeypatch.context() as patch
    ):  # its last step, whose outcome is not compared, solves a singular one
        patch.setattr(
            torch.linalg, "solve", lambda a, b: solve(a, b) if torch.det(a) else torch.zeros_like(b)
        )
        options = SamplerOptions(solver_order=order, lower_order_final=False)
        assert formula_error("unipc", NoiseSchedule(), 20, options, keep=1) <= tolerances.SAMPLER_FORMULAS
    last = make_table("unipc", NoiseSchedule(), 20, options).rows[-1]
    assert last[Column.A] == 0.0
    assert last[Column.B0] == 1.0


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_stochastic_multistep_without_lower_orders(name: str) -> None:
    options = SamplerOptions(lower_order_final=False)
    errors = [formula_error(name, NoiseSchedule(), steps, options) for steps in (5, 20, 50)]
    assert max(errors) <= tolerances.SAMPLER_FORMULAS


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", ["ddim", "tcd"])
def test_eta_is_that_of_diffusers(name: str, prediction_type: str, eta: float) -> None:
    schedule, options = NoiseSchedule(prediction_type=prediction_type), SamplerOptions(eta=eta)
    assert make_table(name, schedule, 20, options).uses_noise == (eta > 0)
    for steps in (5, 20, 50):
        assert formula_error(name, schedule, steps, options) <= tolerances.SAMPLER_FORMULAS


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_eta_of_ddim_with_other_spacings(spacing: str) -> None:
    schedule = NoiseSchedule(timestep_spacing=spacing)
    for steps in (5, 20, 50):
        error = formula_error("ddim", schedule, steps, SamplerOptions(eta=0.7))
        assert error <= tolerances.SAMPLER_FORMULAS


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize(
    ("name", "prediction_type"),
    # Where x has no signal, noise that is predicted says nothing; samplers in sigma keep a little of it.
    [
        pair
        for pair in KNOWN
        if pair[0] in WITH_ZERO_SNR and (pair[1] != "epsilon" or "sigmas" in LEVELS[pair[0]])
    ],
)
def test_zero_terminal_snr_equals_diffusers(name: str, prediction_type: str, spacing: str) -> None:
    schedule = NoiseSchedule(
        prediction_type=prediction_type, timestep_spacing=spacing, rescale_betas_zero_snr=True
    )
    assert max(formula_error(name, schedule, steps) for steps in (5, 20, 50)) <= tolerance(schedule)


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize("name", WITH_TIMESTEPS)
def test_given_timesteps_equal_diffusers(name: str, steps: int) -> None:
    """ "Align your steps", and timesteps between which it interpolates."""
    count = len(TIMESTEPS)
    between = np.interp(np.linspace(0, count - 1, steps), np.arange(count), TIMESTEPS)
    # Of tcd a half, since it rounds down a share of a timestep, in float32 if it is not widened.
    eta = 0.5 if name == "tcd" else None
    options = SamplerOptions(timesteps=tuple(int(timestep) for timestep in between), eta=eta)
    assert formula_error(name, NoiseSchedule(), steps, options) <= tolerances.SAMPLER_FORMULAS


@pytest.mark.parametrize("original", [20, 36, 100])
@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_original_inference_steps_are_those_of_diffusers(name: str, original: int) -> None:
    schedule, options = NoiseSchedule(), SamplerOptions(original_inference_steps=original)
    scheduler = diffusers_scheduler(name, schedule, original_inference_steps=original)
    for steps in (1, 4, 8, 20):
        scheduler.set_timesteps(steps)
        table = make_table(name, schedule, steps, options)
        assert table.timesteps.tolist() == scheduler.timesteps.tolist()
        start, noise = normal(*SHAPE), row_noise(name, table)
        expected = diffusers_run(
            name, scheduler, fake_model, start, noise, **step_options(name, options)
        ).last
        result = run_table(table, fake_model, start, noise)
        assert relative_error(result, expected) <= tolerances.SAMPLER_RUN


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in (*WITH_TIMESTEPS, "pndm")])
def test_given_timesteps_are_those_that_spacing_gives(name: str) -> None:
    """Where diffusers takes none: the timesteps of a spacing, given, make the same table."""
    schedule = NoiseSchedule(timestep_spacing="trailing", set_alpha_to_one=True)
    table = make_table(name, schedule, 10)
    begins = table.timesteps[::2] if name in TWO_ROWS else table.timesteps
    again = make_table(name, schedule, None, SamplerOptions(timesteps=tuple(begins.tolist())))
    np.testing.assert_array_equal(again.timesteps, table.timesteps)
    np.testing.assert_allclose(again.rows, table.rows, rtol=1e-12)


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_given_sigmas_equal_diffusers(steps: int) -> None:
    """Of the others diffusers takes sigmas for rectified flow alone; see the next test."""
    between = np.interp(np.linspace(0, len(SIGMAS) - 1, steps + 1), np.arange(len(SIGMAS)), SIGMAS)
    options = SamplerOptions(sigmas=tuple(between.tolist()))
    assert formula_error("euler", NoiseSchedule(), steps, options) <= tolerances.SAMPLER_FORMULAS


@pytest.mark.parametrize("name", [n for n, s in SAMPLERS.items() if "sigmas" in s.options])
def test_given_sigmas_are_the_levels_of_the_rows(name: str) -> None:
    table = make_table(name, NoiseSchedule(), None, SamplerOptions(sigmas=SIGMAS))
    sigmas = table.rows[:, Column.NOISE] / table.rows[:, Column.SIGNAL]
    np.testing.assert_allclose(sigmas[::2] if name in TWO_ROWS else sigmas, SIGMAS[:-1], rtol=1e-12)


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
@pytest.mark.parametrize(("name", "prediction_type"), KNOWN)
def test_equals_diffusers_on_other_schedules(
    name: str, prediction_type: str, schedule: NoiseSchedule
) -> None:
    schedule = replace(schedule, prediction_type=prediction_type)
    assert formula_error(name, schedule, 20) <= tolerance(schedule)


def image_to_image(
    name: str,
    schedule: NoiseSchedule,
    steps: int,
    start: int,
    options: SamplerOptions | None = None,
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """(Our x where the run begins, diffusers', our result, diffusers') of a run on an image."""
    options, schedule = options or SamplerOptions(), replace(schedule)
    scheduler = diffusers_scheduler(name, schedule, options)
    image, noise = normal(*SHAPE, seed=2), normal(*SHAPE, seed=3)
    with widened(scheduler, schedule):
        set_timesteps(scheduler, steps, options)
        first = start * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        table = make_table(name, schedule, steps, options, start=start)
        at = scheduler.timesteps[first : first + 1]
        begin = scheduler.add_noise(torch.from_numpy(image), torch.from_numpy(noise), at).numpy()
        step_noise, more = row_noise(name, table), step_options(name, options)
        options_of_run = {"first": first, "told": table.timesteps, **more}
        run = diffusers_run(name, scheduler, fake_model, begin, step_noise, **options_of_run)
    x = table.rows[0, Column.SIGNAL] * image + table.rows[0, Column.NOISE] * noise
    return x, begin, run_table(table, fake_model, x, step_noise), run.last


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize(("name", "prediction_type"), KNOWN)
def test_start_equals_image_to_image_of_diffusers(name: str, prediction_type: str, spacing: str) -> None:
    schedule = NoiseSchedule(prediction_type=prediction_type, timestep_spacing=spacing)
    for steps, strength in ((5, 0.2), (5, 0.8), (20, 0.65), (50, 0.3)):
        start = first_step(steps, strength)
        x, begin, result, expected = image_to_image(name, schedule, steps, start)
        assert relative_error(x, begin) <= tolerances.SAMPLER_FORMULAS
        assert relative_error(result, expected) <= tolerances.SAMPLER_FORMULAS


@pytest.mark.parametrize("sigma_schedule", SIGMA_SCHEDULES)
@pytest.mark.parametrize("name", WITH_SIGMA_SCHEDULES)
def test_start_with_sigma_schedules(name: str, sigma_schedule: str) -> None:
    options = SamplerOptions(sigma_schedule=sigma_schedule)
    x, begin, result, expected = image_to_image(name, NoiseSchedule(), 20, 7, options)
    assert relative_error(x, begin) <= tolerances.SAMPLER_FORMULAS
    assert relative_error(result, expected) <= tolerances.SAMPLER_FORMULAS
