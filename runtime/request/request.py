"""The arguments of one call, checked and spread over its images, before anything is computed."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.checks import flag, whole
from sdrt.runtime.errors import UsageError
from sdrt.runtime.request.options import OPTIONS, check_names
from sdrt.runtime.request.picture import PictureTask, build_picture
from sdrt.runtime.request.recipes import GIVEN, playable
from sdrt.runtime.request.sampling import Sampling, build_sampling
from sdrt.runtime.request.texts import per_image_seeds, per_image_texts
from sdrt.runtime.samplers.noise import DEFAULT_RNG, RNGS, Rng
from sdrt.runtime.text.chunks import COMMA_LOOKBACK, Prompt, check_clip_skip
from sdrt.runtime.text.syntax import PromptSyntaxWarning, remarks_on

MAX_SIZE: Final = 16_384  # pixels that SDXL may be told of; no picture is larger
_DLPACK_CPU: Final = 1  # kDLCPU of dlpack.h: a tensor in main memory, such as PyTorch's on the CPU


@dataclass(frozen=True, slots=True)
class Request:
    """A call's arguments after defaults and checks; every per-image list has N entries.

    Attributes:
        conditions: What each image is drawn from, as the bundle's encoder takes it.
        negatives: What each is moved away from, likewise.
        texts: Per image what its recipe says of the two.
        seeds: Of the noise.
        height: Pixels that the model draws.
        width: Likewise.
        sampling: Table and guidance.
        rng: Whose noise.
        latents: Noise that was given: a NumPy array or device array; None for noise from the seeds.
        latents_scale: What ``latents`` are multiplied with to be x; None for the table's own.
        latents_given: Whether the caller brought them.
        sizes: What the U-Net is told in pixels, such as SDXL's original_size; else empty.
        picture: What the run starts from, if that is a picture.
    """

    conditions: list[Hashable]
    negatives: list[Hashable]
    texts: list[dict[str, Any]]
    seeds: list[int]
    height: int
    width: int
    sampling: Sampling
    rng: Rng
    latents: Any
    latents_scale: float | None
    latents_given: bool
    sizes: dict[str, list[int]]
    picture: PictureTask | None

    @property
    def guided(self) -> bool:
        """At a guidance scale of 1 or less the unconditional half would not be used: it is left out."""
        return self.sampling.guided

    def recipes(self) -> list[dict[str, Any]]:
        """What draws each image, as plain data."""
        shared: dict[str, Any] = {
            "height": self.height,
            "width": self.width,
            **self.sampling.recipe,
            "rng": self.rng,
            **self.sizes,
            **({} if self.picture is None else self.picture.recipe),
        }
        if self.latents_given:
            shared["latents"] = GIVEN  # the seed alone does not give this picture
        return [{**text, "seed": seed, **shared} for text, seed in zip(self.texts, self.seeds, strict=True)]


def build_request(
    manifest: Manifest, prompt: str | Sequence[str] | None, options: Mapping[str, Any]
) -> Request:
    """Check the arguments of `Pipeline.__call__` against a bundle's manifest.

    Args:
        manifest: Of the bundle.
        prompt: One text, P texts, or None where a picture alone says what to draw.
        options: See `sdrt.runtime.request.options.DrawOptions`; None stands for what was not given.

    Raises:
        UsageError: An argument is unknown, of a wrong type or out of range; the message says what is allowed.
    """
    check_names(options, OPTIONS, "the pipeline")
    options = playable(options, manifest)
    if options.get("frames") is not None:
        from sdrt.runtime.request.interpolation import request_of_frames

        return request_of_frames(manifest, prompt, options)
    rng = options.get("rng", DEFAULT_RNG)
    if rng not in RNGS:
        raise UsageError(f"rng is {rng!r}; choose one of {', '.join(RNGS)}")
    if not manifest.record.reads_text:
        from sdrt.runtime.drawing.picture_conditioning import build_variations

        return build_variations(manifest, prompt, options, rng)
    picture = build_picture(manifest, options, has_prompt=prompt is not None)
    if prompt is None and picture is None:
        raise UsageError("the prompt is missing: what shall be drawn?")
    if prompt is None and options.get("guidance_scale") is None:
        options = {**options, "guidance_scale": 1.0}  # guidance from the empty text to itself
    conditions, negatives, texts = _conditions(manifest, "" if prompt is None else prompt, options)
    return with_sampling(manifest, options, rng, picture, conditions, negatives, texts)


def with_sampling(
    manifest: Manifest,
    options: Mapping[str, Any],
    rng: Rng,
    picture: PictureTask | None,
    conditions: list[Hashable],
    negatives: list[Hashable],
    texts: list[dict[str, Any]],
) -> Request:
    """The request for what is already known of each image.

    Raises:
        UsageError: As `build_request`.
    """
    if picture is None:
        height, width = checked_size(manifest, options.get("height"), options.get("width"))
        strength = None
    else:
        height, width = picture.canvas.image.shape[:2]
        strength = None if picture.variation is not None else picture.strength
    request = Request(
        conditions=conditions,
        negatives=negatives,
        texts=texts,
        seeds=per_image_seeds(options.get("seed"), len(conditions)),
        height=height,
        width=width,
        sampling=build_sampling(manifest, options, strength),
        rng=rng,
        latents=options.get("latents"),
        latents_scale=None,
        latents_given=options.get("latents") is not None,
        sizes=_sizes(manifest, options, (height, width)),
        picture=picture,
    )
    _check_latents(manifest, request)
    return request


def _conditions(
    manifest: Manifest, prompt: str | Sequence[str], options: Mapping[str, Any]
) -> tuple[list[Hashable], list[Hashable], list[dict[str, Any]]]:
    negative = options.get("negative_prompt")
    if negative is None and not manifest.force_zeros_for_empty_prompt:
        negative = ""
    prompts, unwanted = per_image_texts(prompt, negative, options.get("num_images_per_prompt", 1))
    plain = flag("plain_prompt", options.get("plain_prompt", False))
    skip = whole("clip_skip", options.get("clip_skip", 0))
    check_clip_skip(skip, manifest.limits.max_clip_skip)
    lookback = whole("comma_lookback", options.get("comma_lookback", COMMA_LOOKBACK))
    if lookback < 0:
        raise UsageError(f"comma_lookback is {lookback}: a number of tokens is wanted, 0 for none")
    for text in dict.fromkeys((*prompts, *unwanted)):
        for remark in remarks_on(text or "", plain=plain):  # a weight that is no number is refused now
            warnings.warn(remark, PromptSyntaxWarning, stacklevel=2)
    how: dict[str, Any] = {"plain": plain, "clip_skip": skip, "comma_lookback": lookback}
    conditions: list[Hashable] = [Prompt(text, **how) for text in prompts]
    negatives: list[Hashable] = [Prompt(text, **how) for text in unwanted]
    beyond = {
        **({"plain_prompt": True} if plain else {}),
        **({"clip_skip": skip} if skip else {}),
        **({"comma_lookback": lookback} if lookback != COMMA_LOOKBACK else {}),
    }
    texts = [
        {"prompt": text, "negative_prompt": other, **beyond}
        for text, other in zip(prompts, unwanted, strict=True)
    ]
    return conditions, negatives, texts


def checked_size(manifest: Manifest, height: object, width: object) -> tuple[int, int]:
    """Height and width in pixels, the bundle's own where None is given.

    Raises:
        UsageError: A size that the bundle does not admit.
    """
    defaults, limits = manifest.defaults, manifest.limits
    sizes = []
    for name, given, default, limit in (
        ("height", height, defaults.height, limits.height),
        ("width", width, defaults.width, limits.width),
    ):
        size = default if given is None else whole(name, given)
        if not limit.admits(size):
            raise UsageError(f"{name} is {size}: this bundle draws {limit} pixels")
        sizes.append(size)
    return sizes[0], sizes[1]


def latent_shape(manifest: Manifest, height: int, width: int) -> tuple[int, int, int]:
    """[C, h, w] of one image's latents."""
    geometry = manifest.latents
    return geometry.channels, height // geometry.factor, width // geometry.factor


