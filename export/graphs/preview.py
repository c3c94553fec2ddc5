"""The preview map: from latents to a small picture without the decoder, fitted to the checkpoint's VAE."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.weights import load_module
from sdrt.export.graphs.networks import wrap
from sdrt.runtime.bundle.manifest import Preview
from sdrt.runtime.errors import NumericsError

SEED: Final = 20240301
LATENTS: Final = 16  # a side: at a factor of 8 pictures of 128 pixels, which a large VAE takes a second for
PICTURES: Final = 2  # 512 latents for five numbers of each colour; more do not come out better
# Of the pictures' blobs, as shares of the side: from a few latents to large flat areas, as drawings have.
SMALLEST_BLOB: Final = 0.06
LARGEST_BLOB: Final = 0.35
BLOBS: Final = 24
NOISE: Final = 0.1  # standard deviation, of a range of 2: texture


def fit_preview(checkpoint: Checkpoint) -> Preview:
    """The affine map that is nearest to the decoder at the latents' resolution, by least squares.

    Pictures go through the VAE's encoder, for latents as a sampler ends with, and through its decoder, whose
    output is averaged over each latent's pixels.

    Raises:
        CheckpointError: The VAE does not load.
        NumericsError: It gives NaN or infinity.
    """
    vae = load_module(checkpoint, "vae")
    encoder, decoder = wrap(checkpoint, "vae_encoder", vae), wrap(checkpoint, "vae_decoder", vae)
    pictures = torch.from_numpy(sample_pictures(PICTURES, LATENTS * checkpoint.factor))
    pairs = []
    with torch.no_grad():
        for picture in pictures:
            latents, _ = encoder(picture[None])
            pairs.append((latents, small_picture(decoder(latents), checkpoint.factor)))
    x, y = (
        torch.cat(tensors).movedim(1, -1).flatten(0, -2).double().numpy()
        for tensors in zip(*pairs, strict=True)
    )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise NumericsError("the VAE gives NaN or infinity for a plain picture: its weights are damaged")
    solution = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=None)[0]
    red, green, blue = solution[-1].tolist()
    return Preview(tuple(tuple(row) for row in solution[:-1].tolist()), (red, green, blue))


def small_picture(image: torch.Tensor, factor: int) -> torch.Tensor:
    """A decoded picture at the latents' size: the mean of each latent's pixels, [N, 3, h, w]."""
    return functional.avg_pool2d(image, factor)


def sample_pictures(count: int, side: int) -> NDArray[np.float32]:
    """Seeded pictures of gradients, blobs of all sizes and texture.

    Returns:
        float32 [count, 3, side, side], RGB in [-1, 1].
    """
    generator = np.random.default_rng(SEED)
    return np.stack([_picture(generator, side) for _ in range(count)])


def _picture(generator: np.random.Generator, side: int) -> NDArray[np.float32]:
    rows, columns = np.meshgrid(*[np.linspace(0.0, 1.0, side)] * 2, indexing="ij")
    first, second, slope = generator.uniform(-1, 1, (3, 3, 1, 1))
    picture = first + (second - first) * rows + slope * (columns - 0.5)
    for _ in range(BLOBS):
        row, column = generator.uniform(0, 1, 2)
        radius = np.exp(generator.uniform(np.log(SMALLEST_BLOB), np.log(LARGEST_BLOB)))
        distance = np.hypot(rows - row, columns - column) / radius
        edge = generator.uniform(2, 20)  # soft to sharp
        cover = 1 / (1 + np.exp(np.clip((distance - 1) * edge, -50, 50)))
        picture += cover * (generator.uniform(-1, 1, (3, 1, 1)) - picture)
    picture += NOISE * generator.standard_normal(picture.shape)
    clipped: NDArray[np.float32] = picture.clip(-1, 1).astype(np.float32)
    return clipped
