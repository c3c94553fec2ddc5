"""The shapes of the four networks, as the configuration of their classes.

Stable Diffusion 1.x, scaled down: the same blocks and the same conditioning, fewer and narrower.
"""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

VOCABULARY = 4096  # 512 bytes, 3582 merges, <|startoftext|>, <|endoftext|>
TEXT_WIDTH = 128
LATENT_CHANNELS = 4
LATENT_FACTOR = 4  # a 64-pixel picture has 16 x 16 latents

AUTOENCODER: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [24, 48, 96],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": LATENT_CHANNELS,
    "sample_size": 64,
}

UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [48, 96, 96],
    "layers_per_block": 1,
    # As in Stable Diffusion 1.x this is the number of heads, whatever its name.
    "attention_head_dim": 4,
    "cross_attention_dim": TEXT_WIDTH,
    "norm_num_groups": 16,
}

TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": TEXT_WIDTH,
    "bos_token_id": VOCABULARY - 2,
    "eos_token_id": VOCABULARY - 1,
    "pad_token_id": VOCABULARY - 1,
}

# Stable Diffusion 1.x's own noise schedule.
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}


def build_autoencoder() -> AutoencoderKL:
    """Pictures [N, 3, H, W] in [-1, 1] ↔ latents [N, 4, H/4, W/4]."""
    return AutoencoderKL(**AUTOENCODER)


def build_unet() -> UNet2DConditionModel:
    """(latents [N, 4, h, w], timesteps [N], text [N, 77, 128]) → predicted noise [N, 4, h, w]."""
    return UNet2DConditionModel(**UNET)


def build_text_encoder() -> CLIPTextModel:
    """Token ids [N, 77] → hidden states [N, 77, 128]."""
    return CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER))


def build_scheduler() -> PNDMScheduler:
    """The scheduler that the checkpoint names as its default."""
    return PNDMScheduler(**SCHEDULER)
