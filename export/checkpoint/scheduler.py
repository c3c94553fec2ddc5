"""The scheduler that a checkpoint came with: its noise schedule, our sampler for it, and that one's options.

What the file says is kept as it stands, and what it does not say stays unsaid: whoever draws with another
sampler gets what ``Class.from_config(pipe.scheduler.config)`` gives in diffusers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sdrt.export.checkpoint.families import CHECKPOINT_FAMILIES
from sdrt.export.checkpoint.scheduler_classes import CLASSES, FIELDS, Only, SchedulerClass
from sdrt.runtime.bundle.families.stable_diffusion import STABLE_DIFFUSION
from sdrt.runtime.errors import UsageError
from sdrt.runtime.samplers.edm import EdmScaling
from sdrt.runtime.samplers.log_snr import deis, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, unipc
from sdrt.runtime.samplers.registry import SAMPLERS
from sdrt.runtime.samplers.schedule import NoiseSchedule
from sdrt.runtime.samplers.table import SamplerOptions

FILE: Final = "scheduler/scheduler_config.json"
DISTILLED: Final = tuple(name for name, sampler in SAMPLERS.items() if sampler.distilled)
IN_PLACE: Final = "DPMSolverMultistepScheduler"  # of a class that we have no equal of, or do not prefer
SDE: Final = "sde-dpmsolver++"
# Of DPM-Solver; some classes know less of it.
ALGORITHMS: Final = ("dpmsolver++", "dpmsolver", SDE, "deis")
KNOWN_ALGORITHMS: Final = {
    "DEISMultistepScheduler": ("dpmsolver++", "dpmsolver", "deis"),
    "EDMDPMSolverMultistepScheduler": ("dpmsolver++", SDE, "deis"),
}
SOLVER_TYPES: Final = ("midpoint", "heun", "logrho", "bh1", "bh2")
# Each class takes those of the others for its own default; these are left. DEIS has one only.
OWN_SOLVER_TYPES: Final = {dpmpp_2m.name: ("heun",), unipc.name: ("bh1",), deis.name: ()}
_TRAINED: Final = ("beta_start", "beta_end", "beta_schedule")


@dataclass(frozen=True, slots=True)
class CheckpointScheduler:
    """What was read of a scheduler's file.

    Attributes:
        schedule: The noise schedule, with what the file says about timesteps.
        sampler: Ours that is the scheduler's equal or, with a remark, what is drawn with in its place.
        options: The file's, for whichever sampler has them.
        remarks: What is drawn otherwise than diffusers would, and what to do; each a line.
    """

    schedule: NoiseSchedule
    sampler: str
    options: SamplerOptions
    remarks: tuple[str, ...] = ()


def read_scheduler(
    config: Mapping[str, Any],
    family: str = STABLE_DIFFUSION.name,
    *,
    inpainting: bool = False,
    distilled: bool = False,
) -> CheckpointScheduler:
    """A diffusers scheduler's configuration, as diffusers' pipeline of the family reads it.

    Args:
        config: Of the file.
        family: Its name.
        inpainting: The U-Net reads a mask: the pipeline is another.
        distilled: The U-Net is a latent consistency model's: only `DISTILLED` samplers fit it, whatever
            scheduler lies beside it.

    Raises:
        UsageError: The class, or a value that would change the picture, is not supported; names it, and says
            what to do.
    """
    name = _class_name(config)
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    given |= CHECKPOINT_FAMILIES[family].corrections.get(inpainting, {})
    remarks = []
    if distilled and CLASSES[name].sampler not in DISTILLED:
        remarks.append(
            f"{name} does not fit a U-Net that is told its guidance: drawn with lcm, as LCMScheduler"
        )
        name = "LCMScheduler"
    kind = CLASSES[name]
    _check_values(name, kind, given)
    if kind.preference:  # what the class that draws in its place would read of the file
        read = {field: value for field, value in given.items() if field not in kind.defaults}
        _check_values(IN_PLACE, CLASSES[IN_PLACE], read)
    remarks += _remarks(name, kind, given)
    return CheckpointScheduler(
        _schedule(name, kind, given), _sampler(kind, given), _options(name, kind, given), tuple(remarks)
    )


def noising_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The betas of a scheduler that lays noise over a given picture, a DDPMScheduler in diffusers' pipelines.

    Raises:
        UsageError: It is of a class that is not known, or its betas make no schedule.
    """
    name = _class_name(config)
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    if "sigma_data" in CLASSES[name].defaults:
        raise UsageError(f"_class_name is {name}: noise is laid over a picture by betas, as in DDPMScheduler")
    values = {**CLASSES[name].defaults, **given}
    betas = values["trained_betas"]
    return NoiseSchedule(
        num_train_timesteps=values["num_train_timesteps"],
        **{field: values[field] for field in _TRAINED},
        trained_betas=tuple(betas) if isinstance(betas, list) else betas,
        rescale_betas_zero_snr=given.get("rescale_betas_zero_snr", False),
    )


