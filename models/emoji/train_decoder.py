"""Stage 3: train the decoder some more, mostly on the pictures that the model draws.

    python train_decoder.py --minutes 15

The encoder stays as it is, so the latents that the denoiser knows do not move; stages 2 and 3 can run in
either order. The latents get some noise, as those of the denoiser are never quite right either.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from data import cache_folder, load_images, read_captions, to_unit_range
from latents import DECODER_STATE, autoencoder_of_stage_1, decoding_half, encode
from train_autoencoder import choose, ordered_images, reconstruction_loss
from training import Options, add_arguments, options_from, train

BATCH = 8
CAPTIONED_SHARE = 0.75
LATENT_NOISE = 0.06  # of the latents' standard deviation
LEARNING_RATE = 5e-4


def train_decoder(autoencoder: AutoencoderKL, images: Tensor, captioned: int, options: Options) -> None:
    """Train in place on uint8 pictures [N, 3, 64, 64], of which the first `captioned` matter most."""
    torch.manual_seed(options.seed)
    latents = encode(autoencoder, images).to(options.device)
    autoencoder.to(options.device)
    modules = decoding_half(autoencoder).requires_grad_(True)
    noise_level = LATENT_NOISE * latents.std()

    def loss_of(generator: torch.Generator, _: float) -> Tensor:
        chosen = choose(captioned, len(images), BATCH, generator, CAPTIONED_SHARE)
        noise = torch.randn(BATCH, *latents.shape[1:], generator=generator).to(options.device)
        noisy = latents[chosen.to(options.device)] + noise_level * noise
        target = to_unit_range(images[chosen]).to(options.device)
        return reconstruction_loss(autoencoder.decode(noisy).sample, target)

    train(modules, loss_of, options).copy_to(modules)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the decoder with the encoder frozen.")
    add_arguments(parser, minutes=15)
    arguments = parser.parse_args()
    cache = cache_folder()
    options = options_from(arguments, cache / DECODER_STATE, LEARNING_RATE)
    codes = [emoji.code for emoji in read_captions()]
    images = ordered_images(load_images(cache), codes)
    train_decoder(autoencoder_of_stage_1(), images, len(codes), options)


if __name__ == "__main__":
    main()
