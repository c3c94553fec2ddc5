"""Depth maps: a picture's levels, brought to the latents' size and to [-1, 1]."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.errors import UsageError

_BICUBIC: Final = -0.75  # of Keys' kernel, as PyTorch's interpolation has it (Pillow's is -0.5)
_TAPS: Final = 4


def depth_of_latents(levels: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """A depth map as the U-Net reads it.

    As diffusers' depth pipeline does it: resized with PyTorch's bicubic interpolation, which does not smooth
    before it makes smaller, then from the lowest and highest level to -1 and 1. What lies beside the middle
    in the latents' proportions is cut off first, as of a picture.

    Args:
        levels: float32 [H, W], finite, the higher the nearer; its scale means nothing.
        size: Height and width of the latents.

    Returns:
        float32 [h, w] in [-1, 1].

    Raises:
        UsageError: All of it is one depth.
    """
    middle = _middle(levels, size)
    resized = _resized(_resized(middle, size[0]).T, size[1]).T
    low, high = resized.min(), resized.max()
    if not high > low:
        raise UsageError("depth_map is of one level all over: there is no depth in it")
    depth = np.float32(2.0) * (resized - low) / (high - low) - np.float32(1.0)
    return np.ascontiguousarray(depth, np.float32)


def _middle(levels: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """The largest part in the middle with the proportions of a size, in whole pixels."""
    rows, columns = levels.shape
    scale = min(rows / size[0], columns / size[1])
    kept = [max(1, round(scale * side)) for side in size]
    top, left = (rows - kept[0]) // 2, (columns - kept[1]) // 2
    return levels[top : top + kept[0], left : left + kept[1]]


def _resized(levels: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """The rows of an array at another number: Keys' cubic convolution (1981), edges continued."""
    count = len(levels)
    places = (np.arange(size) + 0.5) * (count / size) - 0.5
    first = np.floor(places)
    distance = (places - first)[:, None] - np.arange(-1, _TAPS - 1)  # [size, taps], from -2 to 2
    near, far = np.abs(distance), np.abs(distance)
    a = _BICUBIC
    weights = np.where(
        near <= 1,
        ((a + 2) * near - (a + 3)) * near**2 + 1,
        ((a * far - 5 * a) * far + 8 * a) * far - 4 * a,
    )
    rows = np.clip(first[:, None].astype(np.int64) + np.arange(-1, _TAPS - 1), 0, count - 1)
    resized: NDArray[np.float64] = np.einsum("st,stw->sw", weights, levels[rows].astype(np.float64))
    return resized.astype(np.float32)