def _class_name(config: Mapping[str, Any]) -> str:
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise UsageError(f"_class_name is {name!r}: {FILE} must name a scheduler class of diffusers")
    if name not in CLASSES:
        raise UsageError(
            f"_class_name is {name[:60]!r}: this scheduler is not supported; those that are: "
            f"{', '.join(sorted(CLASSES))}. Save the pipeline with one that fits its model"
        )
    return name


def _check_values(name: str, kind: SchedulerClass, given: Mapping[str, Any]) -> None:
    """Refuse what the class reads and we do not draw, also where it is the class's default."""
    for field, default in kind.defaults.items():
        use, value = kind.use(field), given.get(field, default)
        if isinstance(use, Only):
            if not _is_one_of(value, use.values):
                said = f"is {value!r}" if field in given else f"is not there, and {value!r} in {name}"
                allowed = " or ".join(map(repr, use.values))
                raise UsageError(
                    f"{field} {said}: {use.why}. If the model does not need it, set it to {allowed} in {FILE}"
                )
        elif value is None and default is not None and not isinstance(default, bool):
            raise UsageError(f"{field} is null: leave it out of {FILE}, or give a value")


def _is_one_of(value: object, values: tuple[Any, ...]) -> bool:
    """Whether a value is among those allowed; null is what diffusers takes for false."""
    return value in values or (value is None and False in values)


def _remarks(name: str, kind: SchedulerClass, given: Mapping[str, Any]) -> Iterator[str]:
    """What does not stop an export, but whoever exports must know."""
    if kind.preference:
        whole = name != "PNDMScheduler" or given.get("skip_prk_steps", False)
        why = kind.preference if whole else "for its Runge-Kutta steps (skip_prk_steps) are not supported"
        yield f"{name} is the checkpoint's scheduler, the default sampler is {kind.sampler}, {why}"
    if given.get("noise_sampler_seed") is not None and "noise_sampler_seed" in kind.defaults:
        yield f"noise_sampler_seed is {given['noise_sampler_seed']!r}: not kept, --seed decides the noise"
    if missing := [field for field in _TRAINED if field in kind.defaults and field not in given]:
        shown = ", ".join(f"{field} is {kind.defaults[field]!r}" for field in missing)
        if given.get("trained_betas") is None:
            yield f"{FILE} leaves out how the model was trained: {shown}, as in {name}, for all samplers"
    for field, value in given.items():
        use = FIELDS.get(field)
        if field not in kind.defaults and isinstance(use, Only) and not _is_one_of(value, use.values):
            yield f"{field} is {value!r}, which {name} does not read: other samplers draw without it, too"
    if unknown := [repr(field[:40]) for field in given if field not in FIELDS]:
        yield f"{FILE} has {', '.join(unknown[:8])}: no scheduler of diffusers reads that"


