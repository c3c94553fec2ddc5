"""A checkpoint's scheduler: the noise schedule that it means, and the sampler that is its equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from checkpoint_damage import SCHEDULER, UNET_CONFIG, configure
from solver_reference import (
    REFERENCES,
    SHAPE,
    diffusers_run,
    fake_model,
    normal,
    reference_module,
    relative_error,
    set_timesteps,
    widened,
)

import tolerances
from sdrt.export.checkpoint import open_checkpoint
from sdrt.export.checkpoint_scheduler import EQUALS, sampler_from_config, schedule_from_config
from sdrt.runtime.errors import UsageError
from sdrt.runtime.solvers import SAMPLERS, make_table, run_table

# Scheduler files as they are met: nothing but the class, what each class saves, and Stable Diffusion's own.
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SAVED_BY = ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")


def saved_config(class_name: str, **options: Any) -> dict[str, Any]:
    scheduler = getattr(diffusers, class_name)(**options)
    config: dict[str, Any] = json.loads(scheduler.to_json_string())
    return config


CONFIGS: list[dict[str, Any]] = [
    {},
    {"_class_name": "DDIMScheduler"},
    {"_class_name": "PNDMScheduler"},
    *(saved_config(name) for name in SAVED_BY),
    *(saved_config(name, **STABLE_DIFFUSION) for name in SAVED_BY),
    saved_config("DDIMScheduler", prediction_type="v_prediction", timestep_spacing="trailing"),
    saved_config("DDIMScheduler", set_alpha_to_one=False, steps_offset=1, beta_schedule="squaredcos_cap_v2"),
    saved_config(
        "PNDMScheduler", trained_betas=np.linspace(0.001, 0.02, 100).tolist(), num_train_timesteps=100
    ),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the corrections that the pipeline makes
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.get("_class_name", "empty"))
def test_a_scheduler_is_read_as_diffusers_pipeline_with_ddim_reads_it(
    config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    nothing = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor")
    )
    pipeline = diffusers.StableDiffusionPipeline(
        scheduler=diffusers.DDIMScheduler.from_pretrained(tmp_path), requires_safety_checker=False, **nothing
    )
    reference = pipeline.scheduler
    schedule = schedule_from_config(config)
    np.testing.assert_allclose(
        schedule.alphas_cumprod, reference.alphas_cumprod.numpy(), rtol=tolerances.ALPHAS_CUMPROD_NO_FMA
    )
    assert schedule.set_alpha_to_one == (float(reference.final_alpha_cumprod) == 1.0)
    assert schedule.prediction_type == reference.config.prediction_type
    for steps in (1, 4, 20, 50):
        reference.set_timesteps(steps)
        ours = make_table("ddim", schedule, steps).timesteps
        np.testing.assert_array_equal(ours, reference.timesteps.numpy())


# What each class of diffusers that can be a checkpoint's scheduler becomes.
OTHERS = {
    "PNDMScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": "dpmpp_2m",
    "SomeOtherScheduler": "dpmpp_2m",
    None: "dpmpp_2m",
}


@pytest.mark.parametrize(("scheduler", "sampler"), [*EQUALS.items(), *OTHERS.items()])
def test_the_checkpoints_scheduler_chooses_the_default_sampler(scheduler: str | None, sampler: str) -> None:
    assert sampler_from_config({"_class_name": scheduler}) == sampler
    assert sampler in SAMPLERS


@pytest.mark.parametrize(
    ("options", "sampler"),
    [
        ({}, "dpmpp_2m"),
        ({"algorithm_type": "dpmsolver++", "solver_order": 3}, "dpmpp_2m"),
        ({"algorithm_type": "dpmsolver"}, "dpmpp_2m"),
        ({"algorithm_type": "sde-dpmsolver++", "solver_order": 2}, "dpmpp_2m_sde"),
        ({"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
        ({"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "dpmpp_3m_sde"),
    ],
)
def test_dpm_solver_is_several_samplers(options: dict[str, Any], sampler: str) -> None:
    assert sampler_from_config({"_class_name": "DPMSolverMultistepScheduler", **options}) == sampler


@pytest.mark.parametrize("name", EQUALS)
def test_classes_are_those_that_the_samplers_are_compared_with(name: str) -> None:
    """That they are equal is shown in tests/runtime/test_solvers.py; here that the names belong together."""
    reference = REFERENCES[EQUALS[name]].scheduler
    assert name in (reference, reference.replace("Scheduler", "ParallelScheduler"))
    assert hasattr(diffusers, name)


@pytest.mark.parametrize(
    ("scheduler", "sampler"),
    [("LCMScheduler", "lcm"), ("TCDScheduler", "tcd"), ("DDIMScheduler", "lcm"), (None, "lcm")],
)
def test_a_distilled_unet_is_sampled_as_one(scheduler: str | None, sampler: str) -> None:
    assert sampler_from_config({"_class_name": scheduler}, distilled=True) == sampler


def test_the_sampler_is_read_from_the_folder(checkpoint_copy: Path) -> None:
    configure(SCHEDULER, _class_name="UniPCMultistepScheduler")(checkpoint_copy)
    assert open_checkpoint(str(checkpoint_copy)).sampler == "unipc"
    configure(UNET_CONFIG, time_cond_proj_dim=8)(checkpoint_copy)
    assert open_checkpoint(str(checkpoint_copy)).sampler == "lcm"


@pytest.mark.parametrize(
    "scheduler",
    ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"],
)
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_a_zero_snr_checkpoint_is_sampled_as_its_own_scheduler_samples_it(
    scheduler: str, prediction_type: str, tmp_path: Path
) -> None:
    """As Lin et al. 2023 (arXiv 2305.08891) train: rescaled betas, trailing spacing, v."""
    options = {
        **STABLE_DIFFUSION,
        "rescale_betas_zero_snr": True,
        "prediction_type": prediction_type,
        "timestep_spacing": "trailing",
    }
    if scheduler == "DDIMScheduler":
        options |= {"clip_sample": False}
    getattr(diffusers, scheduler)(**options).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    schedule, name = schedule_from_config(config), sampler_from_config(config)
    assert schedule.rescale_betas_zero_snr
    reference = getattr(reference_module(name), scheduler).from_pretrained(tmp_path)
    with widened(reference, schedule):
        set_timesteps(reference, 20)
        table = make_table(name, schedule, 20)
        x = normal(*SHAPE) * table.init_noise_sigma
        expected = diffusers_run(name, reference, fake_model, x, told=table.timesteps).last
    assert relative_error(run_table(table, fake_model, x), expected) <= tolerances.SAMPLER_FORMULAS


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"thresholding": True}, "thresholding is set: not supported"),
        (
            {"rescale_betas_zero_snr": True},
            "zero_snr is set for a model that predicts the noise",
        ),
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ({"rescale_betas_zero_snr": 1}, "rescale_betas_zero_snr is 1: allowed are true and false"),
    ],
    ids=str,
)
def test_an_option_that_would_change_the_picture_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        schedule_from_config(config)


def test_only_text_to_image_and_inpainting_of_the_first_family_have_their_offset_corrected() -> None:
    """As diffusers' pipelines do: those of the other families leave the file's number."""
    for family, offset in (("sd", 1), ("sdxl", 0), ("image-variations", 0)):
        assert schedule_from_config({"steps_offset": 0}, family).steps_offset == offset
