"""A Stable Diffusion XL checkpoint that exports in seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

from support.checkpoints.tiny_variants import TWO_TEXTS, write_model_index

MERGES = 200
SIZE = 16  # pixels: 8 latents at a VAE factor of 2
WIDTHS = (16, 24)  # of the two text encoders
PROJECTION = 12
TIME_WIDTH = 8


def write_tiny_sdxl_checkpoint(folder: Path) -> None:
    """Two text encoders, two tokenizers (the second pads with ``!``) and a U-Net with ``text_time``.

    Some 60 thousand seeded random weights in fp16.
    """
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from sdrt.export.checkpoint.tokenizer_json import write_tokenizer_folder

    torch.manual_seed(0)
    vocabulary = 512 + MERGES + 2

    def text_config(width: int, activation: str) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_act=activation,
            projection_dim=PROJECTION,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=1,
        )

    unet = UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=sum(WIDTHS),
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=PROJECTION + 6 * TIME_WIDTH,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        scaling_factor=0.13025,
    )
    networks = {
        "text_encoder": CLIPTextModel(text_config(WIDTHS[0], "quick_gelu")),
        "text_encoder_2": CLIPTextModelWithProjection(text_config(WIDTHS[1], "gelu")),
        "unet": unet,
        "vae": vae,
    }
    for name, module in networks.items():
        module.half().save_pretrained(folder / name, safe_serialization=True)
    EulerDiscreteScheduler(  # as SDXL base comes with
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    ).save_pretrained(folder / "scheduler")
    write_tokenizer_folder(folder / "tokenizer", MERGES)
    write_tokenizer_folder(folder / "tokenizer_2", MERGES, pad="!")
    write_model_index(
        folder,
        "StableDiffusionXLPipeline",
        scheduler="EulerDiscreteScheduler",
        encoders=TWO_TEXTS,
        force_zeros_for_empty_prompt=True,
    )


def write_tiny_refiner_checkpoint(folder: Path, tiny: Path) -> None:
    """SDXL's refiner of a tiny base: the second text encoder alone, and a U-Net that is told a score.

    Args:
        folder: To be made.
        tiny: Of `write_tiny_sdxl_checkpoint`.
    """
    import torch
    from diffusers import UNet2DConditionModel

    shutil.copytree(tiny, folder)
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / name)
    torch.manual_seed(3)
    config = UNet2DConditionModel.load_config(tiny / "unet")
    own = {
        "cross_attention_dim": WIDTHS[1],
        "projection_class_embeddings_input_dim": PROJECTION + 5 * TIME_WIDTH,
    }
    unet = UNet2DConditionModel.from_config({**config, **own})
    unet.half().save_pretrained(folder / "unet", safe_serialization=True)
    write_model_index(
        folder,
        "StableDiffusionXLImg2ImgPipeline",
        scheduler="EulerDiscreteScheduler",
        encoders={name: kind for name, kind in TWO_TEXTS.items() if name.endswith("_2")},
        text_encoder=[None, None],
        tokenizer=[None, None],
        force_zeros_for_empty_prompt=False,
        requires_aesthetics_score=True,
    )
