"""A checkpoint's scheduler file against diffusers' pipeline: drawn alike, or refused by the field's name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
from support.checkpoints.checkpoint_damage import SCHEDULER, UNET_CONFIG, configure
from support.checkpoints.scheduler_cases import EQUAL, KARRAS, NO_CLIP, PUBLISHED, REFUSED, Config, alone, of
from support.references.solver_reference import (
    REFERENCES,
    SHAPE,
    diffusers_run,
    fake_model,
    normal,
    quick_to_make,
    relative_error,
    scheduler_class,
    set_timesteps,
    step_options,
)

import tolerances
from sdrt.export.checkpoint.families import CHECKPOINT_FAMILIES
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.checkpoint.scheduler import CheckpointScheduler, read_scheduler
from sdrt.export.checkpoint.scheduler_classes import CLASSES, Only, Use
from sdrt.runtime.errors import CheckpointError, UsageError
from sdrt.runtime.samplers.registry import SAMPLERS, make_table
from sdrt.runtime.samplers.schedule import NoiseSchedule
from sdrt.runtime.samplers.table import CHECKPOINT_OPTIONS, NO_OPTIONS, SamplerOptions, run_table

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of the corrections that the pipelines make
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
]
STEPS = (4, 20)
DISTILLED_STEPS = (4, 8)


def as_diffusers_reads(config: Mapping[str, Any], pipeline: str = "StableDiffusionPipeline") -> Any:
    """The scheduler of a pipeline that was loaded from a folder with this file."""
    kind = scheduler_class(config["_class_name"])
    with quick_to_make(kind):
        scheduler = kind.from_config(dict(config))
    nothing = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor")
    )
    made = getattr(diffusers, pipeline)(scheduler=scheduler, requires_safety_checker=False, **nothing)
    return made.scheduler


def from_config(name: str, scheduler: Any) -> Any:
    """What a user of diffusers puts in its place: our sampler's class, with the options that make it that."""
    kind, options = scheduler_class(REFERENCES[name].scheduler), dict(REFERENCES[name].options)
    if name == "dpmpp_2m":
        options = {}
    with quick_to_make(kind):
        return kind.from_config(scheduler.config, **options)


def model_of(schedule: NoiseSchedule) -> Any:
    """`fake_model` with timesteps that matter as much: those of EDM models lie between -2 and 2."""
    if schedule.edm is None:
        return fake_model
    return lambda x, timestep: fake_model(x, 300 * (timestep + 2))


def difference(name: str, ours: CheckpointScheduler, scheduler: Any, steps: int) -> float:
    """Relative error of a run of our sampler with the checkpoint's options against diffusers' scheduler."""
    options = SamplerOptions(**SAMPLERS[name].inherited(ours.options))
    table, model = make_table(name, ours.schedule, steps, options), model_of(ours.schedule)
    set_timesteps(scheduler, steps)
    assert table.init_noise_sigma == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)
    start, noise = normal(*SHAPE) * table.init_noise_sigma, normal(len(table), *SHAPE, seed=1)
    if name == "ddpm":  # diffusers adds 1e-10 of noise to the result, we do not
        noise[-1] = 0.0
    more = step_options(name, options)
    expected = diffusers_run(name, scheduler, model, start, noise, **more).last
    return relative_error(run_table(table, model, start, noise), expected)


def worst(name: str, ours: CheckpointScheduler, scheduler: Any) -> dict[int, float]:
    counts = DISTILLED_STEPS if name in ("lcm", "tcd") else STEPS
    return {steps: difference(name, ours, scheduler, steps) for steps in counts}


def most(name: str, schedule: NoiseSchedule) -> float:
    """As the tolerances say of a run, for a larger first x."""
    _, sigma_max = SAMPLERS[name].reads(schedule).sigma_range
    run = tolerances.SAMPLER_RUN_DEIS if name == "deis" else tolerances.SAMPLER_RUN
    return run * max(1.0, sigma_max / 14.7)


@pytest.mark.parametrize("case", EQUAL)
def test_the_default_sampler_draws_as_diffusers_own_scheduler(case: str) -> None:
    ours = read_scheduler(EQUAL[case])
    errors = worst(ours.sampler, ours, as_diffusers_reads(EQUAL[case]))
    assert max(errors.values()) <= most(ours.sampler, ours.schedule), errors


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_drawn_otherwise_is_refused_by_its_name(case: str) -> None:
    config, words = REFUSED[case]
    with pytest.raises(UsageError, match=words) as caught:
        read_scheduler(config)
    assert "\n" not in str(caught.value)


