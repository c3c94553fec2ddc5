"""Multistep samplers whose step is in lambda = -log sigma, half the logarithm of the signal-to-noise ratio.

They integrate the linear part of the diffusion ODE or SDE exactly and take the model's prediction as a
polynomial in lambda through the last few rows: DPM-Solver++, UniPC and DEIS. x is variance preserving,
``alpha = 1 / sqrt(1 + sigma^2)``, but for EDM models, whose alpha is 1. A step is from s to t; h is how far
it goes in lambda. Where a step has no length (two timesteps can round to one), the rows near it are of lower
order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from sdrt.kernels.sampler_row import HISTORY, Column
from sdrt.runtime.samplers.sampler import LEVELS, sampler
from sdrt.runtime.samplers.schedule import (
    FloatArray,
    NoiseSchedule,
    sigma_from_timestep,
    spaced_timesteps,
    timestep_from_sigma,
)
from sdrt.runtime.samplers.sigma_sequences import SIGMA_SCHEDULES, edm_sigmas
from sdrt.runtime.samplers.table import SamplerOptions, SamplerTable, given_timesteps, model_rows

_STEPS: Final = "sigma_schedule lower_order_final"
_DPM: Final = f"{_STEPS} solver_type final_sigmas_type euler_at_final"

FEW_STEPS = 15  # below it diffusers' DPM-Solver and DEIS lower the order of the last steps


@dataclass(frozen=True, eq=False)
class LogSnrLevels:
    """The steps of a run: from ``sigmas[i]``, where the model is told ``timesteps[i]``, to ``sigmas[i + 1]``.

    * ``timesteps``: float64 [steps], whole but for EDM models;
    * ``sigmas``: float64 [steps + 1], falling, perhaps with repetitions; the last may be 0;
    * ``alphas``: float64 [steps + 1], the share of the clean latents in x;
    * ``few``: whether the whole run, with the steps that were left out, has less than ``FEW_STEPS``;
    * ``init_noise_sigma``: of a run from noise alone.
    """

    timesteps: FloatArray
    sigmas: FloatArray
    alphas: FloatArray
    few: bool
    init_noise_sigma: float

    @cached_property
    def lambdas(self) -> FloatArray:
        """-log sigma, float64 [steps + 1]; the last may be infinite."""
        with np.errstate(divide="ignore"):
            return -np.log(self.sigmas)

    @property
    def kept(self) -> FloatArray:
        """The share of x that a step of the ODE keeps: the ratio of its noises; [steps]."""
        noise = self.alphas * self.sigmas
        return np.asarray(noise[1:] / noise[:-1], dtype=np.float64)

    def orders(self, most: int) -> list[int]:
        """The highest order up to ``most`` of each step: what its history and its own length allow."""
        result, order = [], 0
        for falls, reaches_zero in zip(np.diff(self.lambdas) > 0, self.sigmas[1:] == 0, strict=True):
            order = min(order + 1, most) if falls else 0
            result.append(1 if reaches_zero else max(order, 1))
        return result


def log_snr_levels(
    schedule: NoiseSchedule,
    num_inference_steps: int,
    options: SamplerOptions,
    start: int,
    *,
    cut_karras: bool = False,
    keep_noise: bool = False,
) -> LogSnrLevels:
    """The given sigmas or timesteps, spaced timesteps, or a sigma schedule over the whole training range.

    Timesteps are whole numbers, as in diffusers: those of Karras sigmas are rounded (``cut_karras``: cut
    off), those of the other sigma schedules cut off. An EDM model has its own sigmas in place of spaced
    timesteps, and its timesteps are as they come. ``start`` leaves out that many first steps. The last level
    is 0 or, with ``keep_noise`` or ``final_sigmas_type``, the lowest of training, or the lowest of the sigma
    schedule once more.
    """
    ends_with_noise = keep_noise or options.final_sigmas_type == "sigma_min"
    lowest, highest = schedule.sigma_range
    if options.sigma_schedule is not None:
        sigmas = SIGMA_SCHEDULES[options.sigma_schedule](num_inference_steps, lowest, highest)
        lowest = float(sigmas[-1])
    elif options.sigmas is not None:
        sigmas = np.array(options.sigmas[:-1], dtype=np.float64)
        ends_with_noise = False
    elif schedule.edm is not None:
        sigmas = edm_sigmas(schedule.edm, num_inference_steps)
        lowest = float(sigmas[-1])
    else:
        timesteps = _whole_timesteps(schedule, num_inference_steps, options)
        sigmas = sigma_from_timestep(schedule, timesteps)
    if options.sigma_schedule is not None or options.sigmas is not None or schedule.edm is not None:
        cut = options.sigma_schedule is not None and (options.sigma_schedule != "karras" or cut_karras)
        exact = timestep_from_sigma(schedule, sigmas)
        timesteps = exact if schedule.edm is not None else np.floor(exact) if cut else np.round(exact)
    levels = np.append(sigmas[start:], lowest if ends_with_noise else 0.0)
    return LogSnrLevels(
        timesteps[start:],
        levels,
        alphas=1 / np.sqrt(1 + levels**2) if schedule.edm is None else np.ones_like(levels),
        few=num_inference_steps < FEW_STEPS,
        init_noise_sigma=1.0 if schedule.edm is None else math.hypot(sigmas[0], 1.0),
    )


def _whole_timesteps(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions
) -> FloatArray:
    if options.timesteps is not None:
        return given_timesteps(schedule, options.timesteps, whole=True)
    return np.round(spaced_timesteps(schedule, num_inference_steps, drop_last=True))


@sampler(
    other_names=("DPM++ 2M", "DPMSolverMultistepScheduler", "k_dpmpp_2m"),
    options=LEVELS,
    inherits=f"{_DPM} solver_order algorithm_type",
    max_order=3,
    zero_snr=True,
)
def dpmpp_2m(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions, start: int
) -> SamplerTable:
    """DPM-Solver++(2M) (Lu et al. 2022b, alg. 2), or with ``solver_order`` 3 the 3M of its appendix.

    The first row is first order, and so is the last, which goes to sigma 0. Equal to diffusers'
    ``DPMSolverMultistepScheduler`` (``dpmsolver++``, or ``dpmsolver`` of Lu et al. 2022a) and
    ``EDMDPMSolverMultistepScheduler``.
    """
    return _dpmpp(schedule, num_inference_steps, options, start, order=2, eta=0.0)


@sampler(
    other_names=("DPM++ 2M SDE", "k_dpmpp_2m_sde"), options=f"{LEVELS} eta", inherits=_DPM, zero_snr=True
)
def dpmpp_2m_sde(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions, start: int
) -> SamplerTable:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, appendix; k-diffusion ``sample_dpmpp_2m_sde``).

    Equal to diffusers' ``DPMSolverMultistepScheduler`` (``sde-dpmsolver++``), whose eta is 1; with 0 it is
    ``dpmpp_2m``.
    """
    eta = 1.0 if options.eta is None else options.eta
    return _dpmpp(schedule, num_inference_steps, options, start, order=2, eta=eta)


