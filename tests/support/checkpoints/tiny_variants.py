"""Checkpoints of other kinds from the tiny one: inpainting, latent consistency, image variations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GUIDANCE_WIDTH = 8
ENCODER_SIZE = 32  # pixels a side of what the image encoder reads
CROSS_WIDTH = 16  # of the tiny U-Net
TEXT = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
TWO_TEXTS = {
    **TEXT,
    "text_encoder_2": "CLIPTextModelWithProjection",
    "tokenizer_2": "CLIPTokenizer",
}
VARIATIONS = {
    "image_encoder": "CLIPVisionModelWithProjection",
    "feature_extractor": "CLIPImageProcessor",
}
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def write_tiny_inpainting_checkpoint(folder: Path, tiny: Path) -> None:
    """The tiny checkpoint with a U-Net of 9 channels, as Stable Diffusion inpainting has.

    Args:
        folder: To be made.
        tiny: Of `write_tiny_checkpoint`.
    """
    _copy_with_unet(folder, tiny, "StableDiffusionInpaintPipeline", in_channels=9)


def write_tiny_depth_checkpoint(folder: Path, tiny: Path) -> None:
    """The tiny checkpoint with a U-Net of 5 channels, as Stable Diffusion 2 depth has it."""
    _copy_with_unet(folder, tiny, "StableDiffusionDepth2ImgPipeline", in_channels=5)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["depth_estimator"] = ["transformers", "DPTForDepthEstimation"]
    index["feature_extractor"] = ["transformers", "DPTImageProcessor"]
    write_json(folder / "model_index.json", index)


def write_tiny_pix2pix_checkpoint(folder: Path, tiny: Path) -> None:
    """The tiny checkpoint with a U-Net of 8 channels, as InstructPix2Pix has."""
    _copy_with_unet(folder, tiny, "StableDiffusionInstructPix2PixPipeline", in_channels=8)


def write_tiny_lcm_checkpoint(folder: Path, tiny: Path) -> None:
    """The tiny checkpoint with a U-Net that is told the guidance scale, and LCMScheduler."""
    from diffusers import LCMScheduler

    _copy_with_unet(folder, tiny, "LatentConsistencyModelPipeline", time_cond_proj_dim=GUIDANCE_WIDTH)
    LCMScheduler().save_pretrained(folder / "scheduler")
    write_model_index(folder, "LatentConsistencyModelPipeline", scheduler="LCMScheduler")


def write_tiny_image_variations_checkpoint(folder: Path, tiny: Path) -> None:
    """The tiny checkpoint with a CLIP image encoder in place of the text's."""
    _copy_with_unet(folder, tiny, "StableDiffusionImageVariationPipeline")
    for text in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / text)
    write_model_index(
        folder, "StableDiffusionImageVariationPipeline", scheduler="PNDMScheduler", encoders=VARIATIONS
    )
    _write_image_encoder(folder)


def write_tiny_unclip_checkpoint(folder: Path, tiny: Path) -> None:
    """The tiny checkpoint with an image encoder beside the text's, and what lays noise over its embedding."""
    import torch
    from diffusers import DDPMScheduler
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    pipeline = "StableUnCLIPImg2ImgPipeline"
    labels = {
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2 * CROSS_WIDTH,
    }
    _copy_with_unet(folder, tiny, pipeline, **labels)
    _write_image_encoder(folder)
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=CROSS_WIDTH)
    normalizer.load_state_dict(
        {
            "mean": torch.linspace(-0.5, 0.5, CROSS_WIDTH)[None],
            "std": torch.linspace(0.5, 2, CROSS_WIDTH)[None],
        }
    )
    normalizer.save_pretrained(folder / "image_normalizer", safe_serialization=True)
    DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(folder / "image_noising_scheduler")
    write_model_index(
        folder,
        pipeline,
        scheduler="PNDMScheduler",
        encoders={**TEXT, **VARIATIONS},
        image_normalizer=["stable_diffusion", "StableUnCLIPImageNormalizer"],
        image_noising_scheduler=["diffusers", "DDPMScheduler"],
    )


def write_tiny_upscaler_checkpoint(folder: Path, tiny: Path) -> None:
    """The tiny checkpoint with a U-Net that reads a small picture and how much noise lies over it.

    Its VAE's factor is 2, so that it enlarges two times.
    """
    from diffusers import DDPMScheduler

    pipeline = "StableDiffusionUpscalePipeline"
    _copy_with_unet(folder, tiny, pipeline, in_channels=7, num_class_embeds=60)
    DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02).save_pretrained(
        folder / "low_res_scheduler"
    )
    write_model_index(
        folder,
        pipeline,
        scheduler="PNDMScheduler",
        low_res_scheduler=["diffusers", "DDPMScheduler"],
        max_noise_level=50,
    )


def _write_image_encoder(folder: Path) -> None:
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(1)
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            projection_dim=CROSS_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=ENCODER_SIZE,
            patch_size=8,
        )
    )
    encoder.half().save_pretrained(folder / "image_encoder", safe_serialization=True)
    (folder / "feature_extractor").mkdir()
    write_json(
        folder / "feature_extractor" / "preprocessor_config.json",
        {  # as CLIPImageProcessor saves it
            "crop_size": {"height": ENCODER_SIZE, "width": ENCODER_SIZE},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": MEAN,
            "image_processor_type": "CLIPImageProcessor",
            "image_std": STD,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": ENCODER_SIZE},
        },
    )


def write_model_index(
    folder: Path, pipeline: str, *, scheduler: str, encoders: Mapping[str, str] = TEXT, **more: Any
) -> None:
    """``model_index.json`` as diffusers saves it: a library and a class for each part."""
    parts = {**encoders, "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": scheduler}
    entries = {
        name: ["transformers" if kind.startswith("CLIP") else "diffusers", kind]
        for name, kind in parts.items()
    }
    index = {"_class_name": pipeline, "_diffusers_version": "0.42.1", **entries, **more}
    write_json(folder / "model_index.json", index)


def write_json(file: Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document), encoding="utf-8")


def _copy_with_unet(folder: Path, tiny: Path, pipeline: str, **changes: Any) -> None:
    """A copy whose pipeline class is another and whose U-Net's configuration has ``changes``."""
    import torch
    from diffusers import UNet2DConditionModel

    shutil.copytree(tiny, folder)
    write_model_index(folder, pipeline, scheduler="PNDMScheduler")
    if changes:
        torch.manual_seed(2)
        config = UNet2DConditionModel.load_config(tiny / "unet")
        unet = UNet2DConditionModel.from_config({**config, **changes})
        unet.half().save_pretrained(folder / "unet", safe_serialization=True)
