"""All samplers by name, ours and that of others, and the tables that they make.

Adding one is a decorated function in the file of its family; a file of another family is one more in
`_FAMILIES`, and who draws with a sampler of their own puts it into `SAMPLERS`.

A name may be ours or what A1111's web UI, diffusers, ComfyUI or k-diffusion say. Case, spaces, dashes and
underscores say nothing, ``++`` is ``pp``, and a schedule's name may follow (``DPM++ 2M Karras``). Only what
draws the same is a name: "DPM++ 2S a" and "Restart", which are samplers that we do not have, stay unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from sdrt.runtime.checks import did_you_mean, is_number, whole_from
from sdrt.runtime.errors import UsageError
from sdrt.runtime.samplers import log_snr, sigma, timestep
from sdrt.runtime.samplers.sampler import Sampler
from sdrt.runtime.samplers.schedule import NoiseSchedule
from sdrt.runtime.samplers.table import NORMAL, SamplerOptions, SamplerTable

_FAMILIES: Final = (timestep, sigma, log_snr)

_OURS: Final = [one for family in _FAMILIES for one in vars(family).values() if isinstance(one, Sampler)]
SAMPLERS: Final[dict[str, Sampler]] = {one.name: one for one in sorted(_OURS, key=lambda one: one.name)}
# What may follow a sampler's name, in A1111's words → the option that it is here.
SCHEDULES: Final[Mapping[str, Mapping[str, str]]] = {
    "Karras": {"sigma_schedule": "karras"},
    "Exponential": {"sigma_schedule": "exponential"},
    "Beta": {"sigma_schedule": "beta"},
    "SGM Uniform": {"spacing": "sgm_uniform"},
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
    whole_from("num_inference_steps", count, 1, schedule.num_train_timesteps)
    if given not in (None, count):
        raise UsageError(
            f"num_inference_steps is {count}, but there are timesteps or sigmas for {given}: leave it out"
        )
    whole_from("start", start, 0, count - 1)
    if options.sigma_schedule == NORMAL:
        options = replace(options, sigma_schedule=None)
    sampler = SAMPLERS[name]
    table = sampler.solver(sampler.reads(options.applied_to(schedule)), count, options, start)
    return replace(table, start=start, name=name)


def first_step(num_inference_steps: int, strength: float) -> int:
    """The ``start`` of an image-to-image run, which does the last ``strength`` of its steps.

    Rounded down as diffusers' image-to-image pipelines do it (``get_timesteps``), but at least one step is
    done. ``strength`` is in (0, 1]; 1 begins at the first step, whose noise leaves little of the image.

    Raises ``UsageError`` for another strength.
    """
    if not (is_number(strength) and 0.0 < strength <= 1.0):  # so written that NaN is refused
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
        whole_from("solver_order", options.solver_order, 1, sampler.max_order)


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


def find_sampler(name: object) -> tuple[str, Mapping[str, str]]:
    """Our name for a sampler, and the options that its name implies.

    Args:
        name: Ours or another's, with one in `SCHEDULES` after it or not.

    Raises:
        UsageError: No text, or no sampler of that name; the message has the nearest and all of ours.
    """
    if not isinstance(name, str):
        raise UsageError(f"sampler is {name!r}: a name is wanted, one of {', '.join(SAMPLERS)}")
    key, known = _key(name), _by_key()
    for schedule, implied in {"": {}, **SCHEDULES}.items():
        ending = _key(schedule)
        sampler = known.get(key.removesuffix(ending)) if key.endswith(ending) else None
        if sampler is not None:
            return sampler, implied
    raise UsageError(unknown_sampler(name))


def a1111_name(sampler: str, options: Mapping[str, Any]) -> str:
    """A1111's name of one of our samplers with its schedule; ours where it has none.

    Args:
        sampler: Our name.
        options: Of the recipe: ``karras``, ``sigma_schedule`` and ``spacing`` are read.
    """
    asked = {"sigma_schedule": "karras" if options.get("karras") else options.get("sigma_schedule")}
    asked["spacing"] = "sgm_uniform" if options.get("spacing") == "trailing" else options.get("spacing")
    ending = next((word for word, implied in SCHEDULES.items() if implied.items() <= asked.items()), "")
    names = SAMPLERS[sampler].other_names if sampler in SAMPLERS else ()
    return f"{names[0] if names else sampler} {ending}".strip()


def unknown_sampler(name: str) -> str:
    """What is said of a name that is no sampler of ours: the nearest that there is, and all of ours."""
    question = did_you_mean(_key(name), _by_key())
    hint = f" {question}" if question else ""
    return f"unknown sampler {name[:100]!r}:{hint} allowed are {', '.join(sorted(SAMPLERS))}"


def _by_key() -> dict[str, str]:
    """Our name for every name that is known, by its key."""
    return {_key(known): ours for ours, one in SAMPLERS.items() for known in (ours, *one.other_names)}


def _key(name: str) -> str:
    """A name without what says nothing in it."""
    return "".join(filter(str.isalnum, name.casefold().replace("++", "pp")))
