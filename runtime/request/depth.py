"""The depth map that a call is drawn with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.bundle.families.depth import DEPTH_MAP
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.errors import UsageError
from sdrt.runtime.request.picture import picture_recipe


@dataclass(frozen=True, slots=True)
class DepthMap:
    """A depth map that was given.

    Attributes:
        levels: float32 [H, W]: as they were read, or in [-1, 1] at the latents' size.
        recipe: The argument behind it, as plain data.
    """

    levels: NDArray[np.float32]
    recipe: Mapping[str, Any]

    def drawn_size(self, manifest: Manifest) -> tuple[int, int]:
        """Height and width that a bundle draws of it where no other is asked for."""
        from sdrt.runtime.pictures.canvas import drawn_size

        return drawn_size(self.levels.shape, manifest.limits, None, None)

    def of_latents(self, manifest: Manifest, height: int, width: int) -> DepthMap:
        """As the U-Net reads it for pictures of that size.

        Raises:
            UsageError: It is of one level all over.
        """
        from sdrt.runtime.pictures.depth import depth_of_latents

        factor = manifest.latents.factor
        levels = depth_of_latents(self.levels, (height // factor, width // factor))
        return replace(self, levels=levels)


def build_depth(manifest: Manifest, options: Mapping[str, Any]) -> DepthMap | None:
    """Read what a call gives as depth map; None for a bundle that reads none.

    Raises:
        UsageError: It is missing, or cannot be read.
    """
    if not manifest.reads_depth:
        return None
    given = options.get(DEPTH_MAP)
    if given is None:
        raise UsageError("this bundle draws with depth maps: it needs a depth_map (--depth FILE)")
    from sdrt.runtime.pictures.reading import read_levels

    levels = read_levels(given, DEPTH_MAP)
    return DepthMap(levels, picture_recipe(options, DEPTH_MAP, levels))