def test_as_many_files_as_are_met_were_compared() -> None:
    assert len(EQUAL) + len(REFUSED) >= 44


# Files that do not say something, or say more than their class reads, drawn with other samplers.
OTHERS = {
    **PUBLISHED,
    "karras": EQUAL["euler karras"],
    "order 3": EQUAL["unipc order 3"],
    "dpmpp heun": EQUAL["dpmpp heun"],
    "sigma_min": EQUAL["euler sigma_min"],
    "zero snr": {**EQUAL["euler zero snr"], **NO_CLIP},
    "said for others": of(
        "EulerAncestralDiscrete", **NO_CLIP, **KARRAS, solver_order=3, lower_order_final=False
    ),
}


def can_end(name: str, config: Config) -> bool:
    """Without lower orders diffusers' UniPC does not reach sigma 0; see the samplers' test_solvers.py."""
    return name != "unipc" or config.get("lower_order_final", True)


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in OTHERS for name in SAMPLERS if can_end(name, OTHERS[case])],
)
def test_another_sampler_reads_the_file_as_from_config_does(case: str, name: str) -> None:
    ours, scheduler = read_scheduler(OTHERS[case]), as_diffusers_reads(OTHERS[case])
    errors = worst(name, ours, from_config(name, scheduler))
    assert max(errors.values()) <= most(name, ours.schedule), errors


def parameters(scheduler: str) -> dict[str, Any]:
    signature = inspect.signature(scheduler_class(scheduler).__init__)
    return {name: given.default for name, given in signature.parameters.items() if name != "self"}


@pytest.mark.parametrize("scheduler", CLASSES)
def test_every_field_of_every_class_is_known(scheduler: str) -> None:
    """So that what a new diffusers adds is looked at."""
    kind = CLASSES[scheduler]
    assert dict(kind.defaults) == parameters(scheduler)
    assert all(isinstance(kind.use(field), Use | Only) for field in kind.defaults)
    assert kind.sampler in SAMPLERS


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_have_the_defaults_of_their_classes(name: str) -> None:
    fields, sampler = parameters(REFERENCES[name].scheduler), SAMPLERS[name]
    assert sampler.timestep_spacing == fields["timestep_spacing"]
    assert sampler.set_alpha_to_one == fields.get("set_alpha_to_one", True)
    assert sampler.zero_snr == ("rescale_betas_zero_snr" in fields)
    has = {option for option in CHECKPOINT_OPTIONS if option in fields}
    if "use_karras_sigmas" in fields:
        has.add("sigma_schedule")
    fixed = {
        "deis": {"algorithm_type", "solver_type"},  # each of one value
        "dpmpp_2m_sde": {"algorithm_type", "solver_order"},  # which is what the name says
        "dpmpp_3m_sde": {"algorithm_type", "solver_order"},
    }
    assert sampler.inherits == has - fixed.get(name, set())


@pytest.mark.parametrize(
    ("family", "inpainting", "pipeline"),
    [
        ("sd", False, "StableDiffusionPipeline"),
        ("sd", True, "StableDiffusionInpaintPipeline"),
    ],
)
def test_corrections_are_those_of_diffusers_pipelines(family: str, inpainting: bool, pipeline: str) -> None:
    outdated = of("PNDM", skip_prk_steps=False, steps_offset=0)
    corrected = as_diffusers_reads(outdated, pipeline).config
    ours = CHECKPOINT_FAMILIES[family].corrections[inpainting]
    assert corrected["steps_offset"] == ours["steps_offset"] == 1
    assert corrected["skip_prk_steps"] == ours.get("skip_prk_steps", False)
    clips = as_diffusers_reads(of("DDIM"), pipeline).config["clip_sample"]
    assert clips == ours.get("clip_sample", True)


@pytest.mark.parametrize(
    ("family", "inpainting"), [("sd", True), ("sdxl", False), ("image-variations", False)]
)
def test_clipping_that_no_pipeline_corrects_is_refused(family: str, inpainting: bool) -> None:
    with pytest.raises(
        UsageError, match=r"clip_sample is not there, and True in DDIMScheduler: .* draw pixels"
    ):
        read_scheduler(of("DDIM"), family, inpainting=inpainting)
    with pytest.raises(UsageError, match="clip_sample is True: "):
        read_scheduler(of("HeunDiscrete", clip_sample=True), family, inpainting=inpainting)
    assert read_scheduler(of("DDIM", **NO_CLIP), family, inpainting=inpainting).remarks == ()


