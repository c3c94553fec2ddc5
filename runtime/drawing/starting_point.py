"""What a run starts from: noise, a picture at some level of noise, or the noise that a picture came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.sampler_row import Column
from sdrt.runtime.bundle.families.components import INPAINTING, TIMESTEP_COND
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.devices.device import Device
from sdrt.runtime.errors import UsageError
from sdrt.runtime.request.picture import PictureTask
from sdrt.runtime.request.request import Request, is_device_array, latent_shape
from sdrt.runtime.samplers.guidance import guidance_embedding
from sdrt.runtime.samplers.noise import NoiseSource

FloatArray = NDArray[np.float32]


# What is drawn from an image's seed before the first step.
LATENTS: Final = "latents"  # of the given picture, from the VAE's posterior
NOISE: Final = "noise"  # that sampling starts from
MASKED_LATENTS: Final = "masked_latents"  # of the given picture without what is to be drawn


@dataclass(frozen=True, slots=True)
class Posterior:
    """What the VAE says that a picture's latents may be: independent normal numbers.

    Attributes:
        mean: float32 [1, C, h, w] in the sampler's scale.
        std: Standard deviation, likewise.
    """

    mean: FloatArray
    std: FloatArray

    def sample(self, noise: FloatArray) -> FloatArray:
        """Latents of each image, float32 of noise's shape [N, C, h, w]; ``noise`` has unit variance."""
        return self.mean + self.std * noise


@dataclass(frozen=True, slots=True)
class KnownPicture:
    """A picture as the loop knows it.

    Attributes:
        latents: Of the whole picture.
        mask: float32 [1, 1, h, w], 1 is drawn; None where all is.
        masked_latents: Of the picture without what is drawn, for U-Nets that read it.
    """

    latents: Posterior
    mask: FloatArray | None = None
    masked_latents: Posterior | None = None


def draws_at_start(picture: PictureTask | None, manifest: Manifest) -> tuple[str, ...]:
    """What diffusers' pipelines draw from an image's generator before the first step, in their order.

    Image to image and inpainting draw the picture's latents from the VAE's posterior, where they need them,
    and inpainting those of the masked picture, whether the U-Net reads them or not. A variation by inversion,
    which diffusers' pipelines do not have, takes the posterior's mean.
    """
    if picture is None or picture.variation is not None:
        return (NOISE,)
    if picture.canvas.mask is None:
        return (LATENTS, NOISE)
    if manifest.reads_mask and picture.starts_from_noise:
        return (NOISE, MASKED_LATENTS)
    return (LATENTS, NOISE, MASKED_LATENTS)


def start_arguments(
    request: Request,
    batch: Sequence[int],
    rows: int,
    source: NoiseSource,
    shape: tuple[int, ...],
    known: KnownPicture | None,
    manifest: Manifest,
) -> dict[str, Any]:
    """What `DenoiseLoop.start` is to be given for a batch, beside table and guidance.

    Args:
        request: The call.
        batch: Numbers of its images that are drawn together.
        rows: Of the U-Net's batch.
        source: Noise, a stream for each image of the batch.
        shape: [C, h, w] of one image's latents.
        known: The request's picture.
        manifest: Of the bundle.
    """
    order = draws_at_start(request.picture, manifest)

    def sample(posterior: Posterior | None, name: str) -> FloatArray | None:
        if posterior is None or name not in order:
            return None
        return posterior.sample(source.draw(order.index(name), shape))

    kept = None if known is None else sample(known.latents, LATENTS)
    noise = _noise(request, batch, source, order.index(NOISE), shape, on_host=known is not None)
    masked = None if known is None else sample(known.masked_latents, MASKED_LATENTS)
    arguments: dict[str, Any] = {
        "seeds": source.seeds,
        "drawn": len(order),
        "latents": noise,
        "scale": request.latents_scale,
        "guidance_rescale": request.sampling.guidance_rescale,
        "inputs": _inputs(request, rows, known, masked, manifest),
    }
    if known is None or kept is None:
        return arguments
    if request.picture is None or not request.picture.starts_from_noise:
        first = request.sampling.table.rows[0]
        arguments["latents"] = (
            np.float32(first[Column.SIGNAL]) * kept + np.float32(first[Column.NOISE]) * noise
        )
        arguments["scale"] = 1.0
    if known.mask is not None and masked is None:
        mask = np.broadcast_to(known.mask, (len(batch), 1, *shape[1:]))
        arguments |= {"known": kept, "known_noise": noise, "mask": mask}
    return arguments


