"""Frames between two prompts or two seeds, as one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.checks import whole
from sdrt.runtime.errors import UsageError
from sdrt.runtime.request.loras import LoraUse, blended
from sdrt.runtime.request.picture import NOISE, draws_at_start, picture_noise_shape
from sdrt.runtime.request.request import Request
from sdrt.runtime.request.sizes import latent_shape
from sdrt.runtime.request.texts import MAX_IMAGES, Conditions
from sdrt.runtime.samplers.noise import noise_source, slerp
from sdrt.runtime.text.chunks import Blend, Prompt


def check_ends(
    manifest: Manifest, prompt: Any, to_prompt: Any, frames: Any, to_seed: Any, options: Mapping[str, Any]
) -> int:
    """How many frames there are; see `sdrt.runtime.request.build.build_interpolation`.

    Raises:
        UsageError: As many frames cannot be, nothing differs between the ends, or an option does not go with
            frames.
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
    if options.get("refine_from") is not None:
        raise UsageError(
            "refine_from is given: frames are drawn by one bundle, draw them without the refiner"
        )
    if options.get("latents") is not None:
        raise UsageError("latents are given: an interpolation makes its own from the seeds")
    if options.get("num_images_per_prompt") not in (None, 1):
        raise UsageError("num_images_per_prompt is given: frames says how many pictures there are")
    return count


def frames_between(
    first: Request, last: Conditions, last_loras: Sequence[LoraUse], to_seed: int | None, count: int
) -> Request:
    """The request for all frames.

    Args:
        first: The first frame's.
        last: What the last frame is drawn from.
        last_loras: The LoRAs that it is drawn with; between the two their weights are mixed.
        to_seed: The seed of the last frame's noise; None for the first frame's.
        count: How many frames there are.

    Raises:
        UsageError: Nothing differs between the ends, or the picture is one that is inverted.
    """
    if first.picture is not None and first.picture.variation is not None:
        raise UsageError("variation is given: an interpolation goes from prompt to prompt or seed to seed")
    if first.conditions == last.wanted and to_seed in (None, *first.seeds):
        raise UsageError("nothing differs between the first frame and the last: give another prompt or seed")
    shares = [float(share) for share in np.linspace(0.0, 1.0, count)]
    text = {
        **first.texts[0],
        "to_prompt": last.texts[0]["prompt"],
        **({} if to_seed is None else {"to_seed": to_seed}),
        "frames": count,
    }
    (start,), (finish,) = first.conditions, last.wanted
    assert isinstance(start, Prompt)
    assert isinstance(finish, Prompt)
    return replace(
        first,
        conditions=[start if start == finish else Blend(start, finish, share) for share in shares],
        negatives=first.negatives * count,
        texts=[{**text, "frame": number} for number in range(count)],
        seeds=first.seeds * count,
        latents=None if to_seed is None else _noise_between(first, to_seed, shares),
        loras=[blended(first.loras[0], last_loras, share) for share in shares],
    )


def _noise_between(first: Request, to_seed: int, shares: list[float]) -> Any:
    """The noise that each frame starts from, float32 [N, C, h, w]."""
    shape = latent_shape(first.manifest, first.height, first.width)
    number = draws_at_start(first.picture, first.manifest).index(NOISE)
    before = picture_noise_shape(first.manifest, first.picture)
    noise, to_noise = (
        noise_source(first.rng, seeds, before).draw(number, shape) for seeds in (first.seeds, [to_seed])
    )
    return np.concatenate([slerp(noise, to_noise, share) for share in shares])


def only_frame(request: Request, frame: int) -> Request:
    """The request for one of its images."""
    one = slice(frame, frame + 1)
    return replace(
        request,
        conditions=request.conditions[one],
        negatives=request.negatives[one],
        texts=request.texts[one],
        seeds=request.seeds[one],
        latents=None if request.latents is None else request.latents[one],
        loras=request.loras[one],
    )