@sampler(other_names=("DPM++ 3M SDE", "k_dpmpp_3m_sde"), options=LEVELS, inherits=_DPM, zero_snr=True)
def dpmpp_3m_sde(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions, start: int
) -> SamplerTable:
    """SDE-DPM-Solver++ of third order, as diffusers' ``DPMSolverMultistepScheduler`` computes it.

    See `_dpmpp_weights` for where that is not k-diffusion's ``sample_dpmpp_3m_sde``.
    """
    return _dpmpp(schedule, num_inference_steps, options, start, order=3, eta=1.0)


@sampler(
    other_names=("UniPC", "UniPCMultistepScheduler", "uni_pc"),
    options=LEVELS,
    inherits=f"{_STEPS} solver_order solver_type final_sigmas_type",
    max_order=3,
    zero_snr=True,
)
def unipc(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions, start: int
) -> SamplerTable:
    """UniPC of data prediction (Zhao et al. 2023, alg. 1 and 2), by default of order 2.

    B(h) is e^h - 1 or, for ``bh1``, h.

    The corrector of a row moves x by a combination of this row's d and of those that the predictor
    of the row before has read. So corrector and next predictor are one row, of one d more than the order.
    Equal to diffusers' ``UniPCMultistepScheduler`` (``predict_x0``), but that the last row is of
    order 1 even without ``lower_order_final``: at sigma 0 diffusers' higher orders are not finite.
    """
    levels = log_snr_levels(schedule, num_inference_steps, options, start)
    lambdas, alphas, count = levels.lambdas, levels.alphas, len(levels.timesteps)
    orders = levels.orders(options.solver_order or 2)
    if options.lower_order_final:
        orders = [min(order, count - i) for i, order in enumerate(orders)]
    rows = model_rows(schedule, levels.sigmas[:-1], predict="x0", variance_preserving=True)
    ratio, bh1 = levels.kept, options.solver_type == "bh1"
    correction = np.zeros(HISTORY)  # what the corrector adds to x, as weights of d, d[-1], ...
    for i, order in enumerate(orders):
        rows[i, Column.A] = ratio[i]
        predictor = alphas[i + 1] * unipc_weights(lambdas, i, order, corrector=False, bh1=bh1)
        rows[i, Column.B0 : Column.B3 + 1] = predictor[1:] + ratio[i] * correction
        corrector = alphas[i + 1] * unipc_weights(lambdas, i, order, corrector=True, bh1=bh1)
        correction = (corrector - predictor)[:HISTORY]
    return SamplerTable(levels.timesteps, rows, levels.init_noise_sigma)