def _sizes(manifest: Manifest, options: Mapping[str, Any], size: tuple[int, int]) -> dict[str, list[int]]:
    """What the U-Net is told in pixels, height or top first, with defaults for what was not given."""
    known = manifest.record.pixel_options
    for family in FAMILIES.values():
        for option in family.pixel_options:
            name, value = option.name, options.get(option.name)
            if option not in known and value is not None:
                raise UsageError(
                    f"{name} is {value!r}: only {family.title} has it, this bundle is {manifest.family}"
                )
    sizes = {}
    for option in known:
        name, value = option.name, options.get(option.name)
        pair = option.usual(size) if value is None else value
        if isinstance(value, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise UsageError(f"{name} is {pair!r}: two whole numbers are wanted, as (height, width)")
        sizes[name] = [whole(name, entry) for entry in pair]
        if not all(0 <= entry <= MAX_SIZE for entry in sizes[name]):
            raise UsageError(f"{name} is {pair!r}: from 0 to {MAX_SIZE} pixels")
    return sizes


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


def is_device_array(given: object) -> bool:
    """Whether an object says that it lies in some device's memory (a NumPy array lies in the host's)."""
    if isinstance(given, np.ndarray):
        return False
    if hasattr(given, "__cuda_array_interface__"):
        return True
    place = getattr(given, "__dlpack_device__", None)
    return place is not None and int(place()[0]) != _DLPACK_CPU
