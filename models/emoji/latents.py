"""The trained autoencoder, and the latents of the captioned pictures."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from architecture import build_autoencoder
from data import Emoji, cache_folder, load_images, to_unit_range
from training import averaged_parameters

AUTOENCODER_STATE, DECODER_STATE = "autoencoder.pt", "decoder.pt"


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: Tensor, batch: int = 16) -> Tensor:
    """Latents of uint8 pictures, not scaled: [N, 3, H, W] → [N, 4, H/4, W/4] (the posterior's mean)."""
    parts = torch.split(to_unit_range(images), batch)
    return torch.cat([autoencoder.encode(part).latent_dist.mean for part in parts])


def scaling_factor(latents: Tensor) -> float:
    """What latents are multiplied by so that their standard deviation is 1; four digits are enough."""
    return float(f"{1.0 / latents.std().item():.4g}")


@torch.no_grad()
def center_latents(autoencoder: AutoencoderKL, mean: Tensor) -> None:
    """Move the latents' mean [4] to zero without changing what the autoencoder does.

    Sampling starts from noise of mean zero, and the schedule's last step still holds 7 % of the latents: a
    mean of its own would be missed there. The 1 x 1 convolutions on both sides of the latents absorb it.
    """
    autoencoder.quant_conv.bias[: len(mean)] -= mean
    autoencoder.post_quant_conv.bias += autoencoder.post_quant_conv.weight[:, :, 0, 0] @ mean


def autoencoder_of_stage_1() -> AutoencoderKL:
    """What `train_autoencoder.py` left, averaged and frozen."""
    model = build_autoencoder().requires_grad_(False).eval()
    model.load_state_dict(averaged_parameters(cache_folder() / AUTOENCODER_STATE))
    return model


def decoding_half(autoencoder: AutoencoderKL) -> nn.ModuleDict:
    """The part after the latents."""
    return nn.ModuleDict({"post_quant_conv": autoencoder.post_quant_conv, "decoder": autoencoder.decoder})


def frozen_autoencoder(images: Tensor) -> tuple[AutoencoderKL, Tensor]:
    """The autoencoder, centred and with its scaling factor, and the scaled latents of `images`.

    The decoder is that of stage 3 if that was trained.
    """
    model = autoencoder_of_stage_1()
    if (cache_folder() / DECODER_STATE).exists():
        parameters = averaged_parameters(cache_folder() / DECODER_STATE)
        decoding_half(model).load_state_dict(parameters)
    mean = encode(model, images).mean(dim=(0, 2, 3))
    center_latents(model, mean)
    latents = encode(model, images)
    factor = scaling_factor(latents)
    model.register_to_config(scaling_factor=factor)
    return model, latents * factor


def captioned_images(table: list[Emoji]) -> Tensor:
    """The pictures of the captions table, in its order: [N, 3, 64, 64] uint8."""
    images = load_images()
    return torch.stack([images[emoji.code] for emoji in table])
