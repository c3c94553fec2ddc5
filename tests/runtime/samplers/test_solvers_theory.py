"""Sampler tables against theory: orders of convergence, moments of the stochastic ones, the recurrence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.references.solver_reference import SHAPE, fake_model, normal, relative_error

import tolerances
from sdrt.kernels.sampler_row import COLUMNS, HISTORY, Column
from sdrt.runtime.samplers.registry import SAMPLERS, make_table
from sdrt.runtime.samplers.schedule import PREDICTION_TYPES, FloatArray, NoiseSchedule
from sdrt.runtime.samplers.sigma_sequences import SIGMA_SCHEDULES
from sdrt.runtime.samplers.table import SamplerOptions, SamplerTable, run_table

# Smooth in the steps, so that four times as many divide each by four: whole timesteps 1000 / n apart
# (these samplers round), or Karras sigmas.
SCHEDULE = NoiseSchedule(set_alpha_to_one=True, steps_offset=0)
KARRAS = SamplerOptions(sigma_schedule="karras")


class Gaussian:
    """The exact model of N(mean, std^2) data, for the rows of one table, and the exact solution.

    The probability-flow ODE of a Gaussian keeps x0 + sigma * noise at the same quantile: from sigma to
    sigma' its distance to the mean grows by sqrt((std^2 + sigma'^2) / (std^2 + sigma^2)) (Karras et al.
    2022, eq. 4).
    """

    def __init__(self, table: SamplerTable, prediction_type: str, mean: float, std: float) -> None:
        self.mean, self.std, self.prediction_type = mean, std, prediction_type
        self.signal = table.rows[:, Column.SIGNAL]
        self.sigmas = table.sigmas
        self.alphas = table.rows[:, Column.INPUT_SCALE] * self.signal

    def output(self, row: int, x: FloatArray) -> FloatArray:
        """What the model says at a row of which x is the latents."""
        alpha, sigma = self.alphas[row], self.sigmas[row]
        exploding = x / self.signal[row]
        noise = (exploding - self.mean) * sigma / (self.std**2 + sigma**2)
        x0 = exploding - sigma * noise
        v = alpha * noise - alpha * sigma * x0
        outputs: dict[str, FloatArray] = {"epsilon": noise, "v_prediction": v, "sample": x0}
        return outputs[self.prediction_type]

    def solution(self, row: int, x: FloatArray) -> FloatArray:
        """x at a row of which x at row 0 is the given one."""
        spread = np.sqrt((self.std**2 + self.sigmas[row] ** 2) / (self.std**2 + self.sigmas[0] ** 2))
        result: FloatArray = self.signal[row] * (self.mean + spread * (x / self.signal[0] - self.mean))
        return result

    def model(self) -> Callable[[FloatArray, float], FloatArray]:
        """For run_table, which hands over INPUT_SCALE * x row by row."""
        rows = iter(range(len(self.alphas)))

        def predict(z: FloatArray, _timestep: float) -> FloatArray:
            row = next(rows)
            return self.output(row, z * self.signal[row] / self.alphas[row])

        return predict


def solution_error(table: SamplerTable, gaussian: Gaussian, x: FloatArray, exact_rows: int) -> float:
    """Relative error where the last row begins, the first ``exact_rows`` started from the exact solution.

    That is what the order of a multistep method is defined by: its first rows are of lower orders. The
    recurrence is the one of `run_table`.
    """
    start, saved, history = x, np.zeros_like(x), [np.zeros_like(x)] * HISTORY
    for i, row in enumerate(table.rows[:-1]):
        if i < exact_rows:
            x = gaussian.solution(i, start)
        d = row[Column.P] * x + row[Column.Q] * gaussian.output(i, x)
        history = [d, *history[:-1]]
        new = row[Column.A] * x + row[Column.E] * saved
        new += sum(row[Column.B0 + k] * history[k] for k in range(HISTORY))
        saved = x if row[Column.SAVE] else saved
        x = new
    return relative_error(x, gaussian.solution(len(table) - 1, start))


def options(order: int | None = None, eta: float | None = None) -> SamplerOptions:
    return replace(KARRAS, solver_order=order, eta=eta, lower_order_final=order is None)


# Name, options, order, rows that need exact values before it.
ORDERS = [
    ("ddim", SamplerOptions(), 1, 0),
    # Adams-Bashforth weights for even steps, of a factor whose steps are uneven (Liu et al. 2022).
    ("pndm", SamplerOptions(), 2, 0),
    ("euler", KARRAS, 1, 0),
    ("euler_a", options(eta=0.0), 1, 0),
    ("heun", KARRAS, 2, 0),
    ("dpm2", KARRAS, 2, 0),
    ("dpm2_a", options(eta=0.0), 2, 0),
    ("dpmpp_sde", options(eta=0.0), 2, 0),
    ("dpmpp_2m_sde", options(eta=0.0), 2, 0),
    *(("lms", replace(KARRAS, solver_order=order), order, order) for order in (1, 2, 3, 4)),
    # The published third order has half of the second derivative's weight, so it is of order 2.
    *(("dpmpp_2m", options(order), min(order, 2), order) for order in (1, 2, 3)),
    *(("deis", options(order), order, order) for order in (1, 2, 3)),
    # The corrector makes up for one order (Zhao et al. 2023, theorem 3.1).
    *(("unipc", options(order), order + 1, order + 1) for order in (1, 2, 3)),
]


@cache
def table_of(name: str, prediction_type: str, chosen: SamplerOptions, steps: int) -> SamplerTable:
    return make_table(name, replace(SCHEDULE, prediction_type=prediction_type), steps, chosen)


def test_orders_are_of_all_deterministic_samplers() -> None:
    stochastic = {name for name in SAMPLERS if make_table(name, SCHEDULE, 5).uses_noise}
    with_eta = {name for name in stochastic if "eta" in SAMPLERS[name].options}
    assert {name for name, *_ in ORDERS} | {"tcd"} == (set(SAMPLERS) - stochastic) | with_eta


def seen_order(
    name: str,
    chosen: SamplerOptions,
    exact_rows: int,
    prediction_type: str,
    mean: float,
    std: float,
    x: float,
) -> float:
    """The order at which the error falls when there are four times the steps: 4 to its power.

    Args:
        name: Of the sampler.
        chosen: Its options.
        exact_rows: Rows before the first that is the sampler's own, which get exact values.
        prediction_type: Of the model.
        mean: Of the Gaussian.
        std: Of the Gaussian.
        x: Where to start, on both sides of the mean and in multiples of the noise's spread: no error is
            divided by nearly nothing. The error is that of both, since that of one may vanish at some number
            of steps, where it changes its sign.
    """
    errors = []
    for steps in (250, 1000) if name == "pndm" else (50, 200):
        table = table_of(name, prediction_type, chosen, steps)
        gaussian = Gaussian(table, prediction_type, mean, std)
        spread = float(np.hypot(std, gaussian.sigmas[0])) * x
        start = gaussian.signal[0] * np.array([mean - spread, mean + spread])
        errors.append(solution_error(table, gaussian, start, exact_rows))
    few, many = errors
    return float(np.log(few / many) / np.log(4))


EVERY_ORDER = pytest.mark.parametrize(
    ("name", "chosen", "order", "exact_rows"),
    ORDERS,
    ids=[f"{name}-{chosen.solver_order or 'default'}" for name, chosen, *_ in ORDERS],
)


def order_of(name: str, order: int, prediction_type: str) -> int:
    # diffusers' PLMS combines the v of several rows, whose factors differ.
    return 1 if (name, prediction_type) == ("pndm", "v_prediction") else order


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@EVERY_ORDER
@settings(max_examples=10, deadline=None)
@given(mean=st.floats(-1.0, 1.0), std=st.floats(0.5, 2.0), x=st.floats(0.5, 3.0))
def test_converges_at_its_order(
    name: str,
    chosen: SamplerOptions,
    order: int,
    exact_rows: int,
    prediction_type: str,
    mean: float,
    std: float,
    x: float,
) -> None:
    """Not slower. Faster it may be, where the first term of the error happens to vanish."""
    seen = seen_order(name, chosen, exact_rows, prediction_type, mean, std, x)
    assert seen >= order_of(name, order, prediction_type) - tolerances.SAMPLER_ORDER


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@EVERY_ORDER
def test_its_order_is_just_that(
    name: str, chosen: SamplerOptions, order: int, exact_rows: int, prediction_type: str
) -> None:
    """Of one Gaussian whose errors do not vanish, so that an order too low is not taken for true."""
    seen = seen_order(name, chosen, exact_rows, prediction_type, mean=0.5, std=1.0, x=1.5)
    expected = order_of(name, order, prediction_type)
    assert seen == pytest.approx(expected, abs=tolerances.SAMPLER_ORDER)


def variance_error(table: SamplerTable, std: float) -> float:
    """Relative error of the variance of x where the last row begins, with the exact model of N(0, std^2).

    The recurrence is linear then, so one run on unit vectors gives how much of x each noise becomes.
    """
    rows = len(table) - 1
    most = replace(table, timesteps=table.timesteps[:rows], rows=table.rows[:rows], steps=table.steps[:rows])
    gaussian = Gaussian(table, "epsilon", 0.0, std)
    start = np.zeros(rows + 1)
    start[0] = gaussian.signal[0] * np.hypot(std, gaussian.sigmas[0])  # the exact spread
    shares = run_table(most, gaussian.model(), start, np.eye(rows + 1)[1:])
    exact = float(gaussian.signal[-1] ** 2 * (std**2 + gaussian.sigmas[-1] ** 2))
    return abs(float(shares @ shares) / exact - 1)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("ddim", SamplerOptions(eta=1.0)),
        ("ddim", SamplerOptions(eta=0.5)),
        ("ddpm", SamplerOptions()),
        ("euler_a", KARRAS),
        ("euler_a", options(eta=0.5)),
        ("dpm2_a", KARRAS),
        ("dpmpp_sde", KARRAS),
        ("dpmpp_sde", options(eta=0.5)),
        ("dpmpp_2m_sde", KARRAS),
        ("dpmpp_2m_sde", options(eta=0.5)),
        ("dpmpp_3m_sde", KARRAS),
    ],
)
@settings(max_examples=10, deadline=None)
@given(std=st.floats(0.5, 2.0))
def test_fresh_noise_leaves_the_variance_right(name: str, chosen: SamplerOptions, std: float) -> None:
    """The more steps, the nearer, at first order."""
    few, many = (variance_error(table_of(name, "epsilon", chosen, steps), std) for steps in (50, 200))
    assert many <= tolerances.SAMPLER_VARIANCE * few


@pytest.mark.parametrize(
    ("name", "other"), [("euler_a", "euler"), ("dpm2_a", "dpm2"), ("dpmpp_2m_sde", "dpmpp_2m")]
)
def test_without_noise_it_is_the_other(name: str, other: str) -> None:
    ours = make_table(name, NoiseSchedule(), 20, options(eta=0.0))
    theirs = make_table(other, NoiseSchedule(), 20, KARRAS if other != "dpmpp_2m" else options())
    assert not ours.uses_noise
    np.testing.assert_array_equal(ours.rows, theirs.rows)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps)


def test_tcd_without_noise_is_ddim() -> None:
    schedule = replace(SCHEDULE, set_alpha_to_one=False)
    tcd = make_table("tcd", schedule, 10, SamplerOptions(eta=0.0))
    given_timesteps = SamplerOptions(timesteps=tuple(tcd.timesteps.tolist()))
    ddim = make_table("ddim", schedule, None, given_timesteps)
    np.testing.assert_allclose(tcd.rows, ddim.rows, rtol=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_x0_columns_find_the_clean_latents(name: str, prediction_type: str) -> None:
    """From SIGNAL, sigma and an exact model output, X0_X and X0_M give x0 back at every row."""
    schedule = NoiseSchedule(prediction_type=prediction_type)
    x0, noise = normal(*SHAPE, seed=4), normal(*SHAPE, seed=5)
    table = make_table(name, schedule, 20)
    for row, level in zip(table.rows, table.sigmas, strict=True):
        x = row[Column.SIGNAL] * (x0 + level * noise)
        alpha = row[Column.INPUT_SCALE] * row[Column.SIGNAL]
        sigma = alpha * level
        assert alpha**2 + sigma**2 == pytest.approx(1.0)
        m = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}[prediction_type]
        np.testing.assert_allclose(row[Column.X0_X] * x + row[Column.X0_M] * m, x0, atol=1e-11)


def in_terms_of_noise(table: SamplerTable, prediction_type: str) -> Callable[[FloatArray, float], FloatArray]:
    """`fake_model`, which predicts the noise, as a model that predicts something else; for run_table."""
    signals = table.rows[:, Column.SIGNAL] * table.rows[:, Column.INPUT_SCALE]
    levels = zip(signals, signals * table.sigmas, strict=True)

    def predict(z: FloatArray, timestep: float) -> FloatArray:
        signal, sigma = next(levels)
        noise = fake_model(z, timestep)
        x0 = (z - sigma * noise) / signal
        return x0 if prediction_type == "sample" else np.asarray(signal * noise - sigma * x0)

    return predict


OPTIONS = [
    SamplerOptions(),
    *(SamplerOptions(sigma_schedule=name) for name in SIGMA_SCHEDULES),
    SamplerOptions(timesteps=(990, 700, 480, 310, 150, 60, 9)),
    SamplerOptions(sigmas=(14.0, 6.0, 3.0, 1.5, 0.6, 0.1, 0.0)),
    SamplerOptions(eta=0.6),
    *(
        SamplerOptions(solver_order=order, lower_order_final=lower)
        for order in (1, 2, 3)
        for lower in (True, False)
    ),
    SamplerOptions(solver_order=4),
    SamplerOptions(spacing="sgm_uniform"),
    SamplerOptions(original_inference_steps=25),
]


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        pytest.param(name, chosen, id=f"{name}-{index}")
        for name, sampler in SAMPLERS.items()
        for index, chosen in enumerate(OPTIONS)
        if set(chosen.given) <= sampler.options and (chosen.solver_order or 1) <= sampler.max_order
    ],
)
def test_what_is_predicted_does_not_matter(name: str, chosen: SamplerOptions, prediction_type: str) -> None:
    """With every option: a model's prediction put in other words gives the same latents.

    So what is equal to diffusers' for predicted noise is right for the others, also where diffusers does
    not have them.
    """
    if (name, prediction_type) == ("pndm", "v_prediction"):  # in diffusers PLMS combines the v themselves
        with pytest.raises(AssertionError):
            assert_same_in_other_words(name, chosen, prediction_type)
    else:
        assert_same_in_other_words(name, chosen, prediction_type)


def assert_same_in_other_words(name: str, chosen: SamplerOptions, prediction_type: str) -> None:
    for steps in (None,) if chosen.num_given_steps else (5, 20):
        table = make_table(name, NoiseSchedule(), steps, chosen)
        other = make_table(name, NoiseSchedule(prediction_type=prediction_type), steps, chosen)
        start, noise = normal(*SHAPE) * table.init_noise_sigma, normal(len(table), *SHAPE, seed=1)
        expected = run_table(table, fake_model, start, noise)
        result = run_table(other, in_terms_of_noise(other, prediction_type), start, noise)
        assert relative_error(result, expected) <= tolerances.SAMPLER_FORMULAS


def test_recurrence_reads_history_saved_and_noise() -> None:
    """run_table against the formula written out, on rows that use every column."""
    rng = np.random.default_rng(6)
    rows = rng.uniform(-1, 1, (4, COLUMNS))
    rows[:, Column.SAVE] = [0, 1, 0, 0]
    table = SamplerTable(np.array([30.0, 20.0, 10.0, 0.5]), rows, 1.0)
    noise, x = rng.standard_normal((4, 3)), rng.standard_normal(3)
    assert (len(table), table.num_history, table.uses_noise) == (4, HISTORY - 1, True)

    xs, ds = [x], []
    for i, (scale, p, q, a, *b, e, c) in enumerate(rows[:, : Column.C + 1]):
        ds.append(p * xs[i] + q * fake_model(scale * xs[i], table.timesteps[i]))
        past = sum(b[k] * ds[i - k] for k in range(i + 1))
        saved = xs[1] if i > 1 else 0.0
        xs.append(a * xs[i] + past + e * saved + c * noise[i])
    np.testing.assert_allclose(run_table(table, fake_model, x, noise), xs[-1], rtol=1e-14)
