"""diffusers' scheduler classes as data: their fields with the defaults, and what becomes of each field.

A field that a checkpoint's file does not have takes the default of the class that reads it. What is not here,
class, field or value, is not drawn as if it were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final

# By which a name that no sampler has cannot be written here.
from sdrt.runtime.samplers.log_snr import deis, dpmpp_2m, unipc
from sdrt.runtime.samplers.sigma import dpm2, dpm2_a, dpmpp_sde, euler, euler_a, heun, lms
from sdrt.runtime.samplers.timestep import ddim, ddpm, lcm, tcd


class Use(Enum):
    """What becomes of a field."""

    SCHEDULE = auto()  # of `sdrt.runtime.samplers.schedule.NoiseSchedule`, under the same name
    EDM = auto()  # of `sdrt.runtime.samplers.edm.EdmScaling`, under the same name
    OPTION = auto()  # a default of `sdrt.runtime.samplers.table.SamplerOptions`
    PREFERENCE = auto()  # not kept: another value is a remark
    NOTHING = auto()  # says nothing by itself, only together with one of which another value is refused


@dataclass(frozen=True, slots=True)
class Only:
    """A field of which only these values are drawn, and why another is not."""

    values: tuple[Any, ...]
    why: str


_PIXELS = "it is for models that draw pixels"
_FLOW = "flow matching is not supported"
_LEVELS = "these noise levels are not supported"

# Of each field, whatever class reads it; where one class differs, that stands with the class.
FIELDS: Final[dict[str, Use | Only]] = {
    **dict.fromkeys(
        (
            *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
            *("prediction_type", "timestep_spacing", "steps_offset", "set_alpha_to_one"),
            "rescale_betas_zero_snr",
        ),
        Use.SCHEDULE,
    ),
    **dict.fromkeys(("sigma_data", "sigma_schedule", "rho"), Use.EDM),
    **dict.fromkeys(
        (
            *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "solver_order"),
            *("lower_order_final", "original_inference_steps", "algorithm_type", "solver_type"),
            *("final_sigmas_type", "euler_at_final"),
        ),
        Use.OPTION,
    ),
    **dict.fromkeys(("noise_sampler_seed", "skip_prk_steps"), Use.PREFERENCE),
    **dict.fromkeys(
        (
            *("dynamic_thresholding_ratio", "sample_max_value", "clip_sample_range", "flow_shift"),
            "time_shift_type",
        ),
        Use.NOTHING,
    ),
    "clip_sample": Only((False,), _PIXELS),
    "thresholding": Only((False,), _PIXELS),
    "use_flow_sigmas": Only((False,), _FLOW),
    "use_dynamic_shifting": Only((False,), _FLOW),
    "shift_terminal": Only((None,), _FLOW),
    "use_lu_lambdas": Only((False,), _LEVELS),
    "interpolation_type": Only(("linear",), _LEVELS),
    "sigma_min": Only((None,), _LEVELS),
    "sigma_max": Only((None,), _LEVELS),
    "lambda_min_clipped": Only((-math.inf,), _LEVELS),
    "timestep_type": Only(("discrete",), "timesteps of this kind are not supported"),
    "timestep_scaling": Only((10.0,), "another scaling is not supported"),
    "variance_type": Only(
        (None, "fixed_small", "fixed_small_log"),
        "the U-Net predicts a variance, or the noise has another: not supported",
    ),
    "predict_x0": Only((True,), "UniPC of predicted noise is not supported"),
    "disable_corrector": Only(([],), "UniPC without its corrector is not supported"),
    "solver_p": Only((None,), "UniPC with another predictor is not supported"),
}

_TRAINED: Final = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_STABLE: Final = {"beta_start": 0.00085, "beta_end": 0.012}
_LINSPACE: Final = {"timestep_spacing": "linspace", "steps_offset": 0}
_LEADING: Final = {"timestep_spacing": "leading", "steps_offset": 0}
_ZERO_SNR: Final = {"rescale_betas_zero_snr": False}
_SIGMAS: Final = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_THRESHOLD: Final = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIP: Final = {"clip_sample": True, "clip_sample_range": 1.0}
_SHIFT: Final = {
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
_SOLVER: Final = {"solver_order": 2, "lower_order_final": True}
_DPM: Final = {
    **_SOLVER,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
}
_LAMBDAS: Final = {"lambda_min_clipped": -math.inf, "variance_type": None}
_DDIM: Final = {**_TRAINED, **_CLIP, **_THRESHOLD, **_LEADING, **_ZERO_SNR, "set_alpha_to_one": True}
_DDPM: Final = {
    **{name: value for name, value in _DDIM.items() if name != "set_alpha_to_one"},
    "variance_type": "fixed_small",
}
_DISTILLED: Final = {
    **_DDIM,
    **_STABLE,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}
_K: Final = {**_TRAINED, **_STABLE, **_SIGMAS, **_LINSPACE}
_EDM: Final = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "final_sigmas_type": "zero",
}
_ENDS: Final = {"sigma_min": None, "sigma_max": None}
_EDM_ENDS: Final[dict[str, Use | Only]] = {"sigma_min": Use.EDM, "sigma_max": Use.EDM}


@dataclass(frozen=True, slots=True)
class SchedulerClass:
    """A class of diffusers.

    Attributes:
        sampler: The name of ours that is its equal, or of the one that is drawn with.
        defaults: Field → the default of its constructor.
        uses: Where a field is used otherwise than `FIELDS` says.
        preference: Why ``sampler`` is not the class's equal, and how to get that; empty where it is.
    """

    sampler: str
    defaults: Mapping[str, Any]
    uses: Mapping[str, Use | Only] = field(default_factory=dict)
    preference: str = ""

    def use(self, name: str) -> Use | Only:
        """What becomes of one of its fields."""
        return self.uses[name] if name in self.uses else FIELDS[name]


# DPMSolverMultistepScheduler is several samplers, see `sdrt.export.checkpoint.scheduler`. PNDMScheduler,
# which Stable Diffusion 1.x comes with, is not drawn with pndm: it is for 50 steps. At a bundle's 20 it ends
# eight times as far as dpmpp_2m from where many steps end (the embedded model: 0.29 of the latents' norm and
# 0.036).
CLASSES: Final[dict[str, SchedulerClass]] = {
    "DDIMParallelScheduler": SchedulerClass(ddim.name, _DDIM),
    "DDIMScheduler": SchedulerClass(ddim.name, _DDIM),
    "DDPMParallelScheduler": SchedulerClass(ddpm.name, _DDPM),
    "DDPMScheduler": SchedulerClass(ddpm.name, _DDPM),
    "DEISMultistepScheduler": SchedulerClass(
        deis.name,
        {
            **{**_TRAINED, **_THRESHOLD, **_SOLVER, **_SIGMAS, **_SHIFT, **_LINSPACE},
            "algorithm_type": "deis",
            "solver_type": "logrho",
        },
    ),
    "DPMSolverMultistepScheduler": SchedulerClass(
        dpmpp_2m.name,
        {
            **{**_TRAINED, **_THRESHOLD, **_DPM, **_SIGMAS, **_SHIFT, **_LAMBDAS, **_LINSPACE, **_ZERO_SNR},
            "euler_at_final": False,
            "use_lu_lambdas": False,
        },
    ),
    "DPMSolverSDEScheduler": SchedulerClass(dpmpp_sde.name, {**_K, "noise_sampler_seed": None}),
    "DPMSolverSinglestepScheduler": SchedulerClass(
        dpmpp_2m.name,
        {
            **{**_TRAINED, **_THRESHOLD, **_DPM, **_SIGMAS, **_SHIFT, **_LAMBDAS},
            "lower_order_final": False,
        },
        preference="the multistep solver of the same equation; there is no single-step one",
    ),
    "EDMDPMSolverMultistepScheduler": SchedulerClass(
        dpmpp_2m.name, {**_EDM, **_THRESHOLD, **_DPM, "euler_at_final": False}, _EDM_ENDS
    ),
    "EDMEulerScheduler": SchedulerClass(euler.name, _EDM, _EDM_ENDS),
    "EulerAncestralDiscreteScheduler": SchedulerClass(euler_a.name, {**_TRAINED, **_LINSPACE, **_ZERO_SNR}),
    "EulerDiscreteScheduler": SchedulerClass(
        euler.name,
        {
            **{**_TRAINED, **_SIGMAS, **_ENDS, **_LINSPACE, **_ZERO_SNR},
            "interpolation_type": "linear",
            "timestep_type": "discrete",
            "final_sigmas_type": "zero",
        },
    ),
    "HeunDiscreteScheduler": SchedulerClass(heun.name, {**_K, **_CLIP, "clip_sample": False}),
    "KDPM2AncestralDiscreteScheduler": SchedulerClass(dpm2_a.name, _K),
    "KDPM2DiscreteScheduler": SchedulerClass(dpm2.name, _K),
    "LCMScheduler": SchedulerClass(lcm.name, _DISTILLED),
    "LMSDiscreteScheduler": SchedulerClass(lms.name, {**_TRAINED, **_SIGMAS, **_LINSPACE}),
    "PNDMScheduler": SchedulerClass(
        dpmpp_2m.name,
        {**_TRAINED, **_LEADING, "skip_prk_steps": False, "set_alpha_to_one": False},
        preference="which gets further in few steps; --sampler pndm draws as the checkpoint's own scheduler",
    ),
    "TCDScheduler": SchedulerClass(tcd.name, _DISTILLED),
    "UniPCMultistepScheduler": SchedulerClass(
        unipc.name,
        {
            **{**_TRAINED, **_THRESHOLD, **_SOLVER, **_SIGMAS, **_SHIFT, **_LINSPACE, **_ZERO_SNR, **_ENDS},
            "predict_x0": True,
            "solver_type": "bh2",
            "disable_corrector": [],
            "solver_p": None,
            "final_sigmas_type": "zero",
            "shift_terminal": None,
        },
    ),
}