@pytest.mark.parametrize(("family", "offset"), [("sd", 1), ("sdxl", 0), ("image-variations", 0)])
def test_the_offset_is_the_files_own_but_for_the_first_family(family: str, offset: int) -> None:
    for said in ({"steps_offset": 0}, {}):
        config = {**of("DDIM", **NO_CLIP), **said}
        assert said or config.pop("steps_offset") == 1
        assert read_scheduler(config, family).schedule.steps_offset == offset


REMARKS = {
    "pndm": (
        PUBLISHED["sd-1.4"],
        "the default sampler is dpmpp_2m, .* --sampler pndm draws as the checkpoint's",
    ),
    "prk": (of("PNDM"), r"Runge-Kutta steps \(skip_prk_steps\) are not supported"),
    "single-step": (of("DPMSolverSinglestep"), "DPMSolverSinglestepScheduler .* no single-step one"),
    "seed": (of("DPMSolverSDE", noise_sampler_seed=3), "noise_sampler_seed is 3: not kept"),
    "betas": (alone("HeunDiscrete", beta_end=0.02), "beta_start is 0.00085, beta_schedule is 'linear'"),
    "unknown": (of("EulerDiscrete", sharpness=2), "'sharpness': no scheduler of diffusers reads that"),
    "of others": (of("EulerDiscrete", thresholding=True), "thresholding is True, which EulerDiscrete"),
}


@pytest.mark.parametrize("case", REMARKS)
def test_what_is_only_a_preference_is_remarked(case: str) -> None:
    config, words = REMARKS[case]
    (remark,) = read_scheduler(config).remarks
    assert re.search(words, remark), remark


@pytest.mark.parametrize("case", [case for case in PUBLISHED if case != "sd-1.4"])
def test_nothing_is_remarked_of_what_is_drawn_as_it_is(case: str) -> None:
    assert read_scheduler(PUBLISHED[case]).remarks == ()


def test_private_fields_say_nothing() -> None:
    config = of("EulerDiscrete", _diffusers_version="0.6.0", _made_by="x")
    assert read_scheduler(config).remarks == ()


def test_pndm_is_drawn_with_dpm_solver() -> None:
    ours = read_scheduler(PUBLISHED["sd-1.4"])
    assert (ours.sampler, ours.options) == ("dpmpp_2m", NO_OPTIONS)
    assert ours.schedule.timestep_spacing is None
    assert ours.schedule.set_alpha_to_one is False


@pytest.mark.parametrize(("scheduler", "sampler"), [("LCM", "lcm"), ("TCD", "tcd"), ("DDIM", "lcm")])
def test_a_distilled_unet_is_sampled_as_one(scheduler: str, sampler: str) -> None:
    ours = read_scheduler(of(scheduler), distilled=True)
    assert ours.sampler == sampler
    assert len(ours.remarks) == (scheduler == "DDIM")


def test_the_scheduler_is_read_from_the_folder(checkpoint_copy: Path) -> None:
    configure(SCHEDULER, _class_name="UniPCMultistepScheduler", solver_order=3)(checkpoint_copy)
    checkpoint = open_checkpoint(str(checkpoint_copy))
    assert (checkpoint.sampler, checkpoint.sampler_options.solver_order) == ("unipc", 3)
    assert checkpoint.remarks == ()
    configure("model_index.json", scheduler=["diffusers", "DDIMScheduler"])(checkpoint_copy)
    assert open_checkpoint(str(checkpoint_copy)).sampler == "ddim"
    configure("model_index.json", scheduler=["diffusers", "UniPCMultistepScheduler"])(checkpoint_copy)
    configure(SCHEDULER, use_flow_sigmas=True)(checkpoint_copy)
    with pytest.raises(CheckpointError, match=r"/scheduler: use_flow_sigmas is True: .* set it to False"):
        open_checkpoint(str(checkpoint_copy))


def test_a_distilled_unet_in_a_folder(checkpoint_copy: Path) -> None:
    configure(UNET_CONFIG, time_cond_proj_dim=8)(checkpoint_copy)
    checkpoint = open_checkpoint(str(checkpoint_copy))
    assert checkpoint.sampler == "lcm"
    assert "PNDMScheduler does not fit" in checkpoint.remarks[0]
