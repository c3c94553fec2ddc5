"""Pictures to latents: the VAE encoder, once per call, before the loop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.arena import Arena
from sdrt.runtime.devices import Device
from sdrt.runtime.errors import NumericsError
from sdrt.runtime.executors import Executor
from sdrt.runtime.manifest import Manifest
from sdrt.runtime.request_picture import PictureTask
from sdrt.runtime.start import KnownPicture, known_mask


class ImageEncoder:
    """The VAE encoder with buffers for the size that was encoded last.

    It gives the mean of the posterior: diffusers draws from the posterior, whose deviation is some hundredth
    of the latents', so that the picture depends on the seed once more.
    """

    def __init__(self, executor: Executor, device: Device, *, batch: int, factor: int) -> None:
        """Keep what `encode` needs.

        Args:
            executor: The encoder's, on ``device``.
            device: Owns the buffers.
            batch: The smallest batch that the graph admits; every row of it holds the same picture.
            factor: Image pixels per latent and side.
        """
        self._executor, self._device, self._batch, self._factor = executor, device, batch, factor
        self._bound: tuple[tuple[int, int], Arena, Callable[[], None]] | None = None

    def encode(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """The latents of a picture; waits.

        Args:
            image: float32 [1, 3, H, W] in [-1, 1], of a size that the bundle admits.

        Returns:
            float32 [1, C, h, w] in the sampler's scale.

        Raises:
            NumericsError: The encoder gave NaN or infinity.
            DeviceMemoryError: The buffers do not fit.
            BackendError: The engine does not admit this size.
        """
        arena, evaluate = self._bind((image.shape[2], image.shape[3]))
        source, mean = self._executor.spec.inputs[0], self._executor.spec.outputs[0]
        self._device.upload(np.repeat(image, self._batch, axis=0), arena[source.name])
        evaluate()
        latents = self._device.download(arena[mean.name])[:1].astype(np.float32)
        if not np.isfinite(latents).all():
            raise NumericsError(
                "the vae_encoder gave NaN or infinity for the image; if it is fp16, export with --fp16 "
                "--vae-dtype fp32"
            )
        return latents

    def _bind(self, size: tuple[int, int]) -> tuple[Arena, Callable[[], None]]:
        if self._bound is None or self._bound[0] != size:
            self._bound = None  # its memory is free for the next
            axes = {
                "batch": self._batch,
                "height": size[0],
                "width": size[1],
                "latent_height": size[0] // self._factor,
                "latent_width": size[1] // self._factor,
            }
            spec = self._executor.spec
            (source,), mean = spec.inputs, spec.outputs[0]
            arena = Arena(
                self._device, {entry.name: (entry.concrete(axes), entry.dtype) for entry in (source, mean)}
            )
            evaluate = self._executor.bind({source.name: arena[source.name]}, {mean.name: arena[mean.name]})
            self._bound = (size, arena, evaluate)
        return self._bound[1], self._bound[2]


class Pictures:
    """Given pictures as the loop knows them. The VAE encoder is loaded when the first one comes."""

    def __init__(self, load: Callable[[], Executor], device: Device, manifest: Manifest) -> None:
        """Keep what `known` needs; ``load`` gives the VAE encoder's executor."""
        self._load, self._device, self._manifest = load, device, manifest
        self._encoder: ImageEncoder | None = None

    def known(self, task: PictureTask) -> KnownPicture:
        """Encode the picture of a task, and without what is drawn if the U-Net reads that; waits.

        Raises:
            NumericsError: The encoder gave NaN or infinity.
            BackendError: The encoder cannot be loaded, or does not admit this size.
        """
        from sdrt.runtime.canvas import image_to_float, masked_image

        manifest, canvas = self._manifest, task.canvas
        factor = manifest.latents.factor
        if self._encoder is None:
            batch = manifest.limits.min_batch
            self._encoder = ImageEncoder(self._load(), self._device, batch=batch, factor=factor)
        latents = self._encoder.encode(image_to_float(canvas.image))
        if canvas.mask is None:
            return KnownPicture(latents)
        mask = known_mask(canvas.mask, factor, binary=manifest.reads_mask)
        if not manifest.reads_mask:
            return KnownPicture(latents, mask)
        masked = self._encoder.encode(masked_image(canvas.image, canvas.mask))
        return KnownPicture(latents, mask, masked)
