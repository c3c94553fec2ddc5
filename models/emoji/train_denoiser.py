"""Stage 2: train the U-Net and the text encoder on the latents of the captioned emoji.

    python train_denoiser.py --minutes 80

The autoencoder of stage 1 is frozen and its latents are computed once. Each step then noises a batch in one
shot, every picture at its own timestep (Ho et al. 2020, eq. 4), and the network predicts the noise from the
noisy latents, the timestep and the caption. A tenth of the captions is left empty, so that the network also
learns the unconditional prediction that classifier-free guidance needs (Ho & Salimans 2022).
"""

from __future__ import annotations

import argparse

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from architecture import SCHEDULER, build_text_encoder, build_unet
from data import GROUP_PROMPTS, Emoji, cache_folder, read_captions
from latents import captioned_images, frozen_autoencoder
from make_tokenizer import Tokenizer
from training import Options, add_arguments, options_from, train

BATCH = 32
LEARNING_RATE = 1e-3
AVERAGE = 0.999
EMPTY_SHARE, GROUP_SHARE = 0.10, 0.06
MAX_SNR = 5.0
STATE = "denoiser.pt"


class Denoiser(nn.Module):
    """The two networks that are trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder: CLIPTextModel = build_text_encoder()
        self.unet: UNet2DConditionModel = build_unet()

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """(latents [N, 4, h, w], timesteps [N], token ids [N, 77]) → predicted noise [N, 4, h, w]."""
        text = self.text_encoder(ids).last_hidden_state
        predicted: Tensor = self.unet(noisy, timesteps, text).sample
        return predicted


def alphas_cumprod() -> Tensor:
    """ᾱ_t of the scaled-linear schedule: [1000], float32."""
    count = SCHEDULER["num_train_timesteps"]
    roots = torch.linspace(SCHEDULER["beta_start"] ** 0.5, SCHEDULER["beta_end"] ** 0.5, count)
    return torch.cumprod(1.0 - roots.square(), dim=0)


def add_noise(latents: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
    """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε, with `kept` = ᾱ_t of each picture: [N]."""
    kept = kept.view(-1, 1, 1, 1)
    return kept.sqrt() * latents + (1.0 - kept).sqrt() * noise


def spread_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of `count` equal parts of 0…999, shuffled: less noisy than independent."""
    places = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    steps: int = SCHEDULER["num_train_timesteps"]
    return (places * steps / count).long()


def snr_weights(kept: Tensor) -> Tensor:
    """min(SNR, 5) / SNR (Hang et al. 2023): nearly clean pictures, an easy task, count for less."""
    snr = kept / (1.0 - kept)
    return snr.clamp(max=MAX_SNR) / snr


class Captions:
    """Every wording of every emoji as token ids, and a way to draw one."""

    def __init__(self, table: list[Emoji], tokenizer: Tokenizer) -> None:
        self.empty = tokenizer.ids("")
        self.wordings = [[tokenizer.ids(prompt) for prompt in emoji.prompts()] for emoji in table]
        self.groups = [tokenizer.ids(GROUP_PROMPTS[emoji.group]) for emoji in table]

    def draw(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Token ids [N, 77] for the emoji with the given numbers [N].

        Mostly one of the emoji's own wordings, sometimes its group ("a fruit") or the empty caption.
        """
        rows = []
        kinds = torch.rand(len(chosen), generator=generator).tolist()
        for index, kind in zip(chosen.tolist(), kinds, strict=True):
            if kind < EMPTY_SHARE:
                rows.append(self.empty)
            elif kind < EMPTY_SHARE + GROUP_SHARE:
                rows.append(self.groups[index])
            else:
                wordings = self.wordings[index]
                pick = torch.randint(0, len(wordings), (), generator=generator)
                rows.append(wordings[int(pick)])
        return torch.tensor(rows)


def denoising_loss(
    model: nn.Module, latents: Tensor, ids: Tensor, kept: Tensor, generator: torch.Generator
) -> Tensor:
    """Weighted mean squared error of the predicted noise for a batch of scaled latents."""
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    timesteps = spread_timesteps(len(latents), generator).to(latents.device)
    kept = kept[timesteps]
    predicted = model(add_noise(latents, noise, kept), timesteps, ids)
    error = (predicted - noise).square().mean(dim=(1, 2, 3))
    loss: Tensor = (snr_weights(kept) * error).mean()
    return loss


def train_denoiser(latents: Tensor, captions: Captions, options: Options) -> Denoiser:
    """Train on scaled latents [N, 4, h, w], in the order of the captions table."""
    torch.manual_seed(options.seed)
    model = Denoiser().to(options.device)
    latents, kept = latents.to(options.device), alphas_cumprod().to(options.device)

    def loss_of(generator: torch.Generator, _: float) -> Tensor:
        chosen = torch.randint(0, len(latents), (BATCH,), generator=generator)
        ids = captions.draw(chosen, generator).to(options.device)
        return denoising_loss(model, latents[chosen.to(options.device)], ids, kept, generator)

    train(model, loss_of, options).copy_to(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the U-Net and the text encoder.")
    add_arguments(parser, minutes=80)
    arguments = parser.parse_args()
    options = options_from(arguments, cache_folder() / STATE, LEARNING_RATE, AVERAGE)
    table = read_captions()
    _, latents = frozen_autoencoder(captioned_images(table))
    train_denoiser(latents, Captions(table, Tokenizer()), options)


if __name__ == "__main__":
    main()
