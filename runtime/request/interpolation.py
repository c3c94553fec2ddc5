"""Frames between two prompts or two seeds, as one request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.checks import whole
from sdrt.runtime.drawing.starting_point import NOISE, draws_at_start, slerp
from sdrt.runtime.errors import UsageError
from sdrt.runtime.request.recipes import OF_FRAMES
from sdrt.runtime.request.request import Request, build_request, latent_shape
from sdrt.runtime.request.texts import MAX_IMAGES
from sdrt.runtime.samplers.noise import noise_source
from sdrt.runtime.text.chunks import Blend, Prompt


def request_of_frames(manifest: Manifest, prompt: Any, options: Mapping[str, Any]) -> Request:
    """The request behind the recipe of a frame, or of all of them where it names none.

    Raises:
        UsageError: As `interpolated_request`.
    """
    rest = {name: value for name, value in options.items() if name not in OF_FRAMES}
    to_prompt, to_seed, frames, frame = (options.get(name) for name in OF_FRAMES)
    return interpolated_request(manifest, prompt, to_prompt, frames, to_seed, {**rest, "frame": frame})


def interpolated_request(
    manifest: Manifest,
    prompt: str,
    to_prompt: str | None,
    frames: Any,
    to_seed: int | None,
    options: Mapping[str, Any],
) -> Request:
    """The request whose images are the frames, or the one that is the option ``frame``.

    See `Pipeline.interpolate`.

    Raises:
        UsageError: An argument is out of range, or nothing differs between the ends.
    """
    count = whole("frames", frames)
    if not 2 <= count <= MAX_IMAGES:
        raise UsageError(f"frames is {count}: a whole number from 2 to {MAX_IMAGES}")
    if to_prompt is None and to_seed is None:
        raise UsageError("nothing differs between the first frame and the last: give another prompt or seed")
    for name, end in (("prompt", prompt), ("to_prompt", prompt if to_prompt is None else to_prompt)):
        if not isinstance(end, str):
            raise UsageError(f"{name} is {type(end).__name__}: one text is wanted")
    if not manifest.record.reads_text:
        raise UsageError("this bundle draws variations of an image: there are no prompts to go between")
    if options.get("latents") is not None:
        raise UsageError("latents are given: an interpolation makes its own from the seeds")
    if options.get("num_images_per_prompt") not in (None, 1):
        raise UsageError("num_images_per_prompt is given: frames says how many pictures there are")
    options = dict(options)
    frame = options.pop("frame", None)
    if frame is not None and not 0 <= whole("frame", frame) < count:
        raise UsageError(f"frame is {frame}: of {count} frames the first is 0 and the last {count - 1}")
    first = build_request(manifest, prompt, options)
    last = build_request(
        manifest,
        prompt if to_prompt is None else to_prompt,
        {**options, "seed": first.seeds[0] if to_seed is None else to_seed},
    )
    if first.picture is not None and first.picture.variation is not None:
        raise UsageError("variation is given: an interpolation goes from prompt to prompt or seed to seed")
    shares = [float(share) for share in np.linspace(0.0, 1.0, count)]
    shape = latent_shape(manifest, first.height, first.width)
    number = draws_at_start(first.picture, manifest).index(NOISE)
    noise, to_noise = (
        noise_source(first.rng, request.seeds).draw(number, shape) for request in (first, last)
    )
    text = {
        **first.texts[0],
        "to_prompt": last.texts[0]["prompt"],
        **({} if to_seed is None else {"to_seed": last.seeds[0]}),
        "frames": count,
    }
    if first.conditions == last.conditions and first.seeds == last.seeds:
        raise UsageError("nothing differs between the first frame and the last: give another prompt or seed")
    (start,), (finish,) = first.conditions, last.conditions
    assert isinstance(start, Prompt)
    assert isinstance(finish, Prompt)
    every = replace(
        first,
        conditions=[start if start == finish else Blend(start, finish, share) for share in shares],
        negatives=first.negatives * count,
        texts=[{**text, "frame": number} for number in range(count)],
        seeds=first.seeds * count,
        latents=(
            None if to_seed is None else np.concatenate([slerp(noise, to_noise, share) for share in shares])
        ),
    )
    return every if frame is None else _only(every, whole("frame", frame))


def _only(request: Request, frame: int) -> Request:
    """The request for one of its images."""
    one = slice(frame, frame + 1)
    return replace(
        request,
        conditions=request.conditions[one],
        negatives=request.negatives[one],
        texts=request.texts[one],
        seeds=request.seeds[one],
        latents=None if request.latents is None else request.latents[one],
    )
