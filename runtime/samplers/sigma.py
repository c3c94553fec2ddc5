"""Samplers whose step is in sigma, the ratio of noise to signal, as k-diffusion writes them.

x is the variance-exploding ``x0 + sigma * noise``, so that the probability-flow ODE is ``dx/dsigma =
(x - x0) / sigma``, the predicted noise (Karras et al. 2022, eq. 4). Timesteps may be fractional.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sdrt.kernels.sampler_row import Column
from sdrt.runtime.samplers.sampler import LEVELS, sampler
from sdrt.runtime.samplers.schedule import (
    FloatArray,
    NoiseSchedule,
    sigma_from_timestep,
    spaced_timesteps,
    timestep_from_sigma,
)
from sdrt.runtime.samplers.sigma_sequences import SIGMA_SCHEDULES, edm_sigmas
from sdrt.runtime.samplers.table import IntArray, SamplerOptions, SamplerTable, given_timesteps, model_rows


@dataclass(frozen=True, eq=False)
class SigmaLevels:
    """The steps of a run: from ``sigmas[i]``, where the model is told ``timesteps[i]``, to ``sigmas[i + 1]``.

    * ``timesteps``: float64 [steps];
    * ``sigmas``: float64 [steps + 1], falling; the last is 0, or the lowest of training;
    * ``init_noise_sigma``: of a run from noise alone.
    """

    timesteps: FloatArray
    sigmas: FloatArray
    init_noise_sigma: float


def sigma_levels(
    schedule: NoiseSchedule,
    num_inference_steps: int,
    options: SamplerOptions,
    start: int,
    *,
    whole_karras: bool = False,
) -> SigmaLevels:
    """The given sigmas or timesteps, or spaced ones, or a sigma schedule between the ends of these.

    ``start`` leaves out that many first steps; ``whole_karras`` rounds the timesteps of Karras sigmas. An EDM
    model has its own sigmas in place of spaced timesteps, and no timestep of it is rounded.
    """
    if options.sigmas is not None:
        sigmas = np.array(options.sigmas[:-1], dtype=np.float64)
        timesteps = timestep_from_sigma(schedule, sigmas)
    elif options.timesteps is not None:
        timesteps = given_timesteps(schedule, options.timesteps, whole=False)
        sigmas = sigma_from_timestep(schedule, timesteps)
    elif schedule.edm is not None:
        sigmas = edm_sigmas(schedule.edm, num_inference_steps)
        timesteps = timestep_from_sigma(schedule, sigmas)
    else:
        timesteps = spaced_timesteps(schedule, num_inference_steps)
        sigmas = sigma_from_timestep(schedule, timesteps)
    if options.sigma_schedule is not None:
        make_sigmas = SIGMA_SCHEDULES[options.sigma_schedule]
        sigmas = make_sigmas(num_inference_steps, float(sigmas[-1]), float(sigmas[0]))
        timesteps = timestep_from_sigma(schedule, sigmas)
        if whole_karras and options.sigma_schedule == "karras" and schedule.edm is None:
            timesteps = np.round(timesteps)
    # diffusers gives x its full variance, sigma^2 + 1, only with leading spacing and to EDM models.
    full = schedule.edm is not None or schedule.timestep_spacing == "leading"
    init_noise_sigma = math.hypot(sigmas[0], 1.0) if full else float(sigmas[0])
    ends_at_zero = options.final_sigmas_type == "zero" or options.sigmas is not None
    final = 0.0 if ends_at_zero else min(schedule.sigma_range[0], float(sigmas[-1]))
    return SigmaLevels(timesteps[start:], np.append(sigmas[start:], final), init_noise_sigma)


def ancestral_step(before: FloatArray, after: FloatArray, eta: float) -> tuple[FloatArray, FloatArray]:
    """Sigmas ``(down, up)``: to step down to, and of the noise that leads up again to ``after``.

    ``down^2 + up^2 = after^2``; for an eta of 1, ``up`` is the share of fresh noise of DDPM's posterior
    (k-diffusion ``get_ancestral_step``). float64 of the same shape.
    """
    up = np.minimum(after, eta * np.sqrt(after**2 * (before**2 - after**2) / before**2))
    return np.sqrt(after**2 - up**2), up


@sampler(
    other_names=("Euler", "EulerDiscreteScheduler", "k_euler"),
    options=LEVELS,
    inherits="sigma_schedule final_sigmas_type",
    zero_snr=True,
)
def euler(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions, start: int
) -> SamplerTable:
    """Euler's method (Karras et al. 2022, alg. 2 without churn; k-diffusion ``sample_euler``).

    Equal to diffusers' ``EulerDiscreteScheduler``.
    """
    levels = sigma_levels(schedule, num_inference_steps, options, start)
    rows = model_rows(schedule, levels.sigmas[:-1], predict="epsilon", variance_preserving=False)
    rows[:, Column.A] = 1.0
    rows[:, Column.B0] = np.diff(levels.sigmas)
    return SamplerTable(levels.timesteps, rows, levels.init_noise_sigma)


@sampler(
    other_names=("Euler a", "EulerAncestralDiscreteScheduler", "euler_ancestral", "k_euler_a"),
    options=f"{LEVELS} eta",
    zero_snr=True,
)
def euler_a(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions, start: int
) -> SamplerTable:
    """Euler's method with ancestral noise (k-diffusion ``sample_euler_ancestral``).

    Equal to diffusers' ``EulerAncestralDiscreteScheduler``, whose eta is 1; with 0 it is ``euler``.
    """
    levels = sigma_levels(schedule, num_inference_steps, options, start)
    down, up = ancestral_step(levels.sigmas[:-1], levels.sigmas[1:], _eta(options))
    rows = model_rows(schedule, levels.sigmas[:-1], predict="epsilon", variance_preserving=False)
    rows[:, Column.A] = 1.0
    rows[:, Column.B0] = down - levels.sigmas[:-1]
    rows[:, Column.C] = up
    return SamplerTable(levels.timesteps, rows, levels.init_noise_sigma)


@sampler(other_names=("Heun", "HeunDiscreteScheduler", "k_heun"), options=LEVELS, inherits="sigma_schedule")
def heun(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions, start: int
) -> SamplerTable:
    """Heun's second-order method (Karras et al. 2022, alg. 1 without churn; k-diffusion ``sample_heun``).

    Two rows a step, but one in the last. Equal to diffusers' ``HeunDiscreteScheduler``.
    """
    levels = sigma_levels(schedule, num_inference_steps, options, start)
    sigmas = levels.sigmas
    step = np.diff(sigmas)
    rows = _two_row_steps(schedule, sigmas[:-1], sigmas[1:-1], predict="epsilon")
    rows[::2, Column.A] = 1.0
    rows[::2, Column.B0] = step
    rows[1::2, Column.E] = 1.0
    rows[1::2, Column.B0] = rows[1::2, Column.B1] = step[:-1] / 2
    timesteps = _interleaved(levels.timesteps, levels.timesteps[1:])
    return SamplerTable(timesteps, rows, levels.init_noise_sigma, _two_rows_each(rows))


@sampler(
    other_names=("DPM2", "KDPM2DiscreteScheduler", "KDPM2", "k_dpm_2"),
    options=LEVELS,
    inherits="sigma_schedule",
)
def dpm2(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions, start: int
) -> SamplerTable:
    """DPM-Solver-2 as k-diffusion has it (``sample_dpm_2``): the midpoint rule, midway in log sigma.

    Two rows a step, but one in the last. Equal to diffusers' ``KDPM2DiscreteScheduler``.
    """
    return _dpm2(schedule, num_inference_steps, options, start, eta=0.0)


@sampler(
    other_names=("DPM2 a", "KDPM2AncestralDiscreteScheduler", "dpm_2_ancestral", "k_dpm_2_a", "KDPM2 a"),
    options=f"{LEVELS} eta",
    inherits="sigma_schedule",
)
def dpm2_a(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions, start: int
) -> SamplerTable:
    """``dpm2`` with ancestral noise (k-diffusion ``sample_dpm_2_ancestral``).

    Equal to diffusers' ``KDPM2AncestralDiscreteScheduler``, whose eta is 1; with 0 it is ``dpm2``.
    """
    return _dpm2(schedule, num_inference_steps, options, start, eta=_eta(options))


@sampler(
    other_names=("DPM++ SDE", "DPMSolverSDEScheduler", "k_dpmpp_sde"),
    options=f"{LEVELS} eta",
    inherits="sigma_schedule",
)
def dpmpp_sde(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions, start: int
) -> SamplerTable:
    """The stochastic DPM-Solver++ of second order (k-diffusion ``sample_dpmpp_sde``, r = 1/2).

    Two rows a step, but one in the last. Equal to diffusers' ``DPMSolverSDEScheduler``, whose eta is 1,
    if the noise of its Brownian motion W over sigma is what the rows' own noises z1, z2 make:
    ``W(mid) - W(begin) = sqrt(begin - mid) z1`` and ``W(end) - W(mid) = sqrt(mid - end) z2``. The second
    row's noise has z1 in it, too; that is taken from x, which is a known function of it.
    """
    levels = sigma_levels(schedule, num_inference_steps, options, start)
    begin, end = levels.sigmas[:-2], levels.sigmas[1:-1]
    middle = np.sqrt(begin * end)
    (down1, up1), (down2, up2) = (ancestral_step(begin, to, _eta(options)) for to in (middle, end))
    rows = _two_row_steps(schedule, levels.sigmas[:-1], middle, predict="x0")
    rows[::2, Column.A] = np.append(down1 / begin, 0.0)
    rows[::2, Column.B0] = np.append(1 - down1 / begin, 1.0)  # the last row: x0 itself
    rows[::2, Column.C] = np.append(up1, 0.0)

    past = np.sqrt((begin - middle) / (begin - end))  # share of z1 in the noise of the whole step
    of_x = np.divide(up2 * past, up1, out=np.zeros_like(up1), where=up1 > 0)
    rows[1::2, Column.A] = of_x
    rows[1::2, Column.E] = down2 / begin - of_x * down1 / begin
    rows[1::2, Column.B0] = 1 - down2 / begin
    rows[1::2, Column.B1] = -of_x * (1 - down1 / begin)
    rows[1::2, Column.C] = up2 * np.sqrt((middle - end) / (begin - end))
    timesteps = _interleaved(levels.timesteps, timestep_from_sigma(schedule, middle))
    return SamplerTable(timesteps, rows, levels.init_noise_sigma, _two_rows_each(rows))


@sampler(
    other_names=("LMS", "LMSDiscreteScheduler", "k_lms"),
    options=f"{LEVELS} solver_order",
    inherits="sigma_schedule",
    max_order=4,
)
def lms(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions, start: int
) -> SamplerTable:
    """Adams-Bashforth over uneven sigmas, by default of order 4 (k-diffusion ``sample_lms``).

    The first rows are of order 1, 2, 3. Equal to diffusers' ``LMSDiscreteScheduler``, which in an
    image-to-image run (``start``) takes the order that a row would have in the whole run: d of rows that were
    left out count as 0.
    """
    most = options.solver_order or 4
    levels = sigma_levels(schedule, num_inference_steps, options, start)
    whole = sigma_levels(schedule, num_inference_steps, options, 0).sigmas
    rows = model_rows(schedule, levels.sigmas[:-1], predict="epsilon", variance_preserving=False)
    rows[:, Column.A] = 1.0
    for i, row in enumerate(rows, start):
        nodes = whole[max(0, i + 1 - most) : i + 1][::-1]
        weights = _lagrange_integrals(nodes, whole[i], whole[i + 1])
        row[Column.B0 : Column.B0 + len(nodes)] = weights
    return SamplerTable(levels.timesteps, rows, levels.init_noise_sigma)


def _dpm2(
    schedule: NoiseSchedule,
    num_inference_steps: int,
    options: SamplerOptions,
    start: int,
    *,
    eta: float,
) -> SamplerTable:
    levels = sigma_levels(schedule, num_inference_steps, options, start, whole_karras=True)
    begin, end = levels.sigmas[:-2], levels.sigmas[1:-1]
    down, up = ancestral_step(begin, end, eta)
    middle = np.sqrt(begin * down)
    rows = _two_row_steps(schedule, levels.sigmas[:-1], middle, predict="epsilon")
    rows[::2, Column.A] = 1.0
    rows[::2, Column.B0] = np.append(middle, 0.0) - levels.sigmas[:-1]
    rows[1::2, Column.E] = 1.0
    rows[1::2, Column.B0] = down - begin
    rows[1::2, Column.C] = up
    timesteps = _interleaved(levels.timesteps, timestep_from_sigma(schedule, middle))
    return SamplerTable(timesteps, rows, levels.init_noise_sigma, _two_rows_each(rows))


def _two_row_steps(
    schedule: NoiseSchedule, begin: FloatArray, second: FloatArray, *, predict: str
) -> FloatArray:
    """Rows [2 steps - 1] of the model at ``begin`` [steps] and, in all steps but the last, at ``second``.

    The first row of such a step keeps its x for the second. Where a mask keeps an image, it has the noise of
    the step's end between the two rows, as in diffusers, whatever ``second`` is.
    """
    sigmas = _interleaved(begin, second)
    rows = model_rows(schedule, sigmas, predict=predict, variance_preserving=False)
    rows[1::2, Column.NOISE] = begin[1:]
    rows[:-1:2, Column.SAVE] = 1.0
    return rows


def _two_rows_each(rows: FloatArray) -> IntArray:
    """The step of each row: 0, 0, 1, 1, ..., the last with one row; [len(rows)]."""
    return np.arange(len(rows)) // 2


def _interleaved(first: FloatArray, second: FloatArray) -> FloatArray:
    """[f0, s0, f1, s1, ..., f_last]: ``second`` has one element fewer."""
    result = np.empty(len(first) + len(second))
    result[::2], result[1::2] = first, second
    return result


def _lagrange_integrals(nodes: FloatArray, low: float, high: float) -> FloatArray:
    """Integrals from ``low`` to ``high`` of the Lagrange polynomials of ``nodes``, [1 to 4]."""
    points, weights = np.polynomial.legendre.leggauss(2)  # exact up to degree 3
    at = (low + high) / 2 + points * (high - low) / 2
    result = np.empty(len(nodes))
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        values = np.prod((at[:, None] - others) / (node - others), axis=1)
        result[j] = (high - low) / 2 * weights @ values
    return result


def _eta(options: SamplerOptions) -> float:
    return 1.0 if options.eta is None else options.eta
