"""``image_to_uint8``: decoder output → bytes that an image file holds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def image_to_uint8(image: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Clamp, scale and round a batch of images, and move the channels last.

    Args:
        image: float [N, 3, H, W], nominally in [-1, 1].

    Returns:
        uint8 [N, H, W, 3]: ``round(255 · clamp(x / 2 + 1/2, 0, 1))``, halves to even, as diffusers'
        VaeImageProcessor and Pillow have it. NaN becomes 0; check for it before.
    """
    scaled = np.asarray(image, dtype=np.float32) * np.float32(0.5) + np.float32(0.5)
    np.clip(scaled, 0.0, 1.0, out=scaled)
    np.multiply(scaled, np.float32(255.0), out=scaled)
    np.rint(scaled, out=scaled)
    return np.ascontiguousarray(np.nan_to_num(scaled).astype(np.uint8).transpose(0, 2, 3, 1))