@sampler(
    other_names=("DEIS", "DEISMultistepScheduler"),
    options=LEVELS,
    inherits=f"{_STEPS} solver_order",
    max_order=3,
)
def deis(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions, start: int
) -> SamplerTable:
    """DEIS in log rho (Zhang & Chen 2022, "Fast Sampling of Diffusion Models", eq. 15), by default order 2.

    Its d is the predicted noise. Equal to diffusers' ``DEISMultistepScheduler``, which ends at the lowest
    noise of training, not without noise; with a sigma schedule the last row changes nothing.
    """
    levels = log_snr_levels(schedule, num_inference_steps, options, start, keep_noise=True)
    orders = _lowered(levels, options, levels.orders(options.solver_order or 2))
    lambdas, alphas = levels.lambdas, levels.alphas
    rows = model_rows(schedule, levels.sigmas[:-1], predict="epsilon", variance_preserving=True)
    rows[:, Column.A] = alphas[1:] / alphas[:-1]
    for i, order in enumerate(orders):
        # x / alpha moves by the integral of d over sigma; in u = log sigma that is of d(u) e^u.
        at = lambdas[i] - lambdas[i + 1 - order : i + 1][::-1]  # u of d, d[-1], ... from the step's begin
        moments = levels.sigmas[i] * _exponential_moments(-(lambdas[i + 1] - lambdas[i]), order)
        weights = np.linalg.solve(np.vander(at, order, increasing=True).T, moments)
        rows[i, Column.B0 : Column.B0 + order] = alphas[i + 1] * weights
    return SamplerTable(levels.timesteps, rows, levels.init_noise_sigma)


def _dpmpp(
    schedule: NoiseSchedule,
    num_inference_steps: int,
    options: SamplerOptions,
    start: int,
    *,
    order: int,
    eta: float,
) -> SamplerTable:
    cosine = schedule.beta_schedule == "squaredcos_cap_v2"
    levels = log_snr_levels(schedule, num_inference_steps, options, start, cut_karras=cosine)
    orders = _lowered(levels, options, levels.orders(options.solver_order or order))
    weigh = _noise_weights if options.algorithm_type == "dpmsolver" else _x0_weights
    predict = "epsilon" if options.algorithm_type == "dpmsolver" else "x0"
    step = np.diff(levels.lambdas)
    kept = np.exp(-eta * step) if eta else np.ones_like(step)  # the SDE shrinks x by as much more
    rows = model_rows(schedule, levels.sigmas[:-1], predict=predict, variance_preserving=True)
    rows[:, Column.A] = (
        levels.alphas[1:] / levels.alphas[:-1] if predict == "epsilon" else levels.kept
    ) * kept
    for i, order in enumerate(orders):
        weights = weigh(levels, i, order, eta, heun=options.solver_type == "heun")
        rows[i, Column.B0 : Column.B0 + order] = levels.alphas[i + 1] * weights
    rows[:, Column.C] = levels.alphas[1:] * levels.sigmas[1:] * np.sqrt(1 - kept**2)
    return SamplerTable(levels.timesteps, rows, levels.init_noise_sigma)


def _x0_weights(levels: LogSnrLevels, i: int, order: int, eta: float, *, heun: bool) -> FloatArray:
    """Weights [order] of x0, x0[-1], ... in step i of DPM-Solver++, to be multiplied by alpha_t.

    The SDE has (1 + eta) h for h. In its third order diffusers has -1/2 where the ODE's formula and
    k-diffusion have +1/2; we have what diffusers has.
    """
    lambdas = levels.lambdas
    u = (1 + eta) * float(lambdas[i + 1] - lambdas[i])
    return _dpmpp_weights(lambdas, i, order, u, heun=heun, last=-0.5 if eta else 0.5)


def _noise_weights(levels: LogSnrLevels, i: int, order: int, _eta: float, *, heun: bool) -> FloatArray:
    """Weights [order] of the noise, the noise before, ... in step i of DPM-Solver (Lu et al. 2022a).

    To be multiplied by alpha_t. They are those of DPM-Solver++ with -h for h; to sigma 0 the first order's is
    finite in another form.
    """
    lambdas, sigmas = levels.lambdas, levels.sigmas
    if order == 1:
        return np.array([sigmas[i + 1] - sigmas[i]])
    u = -float(lambdas[i + 1] - lambdas[i])
    return float(sigmas[i + 1]) * _dpmpp_weights(lambdas, i, order, u, heun=heun, last=0.5)


