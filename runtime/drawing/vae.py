"""The VAE: pictures to latents once per call, before the loop; latents to pictures after it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.backends.executor import Executor, replayable
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.devices.arena import Arena
from sdrt.runtime.devices.device import Device
from sdrt.runtime.drawing.loop import DenoiseLoop
from sdrt.runtime.drawing.starting_point import KnownPicture, Posterior, known_mask
from sdrt.runtime.errors import NumericsError
from sdrt.runtime.request.picture import PictureTask


class VaeEncoder:
    """The VAE encoder with buffers for the size that was encoded last."""

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

    def encode(self, image: NDArray[np.float32]) -> Posterior:
        """What the latents of a picture may be; waits.

        Args:
            image: float32 [1, 3, H, W] in [-1, 1], of a size that the bundle admits.

        Raises:
            NumericsError: The encoder gave NaN or infinity.
            DeviceMemoryError: The buffers do not fit.
            BackendError: The engine does not admit this size.
        """
        arena, evaluate = self._bind((image.shape[2], image.shape[3]))
        spec = self._executor.spec
        (source,), (mean, std) = spec.inputs, spec.outputs
        self._device.upload(np.repeat(image, self._batch, axis=0), arena[source.name])
        evaluate()
        both = arena.span(mean.name, std.name)
        arrays = both.arrays(self._device.download(both.buffer))
        posterior = Posterior(*(arrays[entry.name][:1].astype(np.float32) for entry in (mean, std)))
        if not (np.isfinite(posterior.mean).all() and np.isfinite(posterior.std).all()):
            raise NumericsError(
                "the vae_encoder gave NaN or infinity for the image; if it is fp16, export with --fp16 "
                "--vae-dtype fp32"
            )
        return posterior

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
            entries = (*spec.inputs, *spec.outputs)
            arena = Arena(
                self._device, {entry.name: (entry.concrete(axes), entry.dtype) for entry in entries}
            )
            evaluate = self._executor.bind(
                {entry.name: arena[entry.name] for entry in spec.inputs},
                {entry.name: arena[entry.name] for entry in spec.outputs},
            )
            self._bound = (size, arena, evaluate)
        return self._bound[1], self._bound[2]


class Pictures:
    """Given pictures as the loop knows them. The VAE encoder is loaded when the first one comes."""

    def __init__(self, load: Callable[[], Executor], device: Device, manifest: Manifest) -> None:
        """Keep what `known` needs; ``load`` gives the VAE encoder's executor."""
        self._load, self._device, self._manifest = load, device, manifest
        self._encoder: VaeEncoder | None = None

    def known(self, task: PictureTask) -> KnownPicture:
        """Encode the picture of a task, and without what is drawn if the U-Net reads that; waits.

        Raises:
            NumericsError: The encoder gave NaN or infinity.
            BackendError: The encoder cannot be loaded, or does not admit this size.
        """
        from sdrt.runtime.pictures.canvas import image_to_float, masked_image

        manifest, canvas = self._manifest, task.canvas
        factor = manifest.latents.factor
        if self._encoder is None:
            batch = manifest.limits.min_batch
            self._encoder = VaeEncoder(self._load(), self._device, batch=batch, factor=factor)
        latents = self._encoder.encode(image_to_float(canvas.image))
        if canvas.mask is None:
            return KnownPicture(latents)
        mask = known_mask(canvas.mask, factor, binary=manifest.reads_mask)
        if not manifest.reads_mask:
            return KnownPicture(latents, mask)
        masked = self._encoder.encode(masked_image(canvas.image, canvas.mask))
        return KnownPicture(latents, mask, masked)


class VaeDecoder:
    """The VAE decoder and its buffers for the pictures of one loop."""

    def __init__(self, executor: Executor, device: Device, loop: DenoiseLoop) -> None:
        """Allocate the decoder's buffers and bind it to them.

        Args:
            executor: The decoder's, on ``device``.
            device: Owns the buffers.
            loop: Whose latents are decoded; the pixels and the fault word are put where it keeps them.

        Raises:
            DeviceMemoryError: The buffers do not fit.
            BackendError: The engine does not admit this shape.
        """
        images, _, height, width = loop.buffers.latents.shape
        _, picture_height, picture_width, _ = loop.pixels.shape
        axes = {
            "batch": images,
            "latent_height": height,
            "latent_width": width,
            "height": picture_height,
            "width": picture_width,
        }
        (source,), (image,) = executor.spec.inputs, executor.spec.outputs
        arena = Arena(device, {entry.name: (entry.concrete(axes), entry.dtype) for entry in (source, image)})
        given, decoded = arena[source.name], arena[image.name]
        conversion = loop.converted_latents(given)
        evaluate = executor.bind({source.name: given}, {image.name: decoded})
        fault, pixels = loop.decoder_fault, loop.pixels

        def decode() -> None:
            device.prepare_input(conversion)
            evaluate()
            device.check_finite(decoded, fault)
            device.image_to_uint8(decoded, pixels)

        self.decode = replayable(device, decode, [executor])
        """Queue the decoding of the loop's latents."""
