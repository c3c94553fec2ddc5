"""What a run starts from: noise, a picture at some level of noise, or the noise that a picture came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.sampler_row import Column
from sdrt.runtime.bundle.families.components import DEPTH, INPAINTING, NOISE_LEVEL, TIMESTEP_COND
from sdrt.runtime.bundle.families.told import told_row
from sdrt.runtime.devices.device import Device
from sdrt.runtime.drawing.vae import EncodedImage, Posterior
from sdrt.runtime.errors import UsageError
from sdrt.runtime.request.picture import LATENTS, MASKED_LATENTS, NOISE, PICTURE_NOISE, picture_noise_shape
from sdrt.runtime.request.request import Request, is_device_array
from sdrt.runtime.request.sizes import latent_shape
from sdrt.runtime.samplers.guidance import guidance_embedding
from sdrt.runtime.samplers.noise import NoiseSource

FloatArray = NDArray[np.float32]


def start_arguments(
    request: Request, images: Sequence[int], rows: int, source: NoiseSource, image: EncodedImage | None
) -> dict[str, Any]:
    """What `DenoiseLoop.start` is to be given for a batch, beside table and guidance.

    Args:
        request: The call.
        images: Numbers of its images that are drawn together.
        rows: Size of the U-Net's batch.
        source: Noise, a stream for each image of the batch.
        image: The request's picture, where the run starts from it.
    """
    order = request.draws_at_start
    shape = latent_shape(request.manifest, request.height, request.width)

    def sample(posterior: Posterior | None, name: str) -> FloatArray | None:
        if posterior is None or name not in order:
            return None
        return posterior.sample(source.draw(order.index(name), shape))

    kept = None if image is None else sample(image.latents, LATENTS)
    number = order.index(NOISE) if NOISE in order else 0  # where latents are given no noise is drawn
    noise = _noise(request, images, source, number, shape, on_host=image is not None)
    masked = None if image is None else sample(image.masked_latents, MASKED_LATENTS)
    arguments: dict[str, Any] = {
        "seeds": source.seeds,
        "drawn": request.first_draw,
        "latents": noise,
        "scale": request.latents_scale,
        "guidance_rescale": request.sampling.guidance_rescale,
        "image_guidance": request.sampling.image_guidance,
        "inputs": {
            **_inputs(request, rows, image, masked),
            **({} if image is None else _read_picture(request, len(images), source, image.latents)),
        },
    }
    if image is None or kept is None:
        return arguments
    if request.picture is None or not request.picture.starts_from_noise:
        first = request.sampling.table.rows[0]
        arguments["latents"] = (
            np.float32(first[Column.SIGNAL]) * kept + np.float32(first[Column.NOISE]) * noise
        )
        arguments["scale"] = 1.0
    if image.mask is not None and masked is None:
        mask = np.broadcast_to(image.mask, (len(images), 1, *shape[1:]))
        arguments |= {"known": kept, "known_noise": noise, "mask": mask}
    return arguments


def with_device_latents(device: Device, request: Request) -> Request:
    """The request with a foreign device array as buffers of our device, one for each image.

    Raises:
        UsageError: It is of another shape or dtype, or on another device.
    """
    if not is_device_array(request.latents):
        return request
    count = len(request.conditions)
    shape = latent_shape(request.manifest, request.height, request.width)
    array = device.from_cuda_array(request.latents)
    if tuple(array.shape) != (count, *shape) or array.dtype != np.float32:
        raise UsageError(f"latents are {array.dtype}{list(array.shape)}: float32{[count, *shape]} is wanted")
    each = array.nbytes // count
    rows = [array.part(each * image, (1, *shape), np.float32) for image in range(count)]
    return replace(request, latents=rows)


def _noise(
    request: Request,
    images: Sequence[int],
    source: NoiseSource,
    number: int,
    shape: tuple[int, ...],
    *,
    on_host: bool,
) -> Any:
    """Unit-variance noise: given, draw ``number`` made on the host, or None for draw 0 on the device."""
    if isinstance(request.latents, np.ndarray):
        return request.latents[list(images)]
    if request.latents is not None:
        return [request.latents[image] for image in images]
    return None if request.rng == "philox" and not on_host else source.draw(number, shape)


def _inputs(
    request: Request, rows: int, image: EncodedImage | None, masked: FloatArray | None
) -> dict[str, NDArray[np.float32]]:
    """The U-Net's inputs that are numbers of the request or of the picture (``masked``: its latents)."""
    inputs = {}
    unguided = rows - rows // request.rows  # all but the conditional ones, which come last
    for name, options in request.manifest.record.told.items():
        one, other = (told_row(options, request.told, unconditional=half) for half in (False, True))
        inputs[name] = np.array([other] * unguided + [one] * (rows - unguided), np.float32)
    embedding = request.manifest.components["unet"].spec.input(TIMESTEP_COND)
    if embedding is not None and request.sampling.embedded_guidance is not None:
        width = embedding.shape[1]
        assert isinstance(width, int)  # in every manifest that was read
        one_row = guidance_embedding(request.sampling.embedded_guidance - 1.0, width)  # as in diffusers
        inputs[TIMESTEP_COND] = np.broadcast_to(one_row, (rows, width))
    if request.depth is not None:
        inputs[DEPTH] = np.broadcast_to(request.depth.levels, (rows, 1, *request.depth.levels.shape))
    if image is not None and image.mask is not None and masked is not None:
        mask = np.broadcast_to(image.mask, (len(masked), *image.mask.shape[1:]))
        both = np.concatenate([mask, masked], axis=1)
        inputs[INPAINTING] = np.concatenate([both] * (rows // len(both)))  # of each half
    return inputs


def _read_picture(
    request: Request, images: int, source: NoiseSource, given: Posterior
) -> dict[str, NDArray[np.float32]]:
    """The U-Net's input that is made of the given picture, in families that have one."""
    family, picture = request.manifest.record, request.picture
    if picture is None or not picture.input:
        return {}
    wanted = np.repeat(given.mean, images, axis=0)
    if (shape := picture_noise_shape(request.manifest, picture)) is not None:
        noise = source.draw(request.draws_at_start.index(PICTURE_NOISE), shape)
        more = wanted.shape[1] - noise.shape[1]  # what is not noised
        wanted = given.sample(np.pad(noise, [(0, 0), (0, more), *[(0, 0)] * (noise.ndim - 2)]))
    first = np.zeros_like(wanted) if family.picture_blank and request.guided else wanted
    inputs = {
        picture.input: np.concatenate([*[first] * (request.rows > 1), *[wanted] * max(request.rows - 1, 1)])
    }
    if request.manifest.components["unet"].spec.input(NOISE_LEVEL) is not None:
        inputs[NOISE_LEVEL] = np.full(images * request.rows, picture.noise_level, np.int64)
    return inputs