def _dpmpp_weights(
    lambdas: FloatArray, i: int, order: int, u: float, *, heun: bool, last: float
) -> FloatArray:
    """Weights [order] of d, d[-1], d[-2] for an exponential that falls by u over step i.

    D1 and D2 are divided differences of d (Lu et al. 2022b, appendix B). The second order is of the midpoint
    rule or, with ``heun``, the exact integral of the polynomial, as the third is.
    """
    h = lambdas[i + 1] - lambdas[i]
    gain = -math.expm1(-u)
    if order == 1:
        return np.array([gain])
    r0 = (lambdas[i] - lambdas[i - 1]) / h
    first = np.array([1.0, -1.0, 0.0]) / r0
    if order == 2:
        share = (1 - gain / u if heun else gain / 2) / r0
        return np.array([gain + share, -share])
    r1 = (lambdas[i - 1] - lambdas[i - 2]) / h
    earlier = np.array([0.0, 1.0, -1.0]) / r1
    d1 = first + r0 / (r0 + r1) * (first - earlier)
    d2 = (first - earlier) / (r0 + r1)
    phi2 = 1 - gain / u
    phi3 = (gain - u) / u**2 + last
    weights: FloatArray = gain * np.array([1.0, 0.0, 0.0]) + phi2 * d1 + phi3 * d2
    return weights


def unipc_weights(
    lambdas: FloatArray, i: int, order: int, *, corrector: bool, bh1: bool = False
) -> FloatArray:
    """Weights [HISTORY + 1] of d at the end of step i, of d at its begin, one before, ...; over alpha_t.

    The predictor (Zhao et al. 2023, eq. 3) does not read the first, the corrector (eq. 2) does. rho solves
    ``R rho = b`` of theorem 3.1, except the lowest order of each, which is 1/2 whatever h is. Only there B(h)
    matters, since b is divided by it: e^h - 1 or, with ``bh1``, h.
    """
    weights = np.zeros(HISTORY + 1)
    h = lambdas[i + 1] - lambdas[i]
    phi1 = math.expm1(-h)
    weights[1] = -phi1
    behind = (lambdas[i - np.arange(1, order)] - lambdas[i]) / h if order > 1 else np.zeros(0)
    r = np.append(behind, 1.0) if corrector else behind
    if len(r) == 0 or h == 0 or math.isinf(h):
        return weights
    if len(r) == 1:
        rho = np.array([-h / phi1 / 2 if bh1 else 0.5])
    else:
        rho = np.linalg.solve(np.vander(r, increasing=True).T, _unipc_right_side(-h, len(r)))
    for k, (share, node) in enumerate(zip(rho, r, strict=True)):
        slot = 0 if corrector and k == len(r) - 1 else k + 2
        weights[slot] -= phi1 * share / node
        weights[1] += phi1 * share / node
    return weights


def _unipc_right_side(h: float, count: int) -> FloatArray:
    """b of theorem 3.1: ``k! phi_(k+1)(h) h / B(h)`` for k = 1, 2, ..., with ``B(h) = e^h - 1``; [count]."""
    result = np.empty(count)
    phi = math.expm1(h) / h - 1  # h phi_2(h)
    factorial = 1
    for k in range(1, count + 1):
        result[k - 1] = phi * factorial / math.expm1(h)
        factorial *= k + 1
        phi = phi / h - 1 / factorial
    return result


def _exponential_moments(end: float, count: int) -> FloatArray:
    """Integrals of ``u^k e^u`` from 0 to ``end``, at most 0 and perhaps -inf, for k = 0, 1, 2; [count]."""
    if math.isinf(end):
        return np.array([-1.0, 1.0, -2.0])[:count]
    moments = [math.expm1(end), math.exp(end) * (end - 1) + 1, math.exp(end) * (end**2 - 2 * end + 2) - 2]
    return np.array(moments[:count])


def _lowered(levels: LogSnrLevels, options: SamplerOptions, orders: list[int]) -> list[int]:
    """``orders`` with what diffusers' lower_order_final does in a run of few steps: 1 at last, 2 before.

    ``euler_at_final`` lowers the last in every run.
    """
    if options.euler_at_final:
        orders[-1] = 1
    if options.lower_order_final and levels.few:
        orders[-1] = 1
        orders[-2:-1] = [min(order, 2) for order in orders[-2:-1]]
    return orders
