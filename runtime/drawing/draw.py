"""A request becomes pictures: conditioning, start, the sampler's rows, decoding, batch by batch.

`_draw_batch` is the whole way on one screen; each of its lines is explained where it leads to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from sdrt.runtime.bundle.families.components import LOW_RES
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.drawing.callbacks import Hook
from sdrt.runtime.drawing.condition_encoder import ConditionEncoder
from sdrt.runtime.drawing.faults import Faults
from sdrt.runtime.drawing.finished_images import ImageCollector, image_collector
from sdrt.runtime.drawing.initial_latents import start_arguments
from sdrt.runtime.drawing.loop import DenoiseLoop
from sdrt.runtime.drawing.parts import Parts
from sdrt.runtime.drawing.shapes import step_kinds
from sdrt.runtime.drawing.vae import EncodedImage, noised_pixels
from sdrt.runtime.errors import DeviceMemoryError
from sdrt.runtime.request.loras import NO_LORAS, LoraSet
from sdrt.runtime.request.output import PipelineOutput
from sdrt.runtime.request.picture import PictureTask, picture_noise_shape
from sdrt.runtime.request.request import Request
from sdrt.runtime.samplers.noise import NoiseSource, noise_source


class Batch(NamedTuple):
    """Images of a request that are drawn together.

    Attributes:
        images: Their numbers; where there are fewer than the graphs admit, the last one repeats itself.
        chunks: How many chunks their prompts have.
        loras: What the model's weights are changed by for them.
    """

    images: list[int]
    chunks: int
    loras: LoraSet = NO_LORAS


def draw(request: Request, recipes: Sequence[dict[str, Any]], parts: Parts, hook: Hook) -> PipelineOutput:
    """Draw all images of a request.

    Args:
        request: What is asked, of the parts' bundle.
        recipes: The images' recipes; where a callback interrupts, it is noted in them.
        parts: What draws.
        hook: What is asked and told between steps and batches.

    Raises:
        NumericsError: A component gave NaN or infinity; the message names it.
    """
    batches = split_into_batches(request, parts)
    for images, chunks in sorted({(len(batch.images), batch.chunks) for batch in batches}):
        parts.shapes.ready(request, images, chunks)  # what is refused is so before any drawing
    seconds: dict[str, float] = {}
    request, image = _with_picture(request, parts, hook, seconds)
    pictures = image_collector(request, parts.device)
    steps = 0
    for batch in batches:
        done, stages = _draw_batch(request, batch, image, parts, hook, pictures)
        steps += done
        for stage, value in stages.items():
            seconds[stage] = seconds.get(stage, 0.0) + value
        numbers = tuple(dict.fromkeys(batch.images))
        if done < len(request.sampling.table):
            for number in numbers:
                before = 0 if request.continues is None else request.continues.rows
                recipes[number].setdefault("interrupted_after_step", before + done)
        hook.after_batch(numbers, pictures, recipes)
    result, latents = pictures.finish()
    seconds["step"] = seconds["denoise"] / max(steps, 1)
    return PipelineOutput(result, latents, tuple(recipes), seconds)


def _draw_batch(
    request: Request,
    batch: Batch,
    image: EncodedImage | None,
    parts: Parts,
    hook: Hook,
    pictures: ImageCollector,
) -> tuple[int, dict[str, float]]:
    """Draw the images of a batch, and add them to ``pictures``.

    All of it is queued on the device without a wait, but for a callback that asks for tensors; one download
    at the end brings latents, pixels and fault words.

    Returns:
        How many rows of the table were run, and the seconds of each stage by the device's clock.
    """
    resources = parts.shapes.ready(request, len(batch.images), batch.chunks)
    loop, table = resources.loop, request.sampling.table
    rows = row_conditions(request, batch.images)

    def raise_faults(faults: Faults) -> None:
        parts.encoder.raise_faults(faults, table, rows)

    # The model becomes the one that these images want,
    changing = parts.adapters.use(batch.loras)
    timer = parts.device.timer()
    # prompts become conditioning,
    parts.encoder.write(rows, loop, batch.chunks)
    timer.mark("text_encoder")
    # noise, or a picture at some level of noise, becomes x at the first row,
    seeds, before = (
        [request.seeds[number] for number in batch.images],
        picture_noise_shape(request.manifest, request.picture),
    )
    noise = noise_source(request.rng, seeds, before)
    start = start_arguments(request, batch.images, len(rows), noise, image)
    loop.start(table, request.sampling.weights, **start)
    # row by row x becomes the latents,
    done = _run_rows(request, loop, noise, hook, raise_faults)
    timer.mark("denoise")
    # the latents become pixels,
    if request.decodes:
        resources.decode()
        timer.mark("vae_decoder")
    # and these, with what was kept of a given picture, pictures.
    pictures.add(batch.images, loop, raise_faults)
    return done, {**({"lora": changing} if changing else {}), **timer.seconds()}


def _run_rows(
    request: Request,
    loop: DenoiseLoop,
    noise: NoiseSource,
    hook: Hook,
    raise_faults: Callable[[Faults], None],
) -> int:
    """Queue a step for each row of the sampler's table, until the caller's function says that it is enough.

    Returns:
        How many rows were queued.
    """
    table = request.sampling.table
    uploads_noise = table.uses_noise and not request.draws_noise_on_device
    for row, kind in enumerate(step_kinds(request)):
        hook.check_cancelled()
        if hook.interrupted:
            return row
        draw_number = int(table.draws[row])
        if uploads_noise and draw_number >= 0:
            loop.set_noise(noise.draw(request.first_draw + draw_number, tuple(loop.noise.shape[1:])))
        loop.step(kind)
        hook.after_step(loop, table, row, raise_faults)
    return len(table)


def split_into_batches(request: Request, parts: Parts) -> list[Batch]:
    """Cut N images into batches that the graphs admit; a last one that is too small repeats itself.

    A batch has one set of LoRAs. It has one number of chunks, too: a picture must not depend on how long its
    neighbours' prompts are.
    """
    limits, sets = request.manifest.limits, request.lora_sets
    batches = []
    for loras in dict.fromkeys(sets):
        parts.adapters.lend_words(loras)  # they have a number of tokens of their own
        own = [image for image, wanted in enumerate(sets) if wanted == loras]
        chunks = {image: _chunks(request, image, parts.encoder) for image in own}
        for size in sorted(set(chunks.values())):
            images = [image for image in own if chunks[image] == size]
            for start in range(0, len(images), limits.max_batch):
                batch = images[start : start + limits.max_batch]
                batch += [batch[-1]] * (limits.min_batch - len(batch))
                batches.append(Batch(batch, size, loras))
    return batches


def _chunks(request: Request, image: int, encoder: ConditionEncoder) -> int:
    chunks = encoder.chunks(request.conditions[image])
    return max(chunks, encoder.chunks(request.negatives[image])) if request.guided else chunks


def row_conditions(request: Request, images: Sequence[int]) -> list[Hashable]:
    """What each row of the U-Net's batch is drawn from; the conditional part comes last."""
    rows = [request.conditions[image] for image in images]
    unwanted = [request.negatives[image] for image in images]
    return [*(unwanted * (request.rows - 1)), *rows]


def _with_picture(
    request: Request, parts: Parts, hook: Hook, seconds: dict[str, float]
) -> tuple[Request, EncodedImage | None]:
    """The given picture through the VAE encoder; one that is inverted becomes the request's noise instead."""
    if request.picture is None:
        return request, None
    started = time.perf_counter()
    image = _encoded(request.manifest, request.picture, parts)
    encoded = time.perf_counter()
    seconds["vae_encoder"] = encoded - started
    if request.picture.variation is None:
        return request, image
    from sdrt.runtime.drawing.inversion import with_inverted_noise

    request = with_inverted_noise(request, image, parts, hook)
    seconds["invert"] = time.perf_counter() - encoded
    return request, None


def _encoded(manifest: Manifest, picture: PictureTask, parts: Parts) -> EncodedImage:
    """The picture through its encoder; the shapes that were drawn make room where memory is too small."""
    if parts.labels is not None:
        return EncodedImage(parts.labels.encode(picture))
    if picture.input == LOW_RES:
        return EncodedImage(noised_pixels(manifest, picture))
    try:
        return parts.vae_encoder.encode(picture.canvas)
    except DeviceMemoryError:
        parts.shapes.clear()
    return parts.vae_encoder.encode(picture.canvas)
