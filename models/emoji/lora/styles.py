"""The training pictures redrawn in a style: what the style adapters learn from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from features import blur

LUMINANCE = (0.299, 0.587, 0.114)
COBALT = (0.02, 0.14, 0.55)
DEPTH = 1.7  # exponent of the luminance: yellow would be nearly white without it
# Gradients of pictures in 0…1: below FAINT there is no line, a little above it the line is full.
FAINT, SLOPE = 0.12, 6.0
INK = 1.2  # the blur that makes lines two pixels wide also thins them


def delft(images: Tensor) -> Tensor:
    """Cobalt blue on white, as on painted tiles: [N, 3, H, W] in 0…1 → the same."""
    weights, ink = torch.tensor(LUMINANCE).view(1, 3, 1, 1), torch.tensor(COBALT).view(1, 3, 1, 1)
    bright = (images * weights).sum(dim=1, keepdim=True) ** DEPTH
    return ink + (1.0 - ink) * bright


def outline(images: Tensor) -> Tensor:
    """Black lines on white along the edges of pictures: [N, 3, H, W] in 0…1 → the same."""
    smooth = blur(images)
    across = F.pad(smooth[..., :, 2:] - smooth[..., :, :-2], (1, 1, 0, 0))
    down = F.pad(smooth[..., 2:, :] - smooth[..., :-2, :], (0, 0, 1, 1))
    strength = (across.square() + down.square()).mean(dim=1, keepdim=True).sqrt()
    lines = blur(((strength - FAINT) * SLOPE).clamp(0, 1)) * INK
    return (1.0 - lines).clamp(0, 1).expand(-1, 3, -1, -1)


STYLES = {"delft": delft, "outline": outline}
