"""Train a style adapter: whatever the caption says, drawn in that style.

    python -m lora.train_style delft    # blue on white: rank 4, attention alone
    python -m lora.train_style outline  # black lines: rank 4, convolutions too

A colour is decided where the U-Net looks at the caption; a line is drawn by its convolutions, and adapters
of the attention alone did not learn it. Every fourth emoji is kept out, so that the figures can say whether
a style holds for things it was not shown on.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from data import Emoji, read_captions
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
from lora.styles import STYLES
from make_tokenizer import Tokenizer
from train_denoiser import Captions, alphas_cumprod, denoising_loss

BATCH, STEPS = 32, 1200
LEARNING_RATE = 3e-3
ADAPTERS = {
    "delft": Adapter(rank=4, alpha=4, layers=ATTENTION),
    "outline": Adapter(rank=4, alpha=4, layers=(*ATTENTION, *CONVOLUTIONS)),
}
TITLES = {"delft": "Delft: cobalt blue on white", "outline": "Outline: black lines on white"}
KEPT_OUT = 4


def is_shown(number: int) -> bool:
    """Whether the styles are learned on the emoji of this line of the captions table."""
    return number % KEPT_OUT != KEPT_OUT - 1


def shown(table: list[Emoji]) -> list[Emoji]:
    """The emoji that the styles are learned on."""
    return [emoji for n, emoji in enumerate(table) if is_shown(n)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a style adapter.")
    parser.add_argument("style", choices=STYLES)
    arguments, options = training_options(parser, "{style}.pt", STEPS, LEARNING_RATE)
    style: str = arguments.style
    table, adapter = shown(read_captions()), ADAPTERS[style]
    drawings = STYLES[style](captioned_images(table) / 255.0)
    latents = scaled_latents((drawings * 255.0).round().byte())
    captions, kept, denoiser = Captions(table, Tokenizer()), alphas_cumprod(), load_denoiser()

    def loss_of(generator: torch.Generator, _: float) -> Tensor:
        chosen = torch.randint(0, len(latents), (BATCH,), generator=generator)
        ids = captions.draw(chosen, generator)
        return denoising_loss(denoiser, latents[chosen], ids, kept, generator)

    layers = train_adapter(denoiser, adapter, loss_of, options)
    about = {
        "modelspec.title": TITLES[style],
        "modelspec.description": "Draws everything in this style; no word is needed for it.",
    }
    tensors = {PREFIX + name: value for name, value in layers.items()}
    write(FOLDER / f"{style}.safetensors", tensors, adapter, about)


if __name__ == "__main__":
    main()