def with_device_latents(device: Device, manifest: Manifest, request: Request) -> Request:
    """The request with a foreign device array as buffers of our device, one for each image.

    Raises:
        UsageError: It is of another shape or dtype, or on another device.
    """
    if not is_device_array(request.latents):
        return request
    count, shape = len(request.conditions), latent_shape(manifest, request.height, request.width)
    array = device.from_cuda_array(request.latents)
    if tuple(array.shape) != (count, *shape) or array.dtype != np.float32:
        raise UsageError(f"latents are {array.dtype}{list(array.shape)}: float32{[count, *shape]} is wanted")
    each = array.nbytes // count
    rows = [array.part(each * image, (1, *shape), np.float32) for image in range(count)]
    return replace(request, latents=rows)


def blends(request: Request, manifest: Manifest) -> bool:
    """Whether the step kernel puts the kept latents back after each step.

    A U-Net that reads mask and picture does without it, as in diffusers.
    """
    masked = request.picture is not None and request.picture.canvas.mask is not None
    return masked and not manifest.reads_mask


def _noise(
    request: Request,
    batch: Sequence[int],
    source: NoiseSource,
    number: int,
    shape: tuple[int, ...],
    *,
    on_host: bool,
) -> Any:
    """Unit-variance noise: given, draw ``number`` made on the host, or None for draw 0 on the device."""
    if isinstance(request.latents, np.ndarray):
        return request.latents[list(batch)]
    if request.latents is not None:
        return [request.latents[image] for image in batch]
    return None if request.rng == "philox" and not on_host else source.draw(number, shape)


def _inputs(
    request: Request, rows: int, known: KnownPicture | None, masked: FloatArray | None, manifest: Manifest
) -> dict[str, NDArray[np.float32]]:
    """The U-Net's inputs that are numbers of the request or of the picture (``masked``: its latents)."""
    inputs = {}
    for name, options in manifest.record.pixels.items():
        one = [entry for option in options for entry in request.sizes[option.name]]
        inputs[name] = np.array([one] * rows, np.float32)
    told = manifest.components["unet"].spec.input(TIMESTEP_COND)
    if told is not None and request.sampling.embedded_guidance is not None:
        width = told.shape[1]
        assert isinstance(width, int)  # in every manifest that was read
        one_row = guidance_embedding(request.sampling.embedded_guidance - 1.0, width)  # as in diffusers
        inputs[TIMESTEP_COND] = np.broadcast_to(one_row, (rows, width))
    if known is not None and known.mask is not None and masked is not None:
        mask = np.broadcast_to(known.mask, (len(masked), *known.mask.shape[1:]))
        both = np.concatenate([mask, masked], axis=1)
        inputs[INPAINTING] = np.concatenate([both] * (rows // len(both)))  # of each half
    return inputs


def slerp(first: FloatArray, second: FloatArray, share: float) -> FloatArray:
    """Spherical interpolation (Shoemake 1985) of two arrays taken as vectors, float32 of their shape.

    Noise stays noise: between two independent draws of unit variance every result has unit variance, which
    their weighted mean has not. Where the two point the same way, it is the weighted mean.
    """
    a, b = first.astype(np.float64).ravel(), second.astype(np.float64).ravel()
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = float(np.clip(a @ b / norms, -1.0, 1.0)) if norms > 0 else 1.0
    angle = np.arccos(cosine)
    if np.sin(angle) < 1e-6:
        mixed = (1 - share) * a + share * b
    else:
        mixed = (np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle)
    return mixed.astype(np.float32).reshape(first.shape)


def known_mask(mask: NDArray[np.float32], factor: int, *, binary: bool) -> FloatArray:
    """A mask [H, W] at the latents' size, float32 [1, 1, h, w]; ``binary`` for U-Nets that read it."""
    from sdrt.runtime.pictures.canvas import latent_mask

    return latent_mask((mask >= 0.5).astype(np.float32) if binary else mask, factor)