def _schedule(name: str, kind: SchedulerClass, given: Mapping[str, Any]) -> NoiseSchedule:
    values = {**kind.defaults, **given}
    said: dict[str, Any] = {
        "num_train_timesteps": values["num_train_timesteps"],
        "prediction_type": values["prediction_type"],
        "timestep_spacing": given.get("timestep_spacing"),
        "set_alpha_to_one": given.get("set_alpha_to_one"),
        "steps_offset": given.get("steps_offset", 0),
    }
    try:
        if "sigma_data" in kind.defaults:
            names = [field.name for field in dataclasses.fields(EdmScaling)]
            return NoiseSchedule(**said, edm=EdmScaling(**{field: values[field] for field in names}))
        betas = values["trained_betas"]
        schedule = NoiseSchedule(
            **said,
            **{field: values[field] for field in _TRAINED},
            trained_betas=tuple(betas) if isinstance(betas, list) else betas,
            rescale_betas_zero_snr=given.get("rescale_betas_zero_snr", False),
        )
    except UsageError as error:
        raise UsageError(
            f"{error}; {name} is drawn with these only: correct {FILE} if the model is such"
        ) from error
    if schedule.rescale_betas_zero_snr and schedule.prediction_type == "epsilon":
        raise UsageError(
            "rescale_betas_zero_snr is set for a model that predicts the noise, which says nothing where "
            "there is noise alone: set prediction_type to what the model predicts, or rescale_betas_zero_snr "
            "to false"
        )
    return schedule


def _sampler(kind: SchedulerClass, given: Mapping[str, Any]) -> str:
    """The class's sampler; DPM-Solver++ of the SDE is one of its own for each order."""
    algorithm = given.get("algorithm_type", "dpmsolver++")
    if kind.sampler != dpmpp_2m.name or kind.preference or algorithm != SDE:
        return kind.sampler
    orders = {2: dpmpp_2m_sde.name}
    if "sigma_data" not in kind.defaults:
        orders[3] = dpmpp_3m_sde.name
    order = given.get("solver_order", 2)
    if order not in orders:
        raise UsageError(
            f"solver_order is {order!r}: with algorithm_type {SDE!r} allowed are "
            f"{' and '.join(map(str, orders))}; set it so in {FILE}"
        )
    return orders[order]


def _options(name: str, kind: SchedulerClass, given: Mapping[str, Any]) -> SamplerOptions:
    options = {
        field: given[field]
        for field in ("lower_order_final", "original_inference_steps", "final_sigmas_type", "euler_at_final")
        if given.get(field) is not None
    }
    schedules = [one for one in ("karras", "exponential", "beta") if given.get(f"use_{one}_sigmas")]
    if len(schedules) > 1:
        shown = ", ".join(f"use_{one}_sigmas" for one in schedules)
        raise UsageError(f"{shown} are all true: they contradict each other, leave one of them in {FILE}")
    if schedules:
        options["sigma_schedule"] = schedules[0]
    if (order := given.get("solver_order", 2)) != 2:  # which is every sampler's default
        options["solver_order"] = order
        if isinstance(order, bool) or order not in (1, 2, 3):
            raise UsageError(f"solver_order is {order!r}: allowed are 1 to 3; set it so in {FILE}")
    options |= _solver(name, kind, given)
    try:
        return SamplerOptions(**options)
    except UsageError as error:
        raise UsageError(f"{error}; correct {FILE}") from error


def _solver(name: str, kind: SchedulerClass, given: Mapping[str, Any]) -> dict[str, Any]:
    """The two fields that say which solver of a family it is."""
    algorithm, solver = given.get("algorithm_type", "dpmsolver++"), given.get("solver_type", "midpoint")
    for field, value, allowed in (
        ("algorithm_type", algorithm, KNOWN_ALGORITHMS.get(name, ALGORITHMS)),
        ("solver_type", solver, SOLVER_TYPES),
    ):
        if value not in allowed:
            raise UsageError(
                f"{field} is {value!r}: not supported; set it to one of {', '.join(allowed)} in {FILE} "
                "(another picture), or save the pipeline with another scheduler"
            )
    options = {}
    if solver in OWN_SOLVER_TYPES.get(kind.sampler, ("heun", "bh1")):
        options["solver_type"] = solver
    if algorithm == "dpmsolver" and kind.sampler == dpmpp_2m.name:
        if given.get("final_sigmas_type", "zero") == "zero":
            raise UsageError(
                "algorithm_type is 'dpmsolver' with final_sigmas_type 'zero', which diffusers refuses, too: "
                f"set final_sigmas_type to 'sigma_min' in {FILE}, or algorithm_type to 'dpmsolver++'"
            )
        options["algorithm_type"] = algorithm
    return options
