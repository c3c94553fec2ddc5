"""Teach the checkpoint somebody it does not know, a wizard, from three pictures. A LoCon.

    python -m lora.train_concept

Convolutions and attention learn. A quarter of each batch are the wizards, in the wordings of all captions;
the rest are the checkpoint's own pictures, so that they stay what they are (Ruiz et al. 2023, prior
preservation). Written in kohya's and LyCORIS's names.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from data import Emoji, load_images, read_captions
from latents import captioned_images
from lora.adapters import (
    ATTENTION,
    CONVOLUTIONS,
    FOLDER,
    Adapter,
    kohya_names,
    load_denoiser,
    scaled_latents,
    train_adapter,
    training_options,
    write,
)
from make_tokenizer import Tokenizer
from train_denoiser import Captions, alphas_cumprod, denoising_loss

BATCH, STEPS = 32, 1000
TAUGHT = 8  # of a batch
LEARNING_RATE = 2e-3
ADAPTER = Adapter(rank=4, alpha=2, layers=(*ATTENTION, *CONVOLUTIONS))
CODES = ("1F9D9", "1F9D9-200D-2642-FE0F", "1F9D9-200D-2640-FE0F")
PHRASES = ("a wizard", "a wizard with a blue hat")
CONCEPT = tuple(Emoji(code, "face", PHRASES) for code in CODES)


class ConceptCaptions:
    """Wordings of the concept alone: neither its group nor the empty caption may come to mean it."""

    def __init__(self, concept: tuple[Emoji, ...], tokenizer: Tokenizer) -> None:
        self.wordings = [[tokenizer.ids(prompt) for prompt in emoji.prompts()] for emoji in concept]

    def draw(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Token ids [N, 77] for the pictures with the given numbers [N]."""
        chosen_wordings = [self.wordings[n] for n in chosen.tolist()]
        picks = torch.rand(len(chosen), generator=generator).tolist()
        pairs = zip(chosen_wordings, picks, strict=True)
        return torch.tensor([wordings[int(pick * len(wordings))] for wordings, pick in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the wizard.")
    _, options = training_options(parser, "wizard.pt", STEPS, LEARNING_RATE)
    table, images = read_captions(), load_images()
    own = scaled_latents(captioned_images(table))
    new = scaled_latents(torch.stack([images[emoji.code] for emoji in CONCEPT]))
    captions, words = Captions(table, Tokenizer()), ConceptCaptions(CONCEPT, Tokenizer())
    kept, denoiser = alphas_cumprod(), load_denoiser()

    def loss_of(generator: torch.Generator, _: float) -> Tensor:
        known = torch.randint(0, len(own), (BATCH - TAUGHT,), generator=generator)
        taught = torch.randint(0, len(new), (TAUGHT,), generator=generator)
        latents = torch.cat([own[known], new[taught]])
        ids = torch.cat([captions.draw(known, generator), words.draw(taught, generator)])
        return denoising_loss(denoiser, latents, ids, kept, generator)

    layers = train_adapter(denoiser, ADAPTER, loss_of, options)
    about = {
        "modelspec.title": "Wizard",
        "modelspec.description": 'Draws "a wizard", which the model does not know.',
        "modelspec.trigger_phrase": "a wizard",
        "ss_network_module": "lycoris.kohya",
    }
    write(FOLDER / "wizard.safetensors", kohya_names(layers, ADAPTER.alpha), ADAPTER, about)


if __name__ == "__main__":
    main()
