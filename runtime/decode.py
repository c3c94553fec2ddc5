"""Latents to pixels: the VAE decoder, bound to the loop of one shape."""

from __future__ import annotations

from sdrt.runtime.arena import Arena
from sdrt.runtime.denoise import DenoiseLoop
from sdrt.runtime.devices import Device
from sdrt.runtime.executors import Executor
from sdrt.runtime.replay import replayable


class ImageDecoder:
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
