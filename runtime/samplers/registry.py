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
from typing import Any

import numpy as np

from sdrt.kernels.sampler_row import HISTORY, Column
from sdrt.runtime.errors import UsageError
from sdrt.runtime.samplers.log_snr import deis, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, unipc
from sdrt.runtime.samplers.schedule import FloatArray, NoiseSchedule, check_integer
from sdrt.runtime.samplers.sigma import dpm2, dpm2_a, dpmpp_sde, euler, euler_a, heun, lms
from sdrt.runtime.samplers.table import NORMAL, SamplerOptions, SamplerTable
from sdrt.runtime.samplers.timestep import ddim, ddpm, inversion_table, lcm, pndm, tcd

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
    """A sampler: the function that makes its table, the options it has, and how it reads a checkpoint.

    What it does with a checkpoint's configuration is what diffusers' class does that it equals, so that
    choosing it is ``Class.from_config(pipe.scheduler.config)``.

    * ``make``: from schedule, num_inference_steps, options and start, all checked;
    * ``options``: names of `SamplerOptions` that mean something to it;
    * ``inherits``: those of them whose defaults a bundle may set;
    * ``max_order``: the highest ``solver_order``;
    * ``timestep_spacing``, ``set_alpha_to_one``: where the checkpoint does not say its own;
    * ``zero_snr``: whether it knows ``rescale_betas_zero_snr``, which it leaves out if not;
    * ``edm``: whether it can draw with an EDM model, which has sigmas in place of training timesteps.
    """

    make: Callable[[NoiseSchedule, int, SamplerOptions, int], SamplerTable]
    options: frozenset[str]
    inherits: frozenset[str]
    max_order: int
    timestep_spacing: str
    set_alpha_to_one: bool
    zero_snr: bool
    edm: bool

    def reads(self, schedule: NoiseSchedule) -> NoiseSchedule:
        """The schedule with this sampler's defaults, and without what it does not know."""
        if schedule.rescale_betas_zero_snr and not self.zero_snr:
            schedule = replace(schedule, rescale_betas_zero_snr=False)
        return schedule.with_defaults(
            timestep_spacing=self.timestep_spacing, set_alpha_to_one=self.set_alpha_to_one
        )

    def inherited(self, defaults: SamplerOptions) -> dict[str, Any]:
        """Those of a bundle's defaults that are this sampler's, by name."""
        return {name: value for name, value in defaults.to_dict().items() if name in self.inherits}


def _sampler(
    make: Callable[[NoiseSchedule, int, SamplerOptions, int], SamplerTable],
    options: str,
    *,
    inherits: str = "",
    max_order: int = 1,
    spacing: str = "linspace",
    alpha_to_one: bool = True,
    zero_snr: bool = False,
) -> Sampler:
    """A record of names in one text; those with sigmas among their options can draw with EDM models."""
    own = frozenset(inherits.split())
    names = frozenset(options.split()) | own
    return Sampler(make, names, own, max_order, spacing, alpha_to_one, zero_snr, "sigmas" in names)


_LEVELS = "spacing sigma_schedule timesteps sigmas"
_STEPS = "sigma_schedule lower_order_final"
_DPM = f"{_STEPS} solver_type final_sigmas_type euler_at_final"

SAMPLERS: dict[str, Sampler] = {
    "ddim": _sampler(ddim, "spacing timesteps eta", spacing="leading", zero_snr=True),
    "ddpm": _sampler(ddpm, "spacing timesteps", spacing="leading", zero_snr=True),
    "deis": _sampler(deis, _LEVELS, inherits=f"{_STEPS} solver_order", max_order=3),
    "dpm2": _sampler(dpm2, _LEVELS, inherits="sigma_schedule"),
    "dpm2_a": _sampler(dpm2_a, f"{_LEVELS} eta", inherits="sigma_schedule"),
    "dpmpp_2m": _sampler(
        dpmpp_2m, _LEVELS, inherits=f"{_DPM} solver_order algorithm_type", max_order=3, zero_snr=True
    ),
    "dpmpp_2m_sde": _sampler(dpmpp_2m_sde, f"{_LEVELS} eta", inherits=_DPM, zero_snr=True),
    "dpmpp_3m_sde": _sampler(dpmpp_3m_sde, _LEVELS, inherits=_DPM, zero_snr=True),
    "dpmpp_sde": _sampler(dpmpp_sde, f"{_LEVELS} eta", inherits="sigma_schedule"),
    "euler": _sampler(euler, _LEVELS, inherits="sigma_schedule final_sigmas_type", zero_snr=True),
    "euler_a": _sampler(euler_a, f"{_LEVELS} eta", zero_snr=True),
    "heun": _sampler(heun, _LEVELS, inherits="sigma_schedule"),
    "lcm": _sampler(lcm, "timesteps", inherits="original_inference_steps", spacing="leading", zero_snr=True),
    "lms": _sampler(lms, f"{_LEVELS} solver_order", inherits="sigma_schedule", max_order=4),
    "pndm": _sampler(pndm, "spacing", spacing="leading", alpha_to_one=False),
    "tcd": _sampler(
        tcd, "timesteps eta", inherits="original_inference_steps", spacing="leading", zero_snr=True
    ),
    "unipc": _sampler(
        unipc,
        _LEVELS,
        inherits=f"{_STEPS} solver_order solver_type final_sigmas_type",
        max_order=3,
        zero_snr=True,
    ),
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
        from sdrt.runtime.samplers.names import unknown_sampler  # which knows what others call them

        raise UsageError(unknown_sampler(name))
    options = SamplerOptions() if options is None else options
    if karras:
        options = replace(options, sigma_schedule="karras")
    if eta:
        options = replace(options, eta=eta)
    _check_options(name, options, karras=karras)
    if schedule.edm is not None:
        _check_edm(name, options)
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
    if options.sigma_schedule == NORMAL:
        options = replace(options, sigma_schedule=None)
    sampler = SAMPLERS[name]
    table = sampler.make(sampler.reads(options.applied_to(schedule)), count, options, start)
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


def _check_edm(name: str, options: SamplerOptions) -> None:
    if not SAMPLERS[name].edm:
        able = ", ".join(other for other in SAMPLERS if SAMPLERS[other].edm)
        raise UsageError(
            f"the sampler {name} goes from one training timestep to another, and this model has none (it is "
            f"an EDM model): use {able}"
        )
    for option in ("spacing", "timesteps"):
        if option in options.given:
            raise UsageError(
                f"{option}: this model has no training timesteps (it is an EDM model); give sigmas instead"
            )


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
