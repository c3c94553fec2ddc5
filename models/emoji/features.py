"""What makes two small pictures alike, for finding the training picture nearest to a drawn one.

Three fixed descriptors, nothing learned: where edges of which direction are (histograms of oriented
gradients, Dalal & Triggs 2005, softened by a blur), which colours are where (a coarse thumbnail), and which
colours there are at all (a histogram). Each is scaled to unit length, so a squared distance is a sum of three
cosine distances. Against raw pixels this forgives shifts of a few pixels, blur and noise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CELLS, DIRECTIONS = 8, 8
THUMBNAIL = 8
COLOUR_LEVELS = 4
WEIGHTS = {"edges": 1.0, "layout": 1.0, "colours": 0.5}


def features(images: Tensor) -> Tensor:
    """Descriptors of pictures [N, 3, 64, 64] in 0…1: [N, D], float32."""
    parts = {"edges": edges(images), "layout": layout(images), "colours": colours(images)}
    return torch.cat([WEIGHTS[name] * F.normalize(part) for name, part in parts.items()], dim=1)


def blur(images: Tensor) -> Tensor:
    """A 3 x 3 binomial blur with repeated borders."""
    row = torch.tensor([0.25, 0.5, 0.25])
    kernel = (row[:, None] * row).expand(images.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=images.shape[1])


def edges(images: Tensor) -> Tensor:
    """Gradient strength per direction and cell, with square root to tame strong edges: [N, 512]."""
    grey = blur(images).mean(dim=1)
    across, down = torch.gradient(grey, dim=(2, 1))
    strength = (across.square() + down.square()).sqrt()
    # Directions modulo 180 degrees: a dark-to-bright edge is like a bright-to-dark one.
    place = torch.atan2(down, across) / torch.pi % 1.0 * DIRECTIONS
    bins = torch.arange(DIRECTIONS).view(1, -1, 1, 1)
    apart = (place[:, None] - bins).abs()
    nearness = (1.0 - torch.minimum(apart, DIRECTIONS - apart)).clamp(min=0.0)
    cells = F.adaptive_avg_pool2d(strength[:, None] * nearness, CELLS)
    return cells.flatten(1).sqrt()


def layout(images: Tensor) -> Tensor:
    """Mean colour, as distance from white, of each cell of a coarse grid: [N, 192]."""
    return F.adaptive_avg_pool2d(1.0 - images, THUMBNAIL).flatten(1)


def colours(images: Tensor) -> Tensor:
    """How much of each colour there is, white left out: [N, 64].

    Each pixel is shared among the neighbouring levels of each channel, so no colour sits on a border.
    """
    levels = torch.arange(COLOUR_LEVELS).view(1, -1, 1, 1, 1)
    places = images[:, None] * (COLOUR_LEVELS - 1)
    shares = (1.0 - (places - levels).abs()).clamp(min=0.0).flatten(3)
    red, green, blue = shares.unbind(dim=2)
    histogram = torch.einsum("nrp,ngp,nbp->nrgb", red, green, blue)
    histogram[:, -1, -1, -1] = 0.0
    return histogram.flatten(1).sqrt()


def distances(drawn: Tensor, known: Tensor) -> Tensor:
    """Distance of every drawn picture to every known one: [N, 3, H, W], [M, 3, H, W] → [N, M]."""
    return torch.cdist(features(drawn), features(known))
