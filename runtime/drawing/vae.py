"""The VAE: pictures to latents once per call, before the loop; latents to pictures after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.backends.executor import Executor, replayable
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.devices.arena import Arena
from sdrt.runtime.devices.device import Device
from sdrt.runtime.drawing.loop import DenoiseLoop
from sdrt.runtime.errors import NumericsError

if TYPE_CHECKING:
    from sdrt.runtime.pictures.canvas import Canvas
    from sdrt.runtime.request.picture import PictureTask

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Posterior:
    """What the VAE says that a picture's latents may be: independent normal numbers.

    Attributes:
        mean: float32 [1, C, h, w] in the sampler's scale.
        std: Standard deviations, float32 [1, C, h, w] in the sampler's scale.
    """

    mean: FloatArray
    std: FloatArray

    def sample(self, noise: FloatArray) -> FloatArray:
        """Latents of each image, float32 of noise's shape [N, C, h, w]; ``noise`` has unit variance."""
        return self.mean + self.std * noise


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A given picture as the loop reads it.

    Attributes:
        latents: The whole picture's latents; or what else a U-Net reads of it, as it may be with noise.
        mask: float32 [1, 1, h, w], 1 is drawn; None where all is.
        masked_latents: Those of the picture without what is drawn, for U-Nets that read it.
    """

    latents: Posterior
    mask: FloatArray | None = None
    masked_latents: Posterior | None = None


def noised_pixels(manifest: Manifest, picture: PictureTask) -> Posterior:
    """A picture's own pixels as they may be with noise of its level, float32 [1, 3, H, W]."""
    from sdrt.runtime.pictures.canvas import image_to_float

    assert manifest.noising is not None  # by the manifest's rules
    share = manifest.noising.schedule.alphas_cumprod.astype(np.float32)[picture.noise_level]
    noise = np.full((1, 1, 1, 1), np.sqrt(np.float32(1) - share), np.float32)
    return Posterior(np.sqrt(share) * image_to_float(picture.canvas.image), noise)


class VaeEncoder:
    """The VAE encoder, loaded when the first picture comes, with buffers for the size of the last one."""

    def __init__(self, load: Callable[[], Executor], device: Device, manifest: Manifest) -> None:
        """Keep what `encode` needs.

        Args:
            load: Gives the encoder's executor, on ``device``.
            device: Owns the buffers.
            manifest: The bundle's manifest.
        """
        self._load, self._device, self._manifest = load, device, manifest
        self._executor: Executor | None = None
        self._bound: tuple[tuple[int, int], Arena, Callable[[], None]] | None = None

    def encode(self, canvas: Canvas) -> EncodedImage:
        """Encode a picture, and without what is drawn if the U-Net reads that; waits.

        Raises:
            NumericsError: The encoder gave NaN or infinity.
            DeviceMemoryError: The buffers do not fit.
            BackendError: The encoder cannot be loaded, or does not admit this size.
        """
        from sdrt.runtime.pictures.canvas import image_to_float, latent_mask, masked_image

        reads_mask = self._manifest.reads_mask
        latents = self._posterior(image_to_float(canvas.image))
        if canvas.mask is None:
            return EncodedImage(latents)
        shown = (canvas.mask >= 0.5).astype(np.float32) if reads_mask else canvas.mask  # as it was trained
        mask = latent_mask(shown, self._manifest.latents.factor)
        if not reads_mask:
            return EncodedImage(latents, mask)
        return EncodedImage(latents, mask, self._posterior(masked_image(canvas.image, canvas.mask)))

    def _posterior(self, image: FloatArray) -> Posterior:
        """What the latents of a picture may be.

        Args:
            image: float32 [1, 3, H, W] in [-1, 1], of a size that the bundle admits.
        """
        if self._executor is None:
            self._executor = self._load()
        arena, evaluate = self._bind(self._executor, (image.shape[2], image.shape[3]))
        spec = self._executor.spec
        (source,), (mean, std) = spec.inputs, spec.outputs
        # The smallest batch that the graph admits; every row of it holds the same picture.
        batch = np.repeat(image, self._manifest.limits.min_batch, axis=0)
        self._device.upload(batch, arena[source.name])
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

    def _bind(self, executor: Executor, size: tuple[int, int]) -> tuple[Arena, Callable[[], None]]:
        if self._bound is None or self._bound[0] != size:
            self._bound = None  # its memory is free for the next
            factor = self._manifest.latents.factor
            axes = {
                "batch": self._manifest.limits.min_batch,
                "height": size[0],
                "width": size[1],
                "latent_height": size[0] // factor,
                "latent_width": size[1] // factor,
            }
            spec = executor.spec
            entries = (*spec.inputs, *spec.outputs)
            arena = Arena(
                self._device, {entry.name: (entry.concrete(axes), entry.dtype) for entry in entries}
            )
            evaluate = executor.bind(
                {entry.name: arena[entry.name] for entry in spec.inputs},
                {entry.name: arena[entry.name] for entry in spec.outputs},
            )
            self._bound = (size, arena, evaluate)
        return self._bound[1], self._bound[2]


class VaeDecoder:
    """The VAE decoder and its buffers for the pictures of one loop."""

    def __init__(self, executor: Executor, device: Device, loop: DenoiseLoop) -> None:
        """Allocate the decoder's buffers and bind it to them.

        Args:
            executor: The decoder's, on ``device``.
            device: Owns the buffers.
            loop: The loop that has the latents, and a place for pixels and fault word.

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
