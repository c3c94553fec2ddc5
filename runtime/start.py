"""What a run starts from: noise, a picture at some level of noise, or the noise that a picture came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.sampler_row import Column
from sdrt.runtime.devices import Device
from sdrt.runtime.errors import UsageError
from sdrt.runtime.guidance_embedding import guidance_embedding
from sdrt.runtime.manifest import Manifest
from sdrt.runtime.noise import NoiseSource
from sdrt.runtime.request import Request, is_device_array, latent_shape

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class KnownPicture:
    """A picture as the loop knows it.

    Attributes:
        latents: float32 [1, C, h, w], of the whole picture.
        mask: float32 [1, 1, h, w], 1 is drawn; None where all is.
        masked_latents: float32 [1, C, h, w], of the picture without what is drawn, for U-Nets that read it.
    """

    latents: FloatArray
    mask: FloatArray | None = None
    masked_latents: FloatArray | None = None


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
    arguments: dict[str, Any] = {
        "seeds": source.seeds,
        "latents": _noise(request, batch, source, shape, on_host=known is not None),
        "scale": request.latents_scale,
        "guidance_rescale": request.sampling.guidance_rescale,
        "inputs": _inputs(request, rows, known, manifest),
    }
    if known is None:
        return arguments
    noise = arguments["latents"]
    kept = np.broadcast_to(known.latents, noise.shape)
    if request.picture is None or not request.picture.starts_from_noise:
        first = request.sampling.table.rows[0]
        arguments["latents"] = (
            np.float32(first[Column.SIGNAL]) * kept + np.float32(first[Column.NOISE]) * noise
        )
        arguments["scale"] = 1.0
    if known.mask is not None and known.masked_latents is None:
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
    request: Request, batch: Sequence[int], source: NoiseSource, shape: tuple[int, ...], *, on_host: bool
) -> Any:
    """Unit-variance noise: given, made on the host, or None for noise of the device."""
    if isinstance(request.latents, np.ndarray):
        return request.latents[list(batch)]
    if request.latents is not None:
        return [request.latents[image] for image in batch]
    return None if request.rng == "philox" and not on_host else source.initial(shape)


def _inputs(
    request: Request, rows: int, known: KnownPicture | None, manifest: Manifest
) -> dict[str, NDArray[np.float32]]:
    """The U-Net's inputs that are numbers of the request or of the picture."""
    inputs = {}
    if request.sizes:
        one = [entry for pair in request.sizes.values() for entry in pair]
        inputs["time_ids"] = np.array([one] * rows, np.float32)
    told = manifest.components["unet"].spec.input("timestep_cond")
    if told is not None and request.sampling.embedded_guidance is not None:
        width = told.shape[1]
        assert isinstance(width, int)  # in every manifest that was read
        one_row = guidance_embedding(request.sampling.embedded_guidance - 1.0, width)  # as in diffusers
        inputs["timestep_cond"] = np.broadcast_to(one_row, (rows, width))
    if known is not None and known.masked_latents is not None and known.mask is not None:
        both = np.concatenate([known.mask, known.masked_latents], axis=1)
        inputs["inpainting"] = np.broadcast_to(both, (rows, *both.shape[1:]))
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
    from sdrt.runtime.canvas import latent_mask

    return latent_mask((mask >= 0.5).astype(np.float32) if binary else mask, factor)
