"""Scheduler files as checkpoints have them: those drawn as diffusers draws them, and those refused."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

# What Stable Diffusion's files have in common.
STABLE_DIFFUSION: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "trained_betas": None,
    "prediction_type": "epsilon",
}


def of(scheduler: str, **fields: Any) -> Config:
    """A file of Stable Diffusion's kind; the class's name without its last part."""
    return {**STABLE_DIFFUSION, "_class_name": f"{scheduler}Scheduler", **fields}


def alone(scheduler: str, **fields: Any) -> Config:
    """A file of these fields alone."""
    return {"_class_name": f"{scheduler}Scheduler", **fields}


LEADING: Config = {"timestep_spacing": "leading"}
TRAILING: Config = {"timestep_spacing": "trailing"}
KARRAS: Config = {"use_karras_sigmas": True}
ZERO_SNR: Config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", **TRAILING}
NO_CLIP: Config = {"clip_sample": False}
PLAYGROUND: Config = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
}
COSXL: Config = {
    **PLAYGROUND,
    "sigma_max": 120.0,
    "sigma_data": 1.0,
    "sigma_schedule": "exponential",
    "prediction_type": "v_prediction",
}
DPM, EDM = "DPMSolverMultistep", "EDMDPMSolverMultistep"

# As published; `timestep_spacing` came to diffusers with 0.15.
PUBLISHED: dict[str, Config] = {
    "sd-1.4": of("PNDM", skip_prk_steps=True, set_alpha_to_one=False, **NO_CLIP),
    "sd-1.5-inpainting": of("DDIM", skip_prk_steps=True, set_alpha_to_one=False, **NO_CLIP),
    "sd-2.1-768": of(
        "DDIM", skip_prk_steps=True, set_alpha_to_one=False, **NO_CLIP, prediction_type="v_prediction"
    ),
    "sdxl-base": of(
        "EulerDiscrete",
        **{**LEADING, **NO_CLIP, "interpolation_type": "linear", "sample_max_value": 1.0},
        **{"set_alpha_to_one": False, "skip_prk_steps": True, "use_karras_sigmas": False},
    ),
    "sdxl-turbo": of(
        "EulerAncestralDiscrete",
        **{**TRAILING, **NO_CLIP, "interpolation_type": "linear", "sample_max_value": 1.0},
        **{"set_alpha_to_one": False, "skip_prk_steps": True},
    ),
}

# Drawn with our sampler's equal, so that the latents are diffusers'.
EQUAL: dict[str, Config] = {
    **{name: config for name, config in PUBLISHED.items() if name != "sd-1.4"},
    "euler old": of("EulerDiscrete", interpolation_type="linear"),
    "euler karras": of("EulerDiscrete", **LEADING, **KARRAS),
    "euler exponential": of("EulerDiscrete", use_exponential_sigmas=True),
    "euler beta": of("EulerDiscrete", **TRAILING, use_beta_sigmas=True),
    "euler sigma_min": of("EulerDiscrete", **LEADING, final_sigmas_type="sigma_min"),
    "euler karras sigma_min": of("EulerDiscrete", **KARRAS, final_sigmas_type="sigma_min"),
    "euler zero snr": of("EulerDiscrete", **ZERO_SNR),
    "euler of nothing": alone("EulerDiscrete"),
    "euler_a old": of("EulerAncestralDiscrete"),
    "euler_a zero snr": of("EulerAncestralDiscrete", **ZERO_SNR),
    "heun old": of("HeunDiscrete"),
    "heun karras": of("HeunDiscrete", **KARRAS, **LEADING),
    "heun of nothing": alone("HeunDiscrete"),
    "lms old": of("LMSDiscrete"),
    "lms karras": of("LMSDiscrete", **KARRAS),
    "dpm2 old": of("KDPM2Discrete"),
    "dpm2 karras": of("KDPM2Discrete", **KARRAS, **TRAILING),
    "dpm2_a old": of("KDPM2AncestralDiscrete"),
    "dpmpp_sde karras": of("DPMSolverSDE", **KARRAS),
    "ddim of nothing": alone("DDIM"),
    "ddim trailing": of("DDIM", **TRAILING),
    "ddim zero snr": of("DDIM", **ZERO_SNR, set_alpha_to_one=False),
    "ddim clipped, which the pipeline corrects": of("DDIM", clip_sample=True, set_alpha_to_one=False),
    "ddpm": of("DDPM", **NO_CLIP),
    "ddpm log": of("DDPM", **NO_CLIP, variance_type="fixed_small_log"),
    "lcm": of("LCM", original_inference_steps=36),
    "tcd": of("TCD", **LEADING),
    "deis old": of("DEISMultistep"),
    "deis of dpm": of("DEISMultistep", algorithm_type="dpmsolver++", solver_type="bh2", solver_order=3),
    "unipc old": of("UniPCMultistep", solver_type="bh2", solver_order=2, predict_x0=True),
    # To no noise diffusers' bh1 is not a number.
    "unipc bh1": of("UniPCMultistep", solver_type="bh1", final_sigmas_type="sigma_min"),
    "unipc order 3": of("UniPCMultistep", solver_order=3, **KARRAS),
    "unipc sigma_min": of("UniPCMultistep", final_sigmas_type="sigma_min", solver_type="midpoint"),
    "dpmpp old": of(
        DPM,
        **{"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"},
        **{"lower_order_final": True, "thresholding": False},
    ),
    "dpmpp karras": of(DPM, **LEADING, **KARRAS, algorithm_type="dpmsolver++", final_sigmas_type="zero"),
    "dpmpp order 1": of(DPM, solver_order=1),
    "dpmpp order 3": of(DPM, **LEADING, algorithm_type="dpmsolver++", solver_order=3),
    "dpmpp heun": of(DPM, **LEADING, solver_type="heun"),
    "dpmpp euler at final": of(DPM, final_sigmas_type="sigma_min", euler_at_final=True),
    "dpmpp whole orders": of(DPM, final_sigmas_type="sigma_min", lower_order_final=False),
    "dpmpp zero snr": of(DPM, **ZERO_SNR),
    "dpm plain": of(DPM, **LEADING, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    "dpm heun": of(DPM, algorithm_type="dpmsolver", final_sigmas_type="sigma_min", solver_type="heun"),
    "dpm order 3": of(DPM, algorithm_type="dpmsolver", final_sigmas_type="sigma_min", solver_order=3),
    "dpmpp sde": of(DPM, algorithm_type="sde-dpmsolver++"),
    "dpmpp sde karras heun": of(DPM, algorithm_type="sde-dpmsolver++", solver_type="heun", **KARRAS),
    "dpmpp sde order 3": of(DPM, algorithm_type="sde-dpmsolver++", solver_order=3),
    "edm dpmpp": alone(
        EDM,
        **{**PLAYGROUND, "solver_order": 2, "thresholding": False, "algorithm_type": "dpmsolver++"},
        **{"solver_type": "midpoint", "lower_order_final": True, "euler_at_final": False},
        final_sigmas_type="zero",
    ),
    "edm dpmpp heun order 3": alone(EDM, **PLAYGROUND, solver_type="heun", solver_order=3),
    "edm dpmpp sigma_min": alone(EDM, **COSXL, final_sigmas_type="sigma_min"),
    "edm dpmpp sde": alone(EDM, **PLAYGROUND, algorithm_type="sde-dpmsolver++"),
    "edm euler": alone("EDMEuler", **PLAYGROUND),
    "edm euler of v": alone("EDMEuler", **COSXL),
    "edm euler sigma_min": alone("EDMEuler", **PLAYGROUND, final_sigmas_type="sigma_min"),
}

# Refused in these words, before anything is exported.
REFUSED: dict[str, tuple[Config, str]] = {
    "flow match": (
        alone("FlowMatchEulerDiscrete", num_train_timesteps=1000, shift=1.0),
        "_class_name is 'FlowMatchEulerDiscreteScheduler': this scheduler is not supported; those that are:",
    ),
    "ipndm": (alone("IPNDM", num_train_timesteps=1000), "_class_name is 'IPNDMScheduler'"),
    "no class": ({**STABLE_DIFFUSION}, "_class_name is None: .* must name a scheduler class"),
    "flow sigmas": (
        of(DPM, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "use_flow_sigmas is True: flow matching is not supported.* set it to False",
    ),
    "flow prediction": (of(DPM, prediction_type="flow_prediction"), "prediction_type is 'flow_prediction'"),
    "learned variance": (
        of("DDPM", variance_type="learned_range", **NO_CLIP),
        "variance_type is 'learned_range': .* set it to None or 'fixed_small'",
    ),
    "large variance": (of("DDPM", variance_type="fixed_large", **NO_CLIP), "variance_type is 'fixed_large'"),
    "thresholding": (of("UniPCMultistep", thresholding=True), "thresholding is True: .* draw pixels"),
    "thresholding, which the sampler in its place reads": (
        of("PNDM", skip_prk_steps=True, thresholding=True),
        "thresholding is True",
    ),
    "log linear": (
        of("EulerDiscrete", interpolation_type="log_linear"),
        "interpolation_type is 'log_linear'",
    ),
    "continuous": (of("EulerDiscrete", timestep_type="continuous"), "timestep_type is 'continuous'"),
    "sigma_max": (of("EulerDiscrete", **KARRAS, sigma_max=10.0), "sigma_max is 10.0"),
    "lu": (of(DPM, use_lu_lambdas=True), "use_lu_lambdas is True"),
    "lambda": (of(DPM, lambda_min_clipped=-5.1), "lambda_min_clipped is -5.1"),
    "two schedules": (of(DPM, use_beta_sigmas=True, **KARRAS), "use_karras_sigmas, use_beta_sigmas are all"),
    "dpm to zero": (of(DPM, algorithm_type="dpmsolver"), "algorithm_type is 'dpmsolver' with final_sigmas"),
    "old sde": (of(DPM, algorithm_type="sde-dpmsolver"), "algorithm_type is 'sde-dpmsolver'"),
    "edm dpm": (
        alone(EDM, **PLAYGROUND, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
        "algorithm_type is 'dpmsolver': .* dpmsolver\\+\\+, sde-dpmsolver\\+\\+, deis",
    ),
    "sde order 1": (of(DPM, algorithm_type="sde-dpmsolver++", solver_order=1), "solver_order is 1: with"),
    "edm sde order 3": (
        alone(EDM, **PLAYGROUND, algorithm_type="sde-dpmsolver++", solver_order=3),
        "solver_order is 3: with",
    ),
    "order 4": (of("UniPCMultistep", solver_order=4), "solver_order is 4: allowed are 1 to 3"),
    "unipc of noise": (of("UniPCMultistep", predict_x0=False), "predict_x0 is False"),
    "no corrector": (of("UniPCMultistep", disable_corrector=[0]), r"disable_corrector is \[0\]"),
    "scaling": (of("LCM", timestep_scaling=8.0), "timestep_scaling is 8.0"),
    "null": (of("EulerDiscrete", timestep_spacing=None), "timestep_spacing is null"),
    "zero snr of noise": (of("EulerDiscrete", rescale_betas_zero_snr=True), "rescale_betas_zero_snr is set"),
    "zero snr of 1": (
        of("EulerDiscrete", **{**ZERO_SNR, "rescale_betas_zero_snr": 1}),
        "rescale_betas_zero_snr is 1",
    ),
    "edm range": (alone("EDMEuler", **{**PLAYGROUND, "sigma_min": 90.0}), "sigma_min is 90, sigma_max 80"),
    "edm sample": (
        alone("EDMEuler", **{**PLAYGROUND, "prediction_type": "sample"}),
        "prediction_type is 'sam",
    ),
    "edm schedule": (alone("EDMEuler", **PLAYGROUND, sigma_schedule="beta"), "sigma_schedule is 'beta'"),
}
