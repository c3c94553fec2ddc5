"""Distil guidance and many steps into four steps without guidance: LCM-LoRA (Luo et al., arXiv 2311.05556).

    python -m lora.train_few_steps

The checkpoint is its own teacher. From a noisy picture at one of 50 timesteps the teacher goes one step
down, by DDIM and with guidance; the student has to say of both places that they lead to the same picture
(Song et al. 2023, consistency distillation; Luo et al. 2023, arXiv 2310.04378, algorithm 1, with one fixed
guidance scale).
"""

from __future__ import annotations

import argparse

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from data import read_captions
from latents import captioned_images
from lora.adapters import (
    ATTENTION,
    CONVOLUTIONS,
    FOLDER,
    PREFIX,
    Adapter,
    load_denoiser,
    scaled_latents,
    train_adapter,
    training_options,
    write,
)
from make_tokenizer import Tokenizer
from train_denoiser import Captions, Denoiser, add_noise, alphas_cumprod

BATCH, STEPS = 16, 1500
LEARNING_RATE = 1e-3
ADAPTER = Adapter(rank=4, alpha=4, layers=(*ATTENTION, *CONVOLUTIONS))
GUIDANCE = 5.0
GROUP_SHARE = 0.4  # guidance is what these need; the captions come out right without it
TEACHER_STEPS, TIMESTEPS = 50, 1000
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # what `lcm` samplers assume
HUBER = 1e-3


def boundary(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out: [N] → two times [N, 1, 1, 1]; at timestep 0 the picture is the input (eq. 9)."""
    scaled = TIMESTEP_SCALING * timesteps.view(-1, 1, 1, 1).float()
    norm = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm, scaled / norm.sqrt()


def clean(noisy: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
    """The picture that a predicted noise leaves: (x_t − √(1−ᾱ)·ε) / √ᾱ, with `kept` = ᾱ of each: [N]."""
    kept = kept.view(-1, 1, 1, 1)
    return (noisy - (1.0 - kept).sqrt() * noise) / kept.sqrt()


class Distillation:
    """The consistency loss of a U-Net with an adapter against itself without."""

    def __init__(self, denoiser: Denoiser, latents: Tensor, captions: Captions) -> None:
        self.unet: UNet2DConditionModel = denoiser.unet
        self.text_encoder = denoiser.text_encoder
        self.latents, self.captions, self.kept = latents, captions, alphas_cumprod()
        self.empty = torch.tensor([captions.empty])

    def consistent(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The student's picture for each place on a path: f_θ(x_t, t)."""
        skip, out = boundary(timesteps)
        noise = self.unet(noisy, timesteps, text).sample
        return skip * noisy + out * clean(noisy, noise, self.kept[timesteps])

    @torch.no_grad()
    def one_step_down(self, noisy: Tensor, timesteps: Tensor, earlier: Tensor, text: Tensor) -> Tensor:
        """The teacher's guided DDIM step to the next of its timesteps, and from the last of them to 0."""
        self.unet.disable_adapters()
        empty = self.text_encoder(self.empty).last_hidden_state.expand_as(text)
        both = self.unet(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([empty, text])).sample
        self.unet.enable_adapters()
        plain, named = both.chunk(2)
        noise = plain + GUIDANCE * (named - plain)
        return add_noise(clean(noisy, noise, self.kept[timesteps]), noise, self.kept[earlier])

    def __call__(self, generator: torch.Generator, _: float) -> Tensor:
        chosen = torch.randint(0, len(self.latents), (BATCH,), generator=generator)
        stride = TIMESTEPS // TEACHER_STEPS
        timesteps = torch.randint(1, TEACHER_STEPS + 1, (BATCH,), generator=generator) * stride - 1
        earlier = (timesteps - stride).clamp(min=0)
        noise = torch.randn(self.latents[chosen].shape, generator=generator)
        noisy = add_noise(self.latents[chosen], noise, self.kept[timesteps])
        with torch.no_grad():
            text = self.text_encoder(self.captions.draw(chosen, generator)).last_hidden_state
            nearer = self.one_step_down(noisy, timesteps, earlier, text)
            target = self.consistent(nearer, earlier, text)
        error = self.consistent(noisy, timesteps, text) - target
        return ((error.square() + HUBER**2).sqrt() - HUBER).mean()


class GroupedCaptions(Captions):
    """Captions of which more name only the group."""

    def draw(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        ids = super().draw(chosen, generator)
        grouped = torch.rand(len(chosen), generator=generator) < GROUP_SHARE
        return torch.where(grouped[:, None], torch.tensor([self.groups[n] for n in chosen.tolist()]), ids)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the few-step adapter.")
    _, options = training_options(parser, "lcm.pt", STEPS, LEARNING_RATE)
    table = read_captions()
    denoiser = load_denoiser()
    latents = scaled_latents(captioned_images(table))
    loss_of = Distillation(denoiser, latents, GroupedCaptions(table, Tokenizer()))
    layers = train_adapter(denoiser, ADAPTER, loss_of, options)
    about = {
        "modelspec.title": "LCM: four steps without guidance",
        "modelspec.description": "For the sampler lcm, 4 steps, guidance 1.",
    }
    tensors = {PREFIX + name: value for name, value in layers.items()}
    write(FOLDER / "lcm.safetensors", tensors, ADAPTER, about)


if __name__ == "__main__":
    main()
