"""How large a picture is drawn, and its latents."""

from __future__ import annotations

from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.checks import whole
from sdrt.runtime.errors import UsageError


def checked_size(manifest: Manifest, height: object, width: object) -> tuple[int, int]:
    """Height and width in pixels, the bundle's own where None is given.

    Raises:
        UsageError: A size that the bundle does not admit.
    """
    defaults, limits = manifest.defaults, manifest.limits
    sizes = []
    for name, given, default, limit in (
        ("height", height, defaults.height, limits.height),
        ("width", width, defaults.width, limits.width),
    ):
        size = default if given is None else whole(name, given)
        if not limit.admits(size):
            raise UsageError(f"{name} is {size}: this bundle draws {limit} pixels")
        sizes.append(size)
    return sizes[0], sizes[1]


def latent_shape(manifest: Manifest, height: int, width: int) -> tuple[int, int, int]:
    """[C, h, w] of one image's latents."""
    geometry = manifest.latents
    return geometry.channels, height // geometry.factor, width // geometry.factor
