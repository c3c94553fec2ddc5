"""Latents to pixels: the VAE decoder, bound once per shape."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.devices import Buffer, Device
from sdrt.runtime.errors import NumericsError
from sdrt.runtime.executors import Executor

MAX_CACHED: Final = 4  # shapes; each holds a batch of pictures


class _Bound(NamedTuple):
    latents: Buffer
    image: Buffer
    evaluate: Callable[[], None]


class ImageDecoder:
    """The VAE decoder and its buffers."""

    def __init__(self, executor: Executor, device: Device, *, factor: int) -> None:
        """Take the decoder's executor on ``device``; ``factor`` is image pixels per latent and side."""
        self._executor = executor
        self._device = device
        self._factor = factor
        self._bound: OrderedDict[tuple[int, ...], _Bound] = OrderedDict()

    def __call__(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """float32 [N, C, h, w] → uint8 [N, H, W, 3].

        Raises:
            NumericsError: The decoder gave NaN or infinity.
        """
        bound = self._bind(latents.shape)
        self._device.upload(latents, bound.latents)
        bound.evaluate()
        if not self._device.all_finite(bound.image):
            raise NumericsError(
                "the vae_decoder gave NaN or infinity; if the bundle is fp16, export with --dtype fp32"
            )
        return self._device.image_to_uint8(bound.image)

    def _bind(self, shape: tuple[int, ...]) -> _Bound:
        """Buffers for a shape, from the cache or new; the ones unused for longest make room."""
        bound = self._bound.pop(shape, None)
        if bound is None:
            while len(self._bound) >= MAX_CACHED:
                self._bound.popitem(last=False)
            images, _, height, width = shape
            axes = {
                "batch": images,
                "latent_height": height,
                "latent_width": width,
                "height": height * self._factor,
                "width": width * self._factor,
            }
            (source,), (image,) = self._executor.spec.inputs, self._executor.spec.outputs
            given = self._device.zeros(source.concrete(axes), source.dtype)
            decoded = self._device.zeros(image.concrete(axes), image.dtype)
            evaluate = self._executor.bind({source.name: given}, {image.name: decoded})
            bound = _Bound(given, decoded, evaluate)
        self._bound[shape] = bound
        return bound
