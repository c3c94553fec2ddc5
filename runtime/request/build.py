"""A call's arguments become a request: checked, with defaults, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdrt.runtime.bundle.families.record import Family
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.bundle.families.told import Told
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.checks import choice, whole
from sdrt.runtime.errors import UsageError
from sdrt.runtime.lora.library import LoraLibrary
from sdrt.runtime.request.depth import DepthMap, build_depth
from sdrt.runtime.request.loras import image_loras
from sdrt.runtime.request.options import OPTIONS, check_names
from sdrt.runtime.request.output import build_callbacks, checked_output_type
from sdrt.runtime.request.picture import PictureTask, build_picture
from sdrt.runtime.request.recipes import OF_FRAMES, checked_digests, playable
from sdrt.runtime.request.request import Continued, Request, is_device_array
from sdrt.runtime.request.sampling import build_sampling
from sdrt.runtime.request.schedule_part import with_noisy_latents
from sdrt.runtime.request.sizes import checked_size, latent_shape
from sdrt.runtime.request.texts import per_image_seeds, prompt_conditions
from sdrt.runtime.samplers.noise import DEFAULT_RNG, RNGS


def build_request(
    manifest: Manifest,
    prompt: str | Sequence[str] | None,
    options: Mapping[str, Any],
    library: LoraLibrary | None = None,
    refiner: Manifest | None = None,
) -> Request:
    """Check the arguments of `Pipeline.__call__` against a bundle's manifest.

    Args:
        manifest: The bundle's manifest.
        prompt: One text, P texts, or None where a picture alone says what to draw.
        options: See `sdrt.runtime.request.options.DrawOptions`; None stands for what was not given.
        library: Finds LoRAs; without it there are none.
        refiner: The manifest of the bundle that goes on from ``refine_from``.

    Raises:
        UsageError: An argument is unknown, of a wrong type or out of range; the message says what is allowed.
    """
    check_names(options, OPTIONS, "the pipeline")
    given = playable(options, manifest)
    if given.get("frames") is None and given.get("refine_from") is not None:
        from sdrt.runtime.request.ensemble import build_ensemble

        recipe_of = {name: options[name] for name in ("refiner", "refiner_sha256") if name in options}
        return build_ensemble(
            manifest,
            refiner,
            {**given, **recipe_of},
            lambda of, asked, refines: _one_request(
                of, "" if refines and prompt is None else prompt, asked, options, library, refines=refines
            ),
        )
    if given.get("frames") is None:
        return _one_request(manifest, prompt, given, options, library)
    rest = {name: value for name, value in given.items() if name not in OF_FRAMES}
    to_prompt, to_seed, frames, frame = (given.get(name) for name in OF_FRAMES)
    rest["frame"] = frame
    return build_interpolation(manifest, prompt, to_prompt, frames, to_seed, rest, library)


def build_interpolation(
    manifest: Manifest,
    prompt: Any,
    to_prompt: Any,
    frames: Any,
    to_seed: Any,
    options: Mapping[str, Any],
    library: LoraLibrary | None = None,
) -> Request:
    """Check the arguments of `Pipeline.interpolate`: the request whose images are the frames.

    Args:
        manifest: The bundle's manifest.
        prompt: The first frame's prompt.
        to_prompt: The last frame's prompt; None for the same.
        frames: The number of frames.
        to_seed: The seed of the last frame's noise; None for the same.
        options: As for `build_request`; with ``frame`` the request is for the frame of that number alone.
        library: As for `build_request`.

    Raises:
        UsageError: An argument is out of range, or nothing differs between the ends.
    """
    from sdrt.runtime.request.interpolation import check_ends, frames_between, only_frame

    count = check_ends(manifest, prompt, to_prompt, frames, to_seed, options)
    options = dict(options)
    frame = options.pop("frame", None)
    if frame is not None and not 0 <= whole("frame", frame) < count:
        raise UsageError(f"frame is {frame}: of {count} frames the first is 0 and the last {count - 1}")
    check_names(options, OPTIONS, "the pipeline")
    given = playable(options, manifest)
    first = _one_request(manifest, prompt, given, options, library)
    last = prompt_conditions(manifest, prompt if to_prompt is None else to_prompt, given)
    (last_loras,) = image_loras(last.tags, given, library)
    last_seed = None if to_seed is None else per_image_seeds(to_seed, 1)[0]
    every = frames_between(first, last, last_loras, last_seed, count)
    return every if frame is None else only_frame(every, whole("frame", frame))


def _one_request(
    manifest: Manifest,
    prompt: str | Sequence[str] | None,
    options: Mapping[str, Any],
    as_given: Mapping[str, Any],
    library: LoraLibrary | None,
    *,
    refines: bool = False,
) -> Request:
    """The request of a call without frames.

    Args:
        manifest: The bundle's manifest.
        prompt: See `build_request`.
        options: What `playable` leaves of the call's options.
        as_given: The call's options before that: None is no way to leave out what is given back.
        library: See `build_request`.
        refines: Whether it is the refiner's half of a call: LoRAs are for the base model alone, and its
            texts were remarked on.
    """
    rng = choice("rng", options.get("rng", DEFAULT_RNG), RNGS, "; choose one of")
    _check_of_family(manifest, options)
    depth = build_depth(manifest, options)
    picture, continues = None, None
    if options.get("denoising_start") is not None:
        options, continues = with_noisy_latents(manifest, options), Continued()
    if not manifest.record.reads_text:
        from sdrt.runtime.request.variations import image_conditions

        conditions = image_conditions(manifest, prompt, options)
    else:
        picture = build_picture(manifest, options, has_prompt=prompt is not None)
        if prompt is None and picture is None:
            raise UsageError("the prompt is missing: what shall be drawn?")
        if prompt is None and options.get("guidance_scale") is None and not _picture_guides(manifest):
            options = {**options, "guidance_scale": 1.0}  # guidance from the empty text to itself
        text = "" if prompt is None else prompt
        conditions = prompt_conditions(manifest, text, options, remark=not refines)
    size, strength = _size_and_strength(manifest, options, picture, depth)
    masked = picture is not None and picture.canvas.mask is not None
    if masked and options.get("denoising_end") is not None:
        raise UsageError(
            "denoising_end and a mask are given: what is kept of a picture is put back when it is clean"
        )
    request = Request(
        manifest=manifest,
        conditions=conditions.wanted,
        negatives=conditions.unwanted,
        texts=conditions.texts,
        seeds=per_image_seeds(options.get("seed"), len(conditions.wanted)),
        height=size[0],
        width=size[1],
        sampling=build_sampling(manifest, options, strength),
        rng=rng,
        latents=options.get("latents"),
        latents_scale=None if continues is None else 1.0,
        latents_given=options.get("latents") is not None,
        told=_told(manifest, options, size),
        picture=picture,
        depth=None if depth is None else depth.of_latents(manifest, *size),
        embeddings=checked_digests("embeddings", options.get("embeddings")),
        loras=[()] * len(conditions.tags) if refines else image_loras(conditions.tags, options, library),
        lora_partial=bool(options.get("lora_partial")),
        output_type=checked_output_type(as_given.get("output_type", "pil"), masked=masked),
        callbacks=build_callbacks(as_given),
        continues=continues,
    )
    _check_latents(manifest, request)
    return request


def _size_and_strength(
    manifest: Manifest, options: Mapping[str, Any], picture: PictureTask | None, depth: DepthMap | None
) -> tuple[tuple[int, int], float | None]:
    """Height and width, and the share of the schedule that is run on a picture, None for all of it."""
    if picture is None:
        height, width = options.get("height"), options.get("width")
        if depth is not None and height is None and width is None:
            height, width = depth.drawn_size(manifest)
        return checked_size(manifest, height, width), None
    whole = picture.variation is not None or picture.input
    return picture.size, None if whole else picture.strength


def _picture_guides(manifest: Manifest) -> bool:
    """Whether guidance is away from no picture, too."""
    return bool(manifest.record.picture_input) and manifest.record.picture_blank


def _check_of_family(manifest: Manifest, options: Mapping[str, Any]) -> None:
    """Refuse options that a family has no use for, and those that only others have."""
    record = manifest.record
    for name in record.without:
        if options.get(name) is not None and record.reads_text:  # without text: `image_conditions`
            raise UsageError(f"{name} is given: a bundle of {record.title} has no such thing")
    titles: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        for name in _own_options(family):
            titles.setdefault(name, []).append(family.title)
    for name in titles:
        if name not in _own_options(record) and options.get(name) is not None:
            raise UsageError(
                f"{name} is given: only a bundle of {' or '.join(titles[name])} has it, this one is of "
                f"{record.title}"
            )


def _own_options(family: Family) -> set[str]:
    """Options of a request that not every family has: what the U-Net is told, and the rest."""
    return {*family.own, *(name for option in family.told_options for name in option.names)}


def _told(manifest: Manifest, options: Mapping[str, Any], size: tuple[int, int]) -> Told:
    """What the U-Net is told in numbers, with defaults for what was not given."""
    known = manifest.record.told_options
    return {name: value for option in known for name, value in option.read(options, size).items()}


def _check_latents(manifest: Manifest, request: Request) -> None:
    given = request.latents
    if given is None:
        return
    want = (len(request.conditions), *latent_shape(manifest, request.height, request.width))
    if is_device_array(given):
        if request.picture is not None:
            raise UsageError("latents on a device are given beside an image: give them as a NumPy array")
        return  # the device knows how to read its shape and dtype
    if not isinstance(given, np.ndarray) or given.shape != want or given.dtype != np.float32:
        shown = f"{given.dtype}{list(given.shape)}" if isinstance(given, np.ndarray) else type(given)
        raise UsageError(f"latents are {shown}: a NumPy array float32{list(want)} is wanted")
    if not np.isfinite(given).all():
        raise UsageError("latents hold NaN or infinity")
