"""The published kinds of single files: how their tensors tell them, and the configurations that they have.

The configurations are those of ``data/architectures``; a kind says in what it differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sdrt.export.checkpoint.single_file.names import TOLD, UNET

INDEX_FILE: Final = "model_index.json"
_MORE: Final = "not supported; a diffusers folder of it may be (docs/checkpoints.md)"


@dataclass(frozen=True, slots=True)
class Kind:
    """A published kind.

    Attributes:
        name: For ``--family``.
        words: For people.
        context: The width of what the U-Net's cross-attention reads.
        channels: What the U-Net takes.
        base: A folder in ``data/architectures``; empty where the kind is not supported.
        why: Of one that is not supported: what to do.
        index: Entries of ``model_index.json`` that are others than the base's.
        unet: Fields of the U-Net's configuration that are others than the base's.
        vae: The same of the VAE's.
        scheduler: Its configuration, where it is another than the base's.
        markers: Tensors that it must have.
        hints: What the file's name, title or architecture must match; for kinds that no tensor tells.
        predicts: What it is known to predict: that tells it, too, where the metadata or the user says so.
        doubt: What else it may be, if nothing says what it predicts.
    """

    name: str
    words: str
    context: int
    channels: int = 4
    base: str = ""
    why: str = _MORE
    index: Mapping[str, Any] = field(default_factory=dict)
    unet: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    markers: tuple[str, ...] = ()
    hints: str = ""
    predicts: str = ""
    doubt: str = ""


_SD1, _SD2, _XL, _REFINER = 768, 1024, 2048, 1280
_ADDED: Final = f"{UNET}label_emb.0.0.weight"
_COSXL_MARK: Final = "edm_vpred.sigma_max"
_STACKED: Final = "first_stage_model.decoder.mid.block_1.time_stack.in_layers.0.weight"
_LCM_NAME: Final = r"(?<![a-z])lcm(?![a-z])|latent.consistency"
_BETAS: Final = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "clip_sample": False,
}
_PNDM: Final = {**_BETAS, "_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True}
_LCM: Final = {
    **_BETAS,
    "_class_name": "LCMScheduler",
    "original_inference_steps": 50,
    "set_alpha_to_one": True,
    "timestep_spacing": "leading",
}
# Of models that were distilled to few steps: they begin at the last timestep.
_FEW: Final = {**_BETAS, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
_FEW_X0: Final = {**_FEW, "prediction_type": "sample"}
_FEW_ANCESTRAL: Final = {**_FEW, "_class_name": "EulerAncestralDiscreteScheduler"}
# Noise levels as of Karras et al. 2022; the two models' own sigma_data and ends.
_EDM: Final = {"num_train_timesteps": 1000, "rho": 7.0, "sigma_min": 0.002, "final_sigmas_type": "zero"}
_PLAYGROUND: Final = {
    **_EDM,
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "prediction_type": "epsilon",
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "solver_order": 2,
    "solver_type": "midpoint",
    "algorithm_type": "dpmsolver++",
    "lower_order_final": True,
}
_COSXL: Final = {
    **_EDM,
    "_class_name": "EDMEulerScheduler",
    "prediction_type": "v_prediction",
    "sigma_data": 1.0,
    "sigma_max": 120.0,
}
_INPAINT: Final = {"_class_name": "StableDiffusionInpaintPipeline"}
_XL_INPAINT: Final = {"_class_name": "StableDiffusionXLInpaintPipeline"}
_EDIT: Final = {"_class_name": "StableDiffusionInstructPix2PixPipeline"}
_XL_EDIT: Final = {"_class_name": "StableDiffusionXLInstructPix2PixPipeline"}
_XL_SECOND: Final = {
    "_class_name": "StableDiffusionXLImg2ImgPipeline",
    "force_zeros_for_empty_prompt": False,
    "requires_aesthetics_score": True,
    "text_encoder": [None, None],
    "tokenizer": [None, None],
}
_XL_SECOND_UNET: Final = {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": _REFINER,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
_SMALL: Final = {"sample_size": 64}

# The first that fits is taken: what more tells comes before what less does.
KINDS: Final = (
    Kind(
        "sd15-lcm",
        "Stable Diffusion 1.x, a latent consistency model",
        _SD1,
        base="sd15",
        index={"_class_name": "LatentConsistencyModelPipeline"},
        scheduler=_LCM,
        markers=(TOLD,),
    ),
    Kind(
        "sd15-lcm", "Stable Diffusion 1.x with LCM merged", _SD1, base="sd15", scheduler=_LCM, hints=_LCM_NAME
    ),
    Kind("sd15", "Stable Diffusion 1.x", _SD1, base="sd15"),
    Kind(
        "sd15-inpainting",
        "Stable Diffusion 1.x inpainting",
        _SD1,
        9,
        "sd15",
        index=_INPAINT,
        unet={"in_channels": 9},
    ),
    Kind("sd15-pix2pix", "InstructPix2Pix", _SD1, 8, "sd15", index=_EDIT, unet={"in_channels": 8}),
    Kind("svd", "Stable Video Diffusion", _SD2, 8, markers=(_STACKED,), why="it draws films: not supported"),
    Kind("sd21-unclip", "Stable unCLIP 2.1", _SD2, markers=(_ADDED,)),
    Kind("sd-turbo", "Stable Diffusion Turbo", _SD2, base="sd21", unet=_SMALL, scheduler=_FEW, hints="turbo"),
    Kind(
        "sd21-base",
        "Stable Diffusion 2.x base",
        _SD2,
        base="sd21",
        unet=_SMALL,
        scheduler=_PNDM,
        hints=r"(?<!\d)512(?!\d)|(?<![a-z])base(?![a-z])",
        predicts="epsilon",
    ),
    Kind(
        "sd21",
        "Stable Diffusion 2.x for 768 pixels",
        _SD2,
        base="sd21",
        doubt="as diffusers takes those of 2.x; for one of 512 pixels: --family sd21-base",
    ),
    Kind(
        "sd21-inpainting",
        "Stable Diffusion 2.x inpainting",
        _SD2,
        9,
        "sd21",
        index=_INPAINT,
        unet={**_SMALL, "in_channels": 9},
        scheduler=_PNDM,
    ),
    Kind(
        "sd21-depth",
        "Stable Diffusion 2 depth",
        _SD2,
        5,
        "sd21",
        index={"_class_name": "StableDiffusionDepth2ImgPipeline"},
        unet={**_SMALL, "in_channels": 5},
        scheduler=_PNDM,
    ),
    Kind("sd-upscaler", "Stable Diffusion x4 upscaler", _SD2, 7),
    Kind(
        "playground",
        "Playground 2.5",
        _XL,
        base="sdxl",
        scheduler=_PLAYGROUND,
        vae={"scaling_factor": 0.5},
        markers=("edm_mean", "edm_std"),
    ),
    Kind("cosxl", "CosXL", _XL, base="sdxl", scheduler=_COSXL, markers=(_COSXL_MARK,)),
    Kind("sdxl-lcm", "SDXL, a latent consistency model", _XL, base="sdxl", scheduler=_LCM, markers=(TOLD,)),
    Kind("sdxl-lcm", "SDXL with LCM merged", _XL, base="sdxl", scheduler=_LCM, hints=_LCM_NAME),
    Kind(
        "sdxl-turbo",
        "SDXL Turbo",
        _XL,
        base="sdxl",
        unet=_SMALL,
        scheduler=_FEW_ANCESTRAL,
        hints="sd.?xl.?turbo",
    ),
    # As of models by others that it was merged into, and that draw at SDXL's own size.
    Kind("sdxl-turbo", "SDXL with Turbo merged", _XL, base="sdxl", scheduler=_FEW_ANCESTRAL, hints="turbo"),
    # The one for one step predicts the clean latents, and is named so.
    Kind("sdxl-lightning", "SDXL Lightning", _XL, base="sdxl", scheduler=_FEW_X0, hints="lightning.*x0"),
    Kind("sdxl-lightning", "SDXL Lightning", _XL, base="sdxl", scheduler=_FEW, hints="lightning"),
    Kind("sdxl", "SDXL base", _XL, base="sdxl"),
    Kind("sdxl-inpainting", "SDXL inpainting", _XL, 9, "sdxl", index=_XL_INPAINT, unet={"in_channels": 9}),
    Kind(
        "cosxl-edit",
        "CosXL Edit",
        _XL,
        8,
        markers=(_COSXL_MARK,),
        why="its U-Net reads scaled latents: not supported",
    ),
    Kind("sdxl-pix2pix", "SDXL InstructPix2Pix", _XL, 8, "sdxl", index=_XL_EDIT, unet={"in_channels": 8}),
    Kind(
        "sdxl-refiner",
        "the SDXL refiner",
        _REFINER,
        base="sdxl",
        index=_XL_SECOND,
        unet=_XL_SECOND_UNET,
    ),
)
FAMILIES: Final = tuple(dict.fromkeys(kind.name for kind in KINDS if kind.base))
