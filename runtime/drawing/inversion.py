"""The noise that a given picture would be drawn from, by DDIM inversion (Song et al. 2021, section 4.3)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.sampler_row import Column
from sdrt.runtime.drawing.callbacks import Hook
from sdrt.runtime.drawing.initial_latents import start_arguments
from sdrt.runtime.drawing.loop import StepKind
from sdrt.runtime.drawing.parts import Parts
from sdrt.runtime.drawing.vae import EncodedImage
from sdrt.runtime.request.output import Callbacks
from sdrt.runtime.request.request import Request
from sdrt.runtime.samplers.noise import noise_source, slerp
from sdrt.runtime.samplers.table import SamplerTable
from sdrt.runtime.samplers.timestep import inversion_table


def with_inverted_noise(request: Request, image: EncodedImage, parts: Parts, hook: Hook) -> Request:
    """The request with the noise that its picture comes from, mixed with noise of the seeds.

    Args:
        request: One with a variation.
        image: Its picture.
        parts: What draws.
        hook: Asked between the steps whether the call was cancelled; the caller's functions are not called.

    Raises:
        NumericsError: A component gave NaN or infinity.
    """
    assert request.picture is not None
    assert request.picture.variation is not None
    table = inversion_table(request.sampling.schedule, request.sampling.recipe["num_inference_steps"])
    noise: list[NDArray[np.float32]] = []
    wanted = list(zip(request.lora_sets, request.conditions, strict=True))
    inverted: dict[Hashable, NDArray[np.float32]] = {}  # LoRAs and prompt → noise
    for loras in dict.fromkeys(loras for loras, _ in wanted):
        for number, one in enumerate(wanted):
            if one[0] == loras and one not in inverted:
                inverted[one] = _inverted_noise(request, number, table, image, parts, hook)
    for number, one in enumerate(wanted):
        fresh = noise_source(request.rng, [request.seeds[number]]).draw(0, image.latents.mean.shape[1:])
        noise.append(slerp(inverted[one], fresh, request.picture.variation))
    # The inversion ends in a variance-preserving x; a sampler's may be scaled otherwise.
    scale = 1.0 / float(request.sampling.table.rows[0, Column.INPUT_SCALE])
    return replace(request, latents=np.concatenate(noise), latents_scale=scale)


def _inverted_noise(
    request: Request, number: int, table: SamplerTable, image: EncodedImage, parts: Parts, hook: Hook
) -> NDArray[np.float32]:
    """The noise that the picture would be drawn from, float32 [1, C, h, w] of about unit variance.

    The loop of an unguided shape walks the table of DDIM inversion from the mean of the posterior: what a
    variation has of the picture does not depend on the seed.

    Args:
        request: The call.
        number: The image whose prompt the inversion is told.
        table: The rows of `sdrt.runtime.samplers.timestep.inversion_table`.
        image: The picture.
        parts: What draws.
        hook: See `with_inverted_noise`.
    """
    parts.adapters.use(request.lora_sets[number])
    condition, images = request.conditions[number], request.manifest.limits.min_batch
    chunks = parts.encoder.chunks(condition)
    weights = np.ones(len(request.sampling.table), np.float32)
    unguided = replace(
        request,
        sampling=replace(request.sampling, weights=weights),
        latents=np.repeat(image.latents.mean, images, axis=0),
        latents_scale=1.0,
        picture=None,
        output_type="latents",
        callbacks=Callbacks(),
    )
    loop = parts.shapes.ready(unguided, images, chunks).loop
    kind = StepKind(guided=False)
    loop.prepare({kind})
    rows = [condition] * images
    parts.encoder.write(rows, loop, chunks)
    noise = noise_source(request.rng, [request.seeds[number]] * images)
    start = start_arguments(unguided, range(images), images, noise, None)
    loop.start(table, np.ones(len(table), np.float32), **start)
    for _ in range(len(table)):
        hook.check_cancelled()
        loop.step(kind)
    result = loop.result(pixels=False)
    parts.encoder.raise_faults(result.faults, table, rows)
    return result.latents[:1]
