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

``num_inference_steps`` means what it means in diffusers: how many noise levels a run visits. ``heun``,
``dpm2``, ``dpm2_a`` and ``dpmpp_sde`` call the model twice in every step but the last, so their tables
have ``2 * num_inference_steps - 1`` rows; ``pndm`` does its first step twice and has one row more than
steps. ``len(table)`` is the number of rows, which is what a run costs, and ``table.steps`` says which step
a row belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from sdrt.kernels.sampler_row import HISTORY, Column
from sdrt.runtime.errors import UsageError
from sdrt.runtime.schedule import FloatArray, NoiseSchedule, check_integer
from sdrt.runtime.solvers_log_snr import deis, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, unipc
from sdrt.runtime.solvers_sigma import dpm2, dpm2_a, dpmpp_sde, euler, euler_a, heun, lms
from sdrt.runtime.solvers_table import SamplerOptions, SamplerTable
from sdrt.runtime.solvers_timestep import ddim, ddpm, inversion_table, lcm, pndm, tcd

__all__ = [
    "SAMPLERS",
    "Sampler",
    "SamplerOptions",
    "SamplerTable",
    "first_step",
    "inversion_table",
    "make_table",
    "run_table",
]


@dataclass(frozen=True)
class Sampler:
    """A sampler: the function that makes its table, and the options that it has.

    * ``make``: from schedule, num_inference_steps, options and start, all checked;
    * ``options``: names of `SamplerOptions` that mean something to it;
    * ``max_order``: the highest ``solver_order``.
    """

    make: Callable[[NoiseSchedule, int, SamplerOptions, int], SamplerTable]
    options: frozenset[str]
    max_order: int = 1


def _sampler(
    make: Callable[[NoiseSchedule, int, SamplerOptions, int], SamplerTable], *options: str, max_order: int = 1
) -> Sampler:
    return Sampler(make, frozenset(options), max_order)


_LEVELS = ("spacing", "sigma_schedule", "timesteps", "sigmas")
_MULTISTEP = (*_LEVELS, "solver_order", "lower_order_final")

SAMPLERS: dict[str, Sampler] = {
    "ddim": _sampler(ddim, "spacing", "timesteps", "eta"),
    "ddpm": _sampler(ddpm, "spacing", "timesteps"),
    "deis": _sampler(deis, *_MULTISTEP, max_order=3),
    "dpm2": _sampler(dpm2, *_LEVELS),
    "dpm2_a": _sampler(dpm2_a, *_LEVELS, "eta"),
    "dpmpp_2m": _sampler(dpmpp_2m, *_MULTISTEP, max_order=3),
    "dpmpp_2m_sde": _sampler(dpmpp_2m_sde, *_LEVELS, "lower_order_final", "eta"),
    "dpmpp_3m_sde": _sampler(dpmpp_3m_sde, *_LEVELS, "lower_order_final"),
    "dpmpp_sde": _sampler(dpmpp_sde, *_LEVELS, "eta"),
    "euler": _sampler(euler, *_LEVELS),
    "euler_a": _sampler(euler_a, *_LEVELS, "eta"),
    "heun": _sampler(heun, *_LEVELS),
    "lcm": _sampler(lcm, "timesteps", "original_inference_steps"),
    "lms": _sampler(lms, *_LEVELS, "solver_order", max_order=4),
    "pndm": _sampler(pndm, "spacing"),
    "tcd": _sampler(tcd, "timesteps", "eta", "original_inference_steps"),
    "unipc": _sampler(unipc, *_MULTISTEP, max_order=3),
}


def make_table(
    name: str,
    schedule: NoiseSchedule,
    num_inference_steps: int | None = None,
    options: SamplerOptions | None = None,
    *,
    start: int = 0,
    karras: bool = False,
    eta: float = 0.0,
) -> SamplerTable:
    """The table of the sampler called ``name`` in ``SAMPLERS``, every argument checked first.

    ``num_inference_steps`` is 1 to ``schedule.num_train_timesteps``; it may be None where ``options``
    give the timesteps or sigmas. ``start`` (0 to ``num_inference_steps - 1``) leaves out the first steps,
    to begin from an image. ``karras`` and ``eta``, where not False and 0, stand for
    ``SamplerOptions(sigma_schedule="karras", eta=eta)``.

    Raises ``UsageError`` for an unknown name, a number out of range, or an option that the sampler
    does not have.
    """
    if name not in SAMPLERS:
        from sdrt.runtime.sampler_names import unknown_sampler  # which knows what others call them

        raise UsageError(unknown_sampler(name))
    options = SamplerOptions() if options is None else options
    if karras:
        options = replace(options, sigma_schedule="karras")
    if eta:
        options = replace(options, eta=eta)
    _check_options(name, options, karras=karras)
    given = options.num_given_steps
    count = given if num_inference_steps is None else num_inference_steps
    if count is None:
        raise UsageError("num_inference_steps is missing: say how many, or give timesteps or sigmas")
    check_integer("num_inference_steps", count, 1, schedule.num_train_timesteps)
    if given not in (None, count):
        raise UsageError(
            f"num_inference_steps is {count}, but there are timesteps or sigmas for {given}: leave it out"
        )
    check_integer("start", start, 0, count - 1)
    table = SAMPLERS[name].make(options.applied_to(schedule), count, options, start)
    return replace(table, start=start)


def first_step(num_inference_steps: int, strength: float) -> int:
    """The ``start`` of an image-to-image run, which does the last ``strength`` of its steps.

    Rounded down as diffusers' image-to-image pipelines do it (``get_timesteps``), but at least one step is
    done. ``strength`` is in (0, 1]; 1 begins at the first step, whose noise leaves little of the image.

    Raises ``UsageError`` for another strength.
    """
    number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    if not (number and 0.0 < strength <= 1.0):  # so written that NaN is refused
        raise UsageError(
            f"strength is {strength!r}: allowed are numbers above 0, where the image stays as it is, "
            "to 1, where it is drawn anew"
        )
    done = min(int(num_inference_steps * strength), num_inference_steps)
    return num_inference_steps - max(done, 1)


def _check_options(name: str, options: SamplerOptions, *, karras: bool) -> None:
    sampler = SAMPLERS[name]
    for option in options.given:
        if option not in sampler.options:
            having = [other for other in SAMPLERS if option in SAMPLERS[other].options]
            shown = "karras" if karras and option == "sigma_schedule" else option
            raise UsageError(f"the sampler {name} has no {shown}: use it with {', '.join(having)}")
    if options.solver_order is not None:
        check_integer("solver_order", options.solver_order, 1, sampler.max_order)


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
