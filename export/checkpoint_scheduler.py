"""The scheduler that a checkpoint came with: its noise schedule, and our sampler that is its equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from sdrt.runtime.errors import UsageError
from sdrt.runtime.schedule import NoiseSchedule

# The classes of diffusers that one of our samplers equals. DPMSolverMultistepScheduler is several, see
# `sampler_from_config`. PNDMScheduler, which Stable Diffusion 1.x comes with, is not here though we have
# pndm: it is for 50 steps. At a bundle's 20 it ends eight times as far as dpmpp_2m from where many steps end
# (the embedded model: 0.29 of the latents' norm and 0.036).
EQUALS: Final = {
    "DDIMParallelScheduler": "ddim",
    "DDIMScheduler": "ddim",
    "DDPMParallelScheduler": "ddpm",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "dpm2_a",
    "KDPM2DiscreteScheduler": "dpm2",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "unipc",
}
FALLBACK: Final = "dpmpp_2m"  # of DPMSolverSinglestepScheduler the nearest, and good with few steps
DISTILLED: Final = ("lcm", "tcd")  # for models that draw in a few steps, and with a few steps only


def sampler_from_config(config: Mapping[str, Any], *, distilled: bool = False) -> str:
    """Our sampler for a diffusers scheduler's configuration: its equal, else the nearest.

    It becomes the bundle's default, for whoever comes from diffusers expects what the checkpoint's own
    scheduler draws. Options of a scheduler (``use_karras_sigmas``, ``solver_order``) are not kept: a
    manifest has no default for them.

    Args:
        config: Of the scheduler.
        distilled: The U-Net is a latent consistency model's: only `DISTILLED` samplers fit it, whatever
            scheduler lies beside it.
    """
    name = str(config.get("_class_name"))
    sampler = EQUALS.get(name, FALLBACK)
    if name == "DPMSolverMultistepScheduler" and str(config.get("algorithm_type")).startswith("sde-"):
        sampler = "dpmpp_3m_sde" if config.get("solver_order") == 3 else "dpmpp_2m_sde"
    return "lcm" if distilled and sampler not in DISTILLED else sampler


def schedule_from_config(config: Mapping[str, Any], family: str = "sd") -> NoiseSchedule:
    """A diffusers scheduler's configuration as a noise schedule.

    It is read as diffusers' pipeline of the family with a DDIMScheduler reads it, whatever class wrote it:
    what is missing has DDIMScheduler's default.

    Raises:
        UsageError: A value is not supported or out of range, or the configuration asks for something that
            would change the picture and is not implemented.
    """
    if config.get("thresholding"):
        raise UsageError("thresholding is set: not supported (it is for models that draw pixels)")
    names = {field.name for field in dataclasses.fields(NoiseSchedule)}
    defaults = {
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "set_alpha_to_one": True,
        "steps_offset": 0,
    }
    given = {key: value for key, value in config.items() if key in names and value is not None}
    if isinstance(given.get("trained_betas"), list):
        given["trained_betas"] = tuple(given["trained_betas"])
    # StableDiffusionPipeline sets the offset to 1 whatever the file says; those of the other families do not.
    forced = {"steps_offset": 1} if family == "sd" else {}
    schedule = NoiseSchedule(**{**defaults, **given, **forced})
    if schedule.rescale_betas_zero_snr and schedule.prediction_type == "epsilon":
        raise UsageError(
            "rescale_betas_zero_snr is set for a model that predicts the noise, which says nothing where "
            "there is noise alone: set prediction_type to what the model predicts, or rescale_betas_zero_snr "
            "to false"
        )
    return schedule
