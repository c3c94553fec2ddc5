"""How a call samples: the sampler's table, and the guidance of each of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.bundle.families.components import TIMESTEP_COND
from sdrt.runtime.bundle.families.instruct_pix2pix import IMAGE_GUIDANCE_SCALE
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.checks import flag, number, share, whole
from sdrt.runtime.errors import UsageError
from sdrt.runtime.request.options import OPTIONS
from sdrt.runtime.request.schedule_part import build_part
from sdrt.runtime.samplers.guidance import MAX_GUIDANCE_SCALE, guidance_weights
from sdrt.runtime.samplers.registry import SAMPLERS, find_sampler, first_step, make_table
from sdrt.runtime.samplers.schedule import NoiseSchedule
from sdrt.runtime.samplers.table import SamplerOptions, SamplerTable

DEFAULT_IMAGE_GUIDANCE: Final = 1.5  # of diffusers' pipelines
MAX_ROWS: Final = 2048  # of a table: two evaluations for each trained timestep, and a few


@dataclass(frozen=True, slots=True)
class Sampling:
    """A call's way from noise to a picture.

    Attributes:
        table: The sampler's rows; some samplers have more than one for a step.
        schedule: The bundle's, with the spacing that was asked for.
        weights: float32 [rows], w of each row; a row of 1 or less runs the conditional half alone.
        guidance_rescale: phi.
        image_guidance: v of guidance by text and picture; 0 in families that have none.
        embedded_guidance: w that the U-Net is told in place of guidance (latent consistency models), or None.
        recipe: The arguments behind it, as plain data.
    """

    table: SamplerTable
    schedule: NoiseSchedule
    weights: NDArray[np.float32]
    guidance_rescale: float
    image_guidance: float
    embedded_guidance: float | None
    recipe: Mapping[str, Any]

    @property
    def guided(self) -> bool:
        """Whether any row runs the unconditional half."""
        return bool((self.weights > 1.0).any())


def build_sampling(manifest: Manifest, options: Mapping[str, Any], strength: float | None) -> Sampling:
    """Check what of a call's options is about sampling.

    Args:
        manifest: The bundle's manifest.
        options: See `sdrt.runtime.request.options.DrawOptions`.
        strength: The share of the schedule that is run on a picture; None for a whole run.

    Raises:
        UsageError: An option is of a wrong type, out of range, or not one of the sampler's.
    """
    defaults = manifest.defaults
    sampler = options.get("sampler")
    sampler = defaults.sampler if sampler is None else sampler
    sampler, implied = find_sampler(sampler)
    options = _with_implied(options, implied)
    karras = flag("karras", options.get("karras", False))
    eta = options.get("eta")
    eta = None if eta is None else number("eta", eta)
    inherited = SAMPLERS[sampler].inherited(defaults.sampler_options) if sampler in SAMPLERS else {}
    chosen = _sampler_options(sampler, options, inherited, karras=karras, eta=eta)
    steps = _steps(manifest, chosen, options.get("num_inference_steps"))
    start = 0 if strength is None else first_step(steps, strength)
    part = build_part(options)
    table, counted = part.cut(
        lambda first: make_table(sampler, manifest.schedule, steps, chosen, start=first, karras=karras),
        manifest.schedule,
        start,
    )
    if len(table) > MAX_ROWS:
        raise UsageError(
            f"num_inference_steps is {steps}, which is {len(table)} evaluations of the unet with "
            f"{sampler}: at most {MAX_ROWS}"
        )
    scale = options.get("guidance_scale")
    scale = defaults.guidance_scale if scale is None else _scale(scale)
    interval = options.get("guidance_interval")
    embeds_guidance = manifest.components["unet"].spec.input(TIMESTEP_COND) is not None
    rescale = share("guidance_rescale", options.get("guidance_rescale", 0.0))
    guided = (0.0, 1.0) if interval is None else interval
    weights = _weights(table, counted, 1.0 if embeds_guidance else scale, guided)
    image_guidance = _image_guidance(manifest, options.get(IMAGE_GUIDANCE_SCALE))
    recipe = {
        "num_inference_steps": steps,
        "guidance_scale": _plain(scale),
        **image_guidance,
        "sampler": table.name,
        "karras": karras,
        "eta": eta,
        **_beyond_usual(chosen, inherited),
        **({} if interval is None else {"guidance_interval": _plain(interval)}),
        **({"guidance_rescale": rescale} if rescale else {}),
        **part.recipe,
    }
    return Sampling(
        table=table,
        schedule=chosen.applied_to(manifest.schedule),
        weights=weights.astype(np.float32),
        guidance_rescale=rescale,
        image_guidance=image_guidance.get(IMAGE_GUIDANCE_SCALE, 0.0),
        embedded_guidance=_embedded(table, scale, interval, rescale) if embeds_guidance else None,
        recipe=recipe,
    )


def _weights(
    table: SamplerTable, counted: SamplerTable, scale: float | list[float], interval: Any
) -> NDArray[np.float64]:
    """w of each row of a part of the schedule, as in the run that ``counted`` is."""
    weights = guidance_weights(counted, scale, interval)
    if counted is table:
        return weights
    of_step = dict(zip((counted.start + counted.steps).tolist(), weights, strict=True))
    return np.array([of_step[step] for step in (table.start + table.steps).tolist()])


def _with_implied(options: Mapping[str, Any], implied: Mapping[str, str]) -> Mapping[str, Any]:
    """The options with those that the sampler's name implies, as ``DPM++ 2M Karras`` does."""
    for name, value in implied.items():
        if options.get(name) not in (None, value):
            raise UsageError(
                f"sampler is {options['sampler']!r} and {name} {options[name]!r}: they contradict each other"
            )
    return {**options, **implied}


