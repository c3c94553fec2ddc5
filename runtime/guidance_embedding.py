"""How a latent consistency model is told the guidance scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SCALE = 1000.0  # of w, on the timesteps' scale
LOWEST = 1e-4  # frequency; the highest is 1


def guidance_embedding(w: float, width: int) -> NDArray[np.float32]:
    """The sinusoidal embedding of w, an input of the U-Net (Luo et al. 2023, section 4.3).

    Equal to ``get_guidance_scale_embedding`` of diffusers' pipelines.

    Args:
        w: ``guidance_scale - 1``, 0 for no guidance.
        width: Of the embedding, at least 4; an odd one ends with a zero.

    Returns:
        float32 [width].
    """
    half = width // 2
    # In float32 as diffusers has it: the angles are up to 14,000, where a float32 is 5e-4 from the next.
    step = np.log(np.float32(1 / LOWEST)) / np.float32(half - 1)
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -step)
    angles = np.float32(w) * np.float32(SCALE) * frequencies
    embedding = np.zeros(width, dtype=np.float32)
    embedding[:half], embedding[half : 2 * half] = np.sin(angles), np.cos(angles)
    return embedding
