"""Samplers as tables of coefficients.

A sampler is a function from a noise schedule and a number of steps to a :class:`SamplerTable`. Row
``i`` of the table is one call of the model and one update of the latents ``x``, the same for every
sampler::

    m  = model(INPUT_SCALE * x, timesteps[i])              after guidance
    d  = P * x + Q * m
    x' = A * x + B0 * d + B1 * d[-1] + B2 * d[-2] + B3 * d[-3] + E * saved + C * noise
    if SAVE: saved = x                                     the old x; x' has read the old saved

where ``d[-k]`` is the ``d`` of ``k`` rows before (zero before the first row), ``saved`` starts as
zero and ``noise`` is a fresh standard normal array per row. `sdrt.kernels.sampler_row.Column` is the
layout of a row, :func:`run_table` is this loop in NumPy.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sdrt.kernels.sampler_row import COLUMNS, HISTORY, Column
from sdrt.runtime.errors import UsageError
from sdrt.runtime.schedule import (
    FloatArray,
    NoiseSchedule,
    check_integer,
    karras_sigmas,
    sigma_from_timestep,
    spaced_timesteps,
    timestep_from_sigma,
)


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """What a whole sampling run does, as numbers.

    * ``name``: the sampler's name in ``SAMPLERS``;
    * ``timesteps``: float64 [n], what the model is told; fractional for some samplers;
    * ``rows``: float64 [n, COLUMNS], one row per model call, laid out by `Column`;
    * ``init_noise_sigma``: a run from noise alone starts at ``x = init_noise_sigma * noise``.

    The arrays are read-only.
    """

    name: str
    timesteps: FloatArray
    rows: FloatArray
    init_noise_sigma: float

    def __post_init__(self) -> None:
        if self.rows.shape != (len(self.timesteps), COLUMNS):
            raise UsageError(f"rows are {self.rows.shape}: allowed is {(len(self.timesteps), COLUMNS)}")
        self.timesteps.setflags(write=False)
        self.rows.setflags(write=False)

    @property
    def uses_noise(self) -> bool:
        """Whether any row adds noise."""
        return bool(np.any(self.rows[:, Column.C]))

    @property
    def num_history(self) -> int:
        """How many earlier d must be kept: 0 (one-step samplers) to ``HISTORY - 1``."""
        earlier = np.any(self.rows[:, Column.B1 : Column.B0 + HISTORY], axis=0)
        return int(np.max(np.flatnonzero(earlier) + 1, initial=0))


def ddim(
    schedule: NoiseSchedule, num_inference_steps: int, *, eta: float = 0.0, start: int = 0
) -> SamplerTable:
    """DDIM (Song et al. 2020, eq. 12); its d is the predicted noise.

    ``eta`` in [0, 1] scales the added noise (eq. 16): 0 is deterministic, 1 is DDPM's ancestral
    sampling. ``start`` leaves out that many first rows. Equal to diffusers' ``DDIMScheduler``
    without clipping.
    """
    timesteps = np.round(spaced_timesteps(schedule, num_inference_steps))[start:]
    # As in diffusers, each step goes down by the stride of leading spacing: with the other spacings
    # it does not always land on the next row's timestep.
    previous = timesteps - schedule.num_train_timesteps // num_inference_steps
    alphas_cumprod = schedule.alphas_cumprod
    now = alphas_cumprod[timesteps.astype(np.intp)]
    final = 1.0 if schedule.set_alpha_to_one else alphas_cumprod[0]
    after = np.where(previous >= 0, alphas_cumprod[previous.clip(min=0).astype(np.intp)], final)
    noise = eta * np.sqrt((1 - after) / (1 - now) * (1 - now / after))

    rows = _rows(schedule, np.sqrt((1 - now) / now), predict="epsilon", variance_preserving=True)
    rows[:, Column.A] = np.sqrt(after / now)
    rows[:, Column.B0] = np.sqrt(1 - after - noise**2) - np.sqrt(after / now * (1 - now))
    rows[:, Column.C] = noise
    return SamplerTable("ddim", timesteps, rows, 1.0)


def euler(
    schedule: NoiseSchedule, num_inference_steps: int, *, karras: bool = False, start: int = 0
) -> SamplerTable:
    """Euler's method (Karras et al. 2022, alg. 2 without churn; k-diffusion ``sample_euler``).

    x is the variance-exploding ``x0 + sigma * noise``; d is ``dx/dsigma``, the predicted noise.
    ``karras`` takes the sigmas of eq. 5 between the first and the last that the spacing gives.
    ``start`` leaves out that many first rows. Equal to diffusers' ``EulerDiscreteScheduler``.
    """
    timesteps = spaced_timesteps(schedule, num_inference_steps)
    sigmas = sigma_from_timestep(schedule, timesteps)
    if karras:
        sigmas = karras_sigmas(num_inference_steps, sigmas[-1], sigmas[0])
        timesteps = timestep_from_sigma(schedule, sigmas)
    # diffusers gives x its full variance, sigma^2 + 1, only with leading spacing.
    leading = schedule.timestep_spacing == "leading"
    init_noise_sigma = math.hypot(sigmas[0], 1.0) if leading else float(sigmas[0])

    timesteps, sigmas = timesteps[start:], sigmas[start:]
    rows = _rows(schedule, sigmas, predict="epsilon", variance_preserving=False)
    rows[:, Column.A] = 1.0
    rows[:, Column.B0] = np.append(sigmas[1:], 0.0) - sigmas
    return SamplerTable("euler", timesteps, rows, init_noise_sigma)


def dpmpp_2m(
    schedule: NoiseSchedule, num_inference_steps: int, *, karras: bool = False, start: int = 0
) -> SamplerTable:
    """DPM-Solver++(2M) (Lu et al. 2022b, alg. 2); its d is the predicted clean latents.

    The first row and the last, which goes to sigma 0, are first order. ``karras`` takes the sigmas
    of Karras et al. 2022, eq. 5, over the whole training range. ``start`` leaves out that many first
    rows. Equal to diffusers' ``DPMSolverMultistepScheduler`` (``dpmsolver++``, order 2, midpoint,
    final sigma zero).
    """
    if karras:
        sigmas = karras_sigmas(num_inference_steps, schedule.sigmas[0], schedule.sigmas[-1])
        timesteps = timestep_from_sigma(schedule, sigmas)
        # diffusers makes timesteps whole, for this one beta schedule by cutting off.
        cosine = schedule.beta_schedule == "squaredcos_cap_v2"
        timesteps = np.floor(timesteps) if cosine else np.round(timesteps)
    else:
        timesteps = np.round(spaced_timesteps(schedule, num_inference_steps, drop_last=True))
        sigmas = schedule.sigmas[timesteps.astype(np.intp)]

    timesteps, sigmas = timesteps[start:], sigmas[start:]
    after = np.append(sigmas[1:], 0.0)
    alpha_after = 1 / np.sqrt(1 + after**2)
    gain = alpha_after * (1 - after / sigmas)  # the paper's alpha_t (1 - exp(-h))
    extrapolation = _half_step_ratio(sigmas)

    rows = _rows(schedule, sigmas, predict="x0", variance_preserving=True)
    rows[:, Column.A] = alpha_after * after / rows[:, Column.NOISE]
    rows[:, Column.B0] = gain * (1 + extrapolation)
    rows[:, Column.B1] = -gain * extrapolation
    return SamplerTable("dpmpp_2m", timesteps, rows, 1.0)


SAMPLERS: dict[str, Callable[..., SamplerTable]] = {
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "euler": euler,
}


def make_table(
    name: str,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    karras: bool = False,
    eta: float = 0.0,
    start: int = 0,
) -> SamplerTable:
    """The table of the sampler called ``name`` in ``SAMPLERS``, every argument checked first.

    ``num_inference_steps`` is 1 to ``schedule.num_train_timesteps``; ``karras`` and ``eta`` (0 to
    1) are for the samplers that have them; ``start`` (0 to ``num_inference_steps - 1``) leaves out
    the first rows, to begin from an image.

    Raises ``UsageError`` for an unknown name, a number out of range, or an option that the sampler
    does not have.
    """
    if name not in SAMPLERS:
        raise UsageError(_unknown_sampler(name))
    check_integer("num_inference_steps", num_inference_steps, 1, schedule.num_train_timesteps)
    check_integer("start", start, 0, num_inference_steps - 1)
    if not 0.0 <= eta <= 1.0:  # so written that NaN is refused
        raise UsageError(f"eta is {eta}: allowed are numbers from 0 to 1")
    options: dict[str, float] = {"karras": karras, "eta": eta}
    options = {option: value for option, value in options.items() if value}
    for option in options:
        having = [other for other, sampler in SAMPLERS.items() if option in _options(sampler)]
        if name not in having:
            raise UsageError(f"the sampler {name} has no {option}: use it with {', '.join(having)}")
    return SAMPLERS[name](schedule, num_inference_steps, start=start, **options)


def run_table(
    table: SamplerTable,
    model: Callable[[FloatArray, float], FloatArray],
    x: FloatArray,
    noise: FloatArray | None = None,
) -> FloatArray:
    """The recurrence in plain NumPy: the definition that every faster loop is compared with.

    ``model(scaled_x, timestep)`` returns an array of x's shape, after guidance. ``x`` is the start,
    float64 of any shape; ``noise`` is [n, *x.shape], needed where ``table.uses_noise``. Returns the
    last x. Raises ``UsageError`` where noise is needed and not given.
    """
    history = [np.zeros_like(x)] * HISTORY
    saved = np.zeros_like(x)
    for i, row in enumerate(table.rows):
        m = model(row[Column.INPUT_SCALE] * x, float(table.timesteps[i]))
        d = row[Column.P] * x + row[Column.Q] * m
        history = [d, *history[:-1]]
        new_x = row[Column.A] * x + row[Column.E] * saved
        for k in range(HISTORY):
            new_x += row[Column.B0 + k] * history[k]
        if row[Column.C]:
            if noise is None:
                raise UsageError(f"the sampler {table.name} adds noise: give noise of shape [rows, *x.shape]")
            new_x += row[Column.C] * noise[i]
        if row[Column.SAVE]:
            saved = x
        x = new_x
    return x


def _rows(
    schedule: NoiseSchedule, sigmas: FloatArray, *, predict: str, variance_preserving: bool
) -> FloatArray:
    """Rows [n, COLUMNS] with all that does not depend on the solver; the rest is 0.

    x is ``alpha * (x0 + sigma * noise)`` with ``alpha = 1 / sqrt(1 + sigma^2)`` if
    ``variance_preserving``, else ``x0 + sigma * noise``; the model always sees the former. d is what
    ``predict`` says, the noise ("epsilon") or the clean latents ("x0").
    """
    alpha = 1 / np.sqrt(1 + sigmas**2)
    scale = np.ones_like(alpha) if variance_preserving else alpha
    rows = np.zeros((len(sigmas), COLUMNS))
    rows[:, Column.INPUT_SCALE] = scale
    rows[:, Column.SIGNAL] = alpha / scale
    rows[:, Column.NOISE] = alpha * sigmas / scale
    if schedule.prediction_type == "epsilon":
        rows[:, Column.X0_X], rows[:, Column.X0_M] = scale / alpha, -sigmas
        epsilon_x, epsilon_m = np.zeros_like(alpha), np.ones_like(alpha)
    else:  # v = alpha * noise - alpha * sigma * x0 (Salimans & Ho 2022, appendix D)
        rows[:, Column.X0_X], rows[:, Column.X0_M] = scale * alpha, -sigmas * alpha
        epsilon_x, epsilon_m = scale * sigmas * alpha, alpha
    if predict == "epsilon":
        rows[:, Column.P], rows[:, Column.Q] = epsilon_x, epsilon_m
    else:
        rows[:, Column.P], rows[:, Column.Q] = rows[:, Column.X0_X], rows[:, Column.X0_M]
    return rows


def _half_step_ratio(sigmas: FloatArray) -> FloatArray:
    """1 / (2 r) of DPM-Solver++(2M), r the ratio of the last step in log sigma to this one; [n].

    It is 0, which makes the step first order, in the first row, in the last, and after a step
    between equal sigmas (two timesteps can round to one).
    """
    step = -np.diff(np.log(sigmas))
    ratio = np.zeros_like(sigmas)
    np.divide(0.5 * step[1:], step[:-1], out=ratio[1:-1], where=step[:-1] > 0)
    return ratio


def _options(sampler: Callable[..., SamplerTable]) -> frozenset[str]:
    return frozenset(inspect.signature(sampler).parameters)


def _unknown_sampler(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), SAMPLERS, n=1, cutoff=0.4)
    hint = f" did you mean {near[0]}?" if near else ""
    return f"unknown sampler {name!r}:{hint} allowed are {', '.join(sorted(SAMPLERS))}"
