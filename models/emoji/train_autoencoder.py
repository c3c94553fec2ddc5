"""Stage 1: train the autoencoder on all emoji, those with captions more often.

    python train_autoencoder.py --minutes 35

Random 32-pixel crops first (the network is convolutional, and small pictures make varied batches), whole
pictures for the rest, because the borders and the attention see something else there. The loss is the mean
absolute and squared error of pixels and of their differences to the neighbours, and a small KL term.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from architecture import build_autoencoder
from data import IMAGE_SIZE, cache_folder, load_images, read_captions, to_unit_range
from latents import AUTOENCODER_STATE
from training import Options, add_arguments, options_from, train

CROP = 32
CROP_UNTIL = 0.45  # of the budget
CROP_BATCH, WHOLE_BATCH = 24, 8
CAPTIONED_SHARE = 0.65
EDGE_WEIGHT, KL_WEIGHT = 0.5, 2e-4
LATENT_NOISE = 0.04  # of the latents' standard deviation
LEARNING_RATE = 2e-3


def random_crops(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """One crop of each picture, mirrored half of the time: [N, 3, H, W] → [N, 3, size, size]."""
    room = images.shape[-1] - size + 1
    crops = []
    for image in images:
        top, left, mirror = torch.randint(0, room * room * 2, (3,), generator=generator).tolist()
        top, left = top % room, left % room
        crop = image[:, top : top + size, left : left + size]
        crops.append(crop.flip(-1) if mirror % 2 else crop)
    return torch.stack(crops)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Absolute plus squared error of pixels, plus the same of horizontal and vertical differences."""
    error = output - target
    edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) * EDGE_WEIGHT
    return error.abs().mean() + error.square().mean() + edges


def batch_loss(model: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """Loss of one batch of pictures [N, 3, H, W] in [-1, 1].

    The posterior alone soon has hardly any noise; some more keeps the decoder tolerant of latents that
    the denoiser gets slightly wrong.
    """
    posterior = model.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(images.device)
    least = LATENT_NOISE * posterior.mean.detach().std()
    output = model.decode(posterior.mean + (posterior.var + least**2).sqrt() * noise).sample
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
    loss: Tensor = reconstruction_loss(output, images) + KL_WEIGHT * kl
    return loss


def choose(
    captioned: int, total: int, count: int, generator: torch.Generator, share: float = CAPTIONED_SHARE
) -> Tensor:
    """Indices of a batch; the first `captioned` pictures make up `share` of it."""
    from_captioned = torch.rand(count, generator=generator) < share
    near = torch.randint(0, captioned, (count,), generator=generator)
    far = torch.randint(0, total, (count,), generator=generator)
    return torch.where(from_captioned, near, far)


def train_autoencoder(images: Tensor, captioned: int, options: Options) -> AutoencoderKL:
    """Train on uint8 pictures [N, 3, 64, 64], of which the first `captioned` matter most."""
    torch.manual_seed(options.seed)
    model = build_autoencoder().to(options.device)

    def loss_of(generator: torch.Generator, used: float) -> Tensor:
        size, count = (CROP, CROP_BATCH) if used < CROP_UNTIL else (IMAGE_SIZE, WHOLE_BATCH)
        chosen = images[choose(captioned, len(images), count, generator)]
        batch = to_unit_range(random_crops(chosen, size, generator)).to(options.device)
        return batch_loss(model, batch, generator)

    train(model, loss_of, options).copy_to(model)
    return model


def ordered_images(images: dict[str, Tensor], codes: list[str]) -> Tensor:
    """All pictures as one tensor, those named by `codes` first."""
    rest = sorted(images.keys() - set(codes))
    return torch.stack([images[code] for code in [*codes, *rest]])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the autoencoder.")
    add_arguments(parser, minutes=35)
    arguments = parser.parse_args()
    cache = cache_folder()
    options = options_from(arguments, cache / AUTOENCODER_STATE, LEARNING_RATE)
    codes = [emoji.code for emoji in read_captions()]
    train_autoencoder(ordered_images(load_images(cache), codes), len(codes), options)


if __name__ == "__main__":
    main()