def _scale(given: object) -> float | list[float]:
    """One w, or one for each step."""
    if isinstance(given, np.ndarray):
        given = given.tolist()
    if isinstance(given, Sequence) and not isinstance(given, str):
        return [number("an entry of guidance_scale", entry) for entry in given]
    return number("guidance_scale", given)


def _image_guidance(manifest: Manifest, given: object) -> dict[str, float]:
    """v as the recipe has it; nothing in a family that is guided by the text alone."""
    if IMAGE_GUIDANCE_SCALE not in manifest.record.own:
        return {}
    scale = DEFAULT_IMAGE_GUIDANCE if given is None else number(IMAGE_GUIDANCE_SCALE, given)
    if not 1.0 <= scale <= MAX_GUIDANCE_SCALE:
        raise UsageError(
            f"{IMAGE_GUIDANCE_SCALE} is {given!r}: allowed are numbers from 1, which keeps to the picture as "
            f"the model does by itself, to {MAX_GUIDANCE_SCALE:g}"
        )
    return {IMAGE_GUIDANCE_SCALE: scale}


def _embedded(table: SamplerTable, scale: float | list[float], interval: object, rescale: float) -> float:
    """The one w that a latent consistency model is told."""
    if rescale:
        raise UsageError(
            f"guidance_rescale is {rescale:g}: this model is told its guidance, there is nothing to rescale"
        )
    if interval is not None:
        raise UsageError("guidance_interval is given: this model is told its guidance and runs one half")
    if isinstance(scale, Sequence):
        raise UsageError("guidance_scale is a list: this model is told one number, and runs one half")
    guidance_weights(table, scale)  # in its range
    return number("guidance_scale", scale)


def _sampler_options(
    sampler: str,
    options: Mapping[str, Any],
    inherited: Mapping[str, Any],
    *,
    karras: bool,
    eta: float | None,
) -> SamplerOptions:
    """What a call gives over the bundle's defaults for its sampler."""
    given: dict[str, Any] = {
        name: options[name] for name in ("spacing", "sigma_schedule") if options.get(name) is not None
    }
    for name in ("timesteps", "sigmas"):
        if (values := options.get(name)) is not None:
            given[name] = _numbers(name, values)
    for name in ("solver_order", "original_inference_steps"):
        if options.get(name) is not None:
            given[name] = whole(name, options[name])
    if options.get("lower_order_final") is not None:
        given["lower_order_final"] = flag("lower_order_final", options["lower_order_final"])
    if karras and given.pop("sigma_schedule", "karras") != "karras":
        name = options["sigma_schedule"]
        raise UsageError(f"karras and sigma_schedule {name!r} are given: they contradict each other")
    # No noise is what a sampler without `eta` has anyway; one that has it must be told of a zero.
    has_eta = sampler in SAMPLERS and "eta" in SAMPLERS[sampler].options
    if eta or (has_eta and eta is not None):
        given["eta"] = eta
    # Where a call says in another way which sigmas it wants, the bundle's way does not count.
    other_sigmas = karras or "timesteps" in given or "sigmas" in given
    kept = {
        name: value for name, value in inherited.items() if not (other_sigmas and name == "sigma_schedule")
    }
    return SamplerOptions(**{**kept, **given})


def _steps(manifest: Manifest, chosen: SamplerOptions, asked: object) -> int:
    given = chosen.num_given_steps
    if asked is None and given is not None:
        return given
    count = manifest.defaults.num_inference_steps if asked is None else whole("num_inference_steps", asked)
    most = manifest.schedule.num_train_timesteps
    if not 1 <= count <= most:
        raise UsageError(f"num_inference_steps is {count}: allowed are whole numbers from 1 to {most}")
    return count


def _numbers(name: str, values: object) -> tuple[float, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
        raise UsageError(f"{name} are {values!r}: a list of numbers is wanted")
    return tuple(number(f"an entry of {name}", value) for value in values)


def _plain(value: Any) -> Any:
    """A number, or numbers, as JSON has them."""
    if isinstance(value, Sequence | np.ndarray):
        return [float(entry) for entry in value]
    return float(value)


def _beyond_usual(chosen: SamplerOptions, inherited: Mapping[str, Any]) -> dict[str, Any]:
    """A call's options that are not at their defaults, or not at the bundle's.

    `karras` and `eta` have entries of their own; what only a bundle can say needs none.
    """
    names = [name for name in OPTIONS if name != "eta" and name in {*chosen.given, *inherited}]
    entries = {name: getattr(chosen, name) for name in names}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in entries.items()
        if value is not None
    }
