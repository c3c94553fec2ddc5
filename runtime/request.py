"""The arguments of one call, checked and spread over its images, before anything is computed."""

from __future__ import annotations

import math
import numbers
import operator
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sdrt.runtime.errors import UsageError
from sdrt.runtime.loop_buffers import MAX_ROWS
from sdrt.runtime.manifest import Manifest
from sdrt.runtime.noise import DEFAULT_RNG, RNGS, Rng, validate_seed
from sdrt.runtime.solvers import SAMPLERS, SamplerOptions, SamplerTable, make_table
from sdrt.runtime.tokenizer import checked_text

MAX_IMAGES: Final = 1000
MAX_SIZE: Final = 16_384  # pixels that SDXL may be told of; no picture is larger
_DLPACK_CPU: Final = 1  # kDLCPU of dlpack.h: a tensor in main memory, such as PyTorch's on the CPU
MAX_GUIDANCE_SCALE: Final = 1000.0  # float16 predictions times more than this cannot be meant


@dataclass(frozen=True, slots=True)
class Request:
    """A call's arguments after defaults and checks; every per-image list has N entries."""

    prompts: list[str]
    negative_prompts: list[str | None]  # None: not given, where that is not the same as an empty text
    seeds: list[int]
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    table: SamplerTable  # some samplers have more than one row for a step
    karras: bool
    eta: float | None  # None: the sampler's own
    rng: Rng
    latents: Any  # NumPy array or device array; None: noise from the seeds
    sizes: dict[str, list[int]]  # SDXL's original_size, crops_coords_top_left and target_size; else empty

    @property
    def guided(self) -> bool:
        """At a guidance scale of 1 or less the unconditional half would not be used: it is left out."""
        return self.guidance_scale > 1.0

    def recipes(self) -> list[dict[str, Any]]:
        """What draws each image, as plain data."""
        shared: dict[str, Any] = {
            "height": self.height,
            "width": self.width,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "sampler": self.table.name,
            "karras": self.karras,
            "eta": self.eta,
            "rng": self.rng,
            **self.sizes,
        }
        if self.latents is not None:
            shared["latents"] = "given"  # the seed alone does not give this picture
        texts = zip(self.prompts, self.negative_prompts, self.seeds, strict=True)
        return [
            {"prompt": prompt, "negative_prompt": negative, "seed": seed, **shared}
            for prompt, negative, seed in texts
        ]


def build_request(
    manifest: Manifest,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    num_images_per_prompt: int = 1,
    seed: int | Sequence[int] | None = None,
    rng: Rng = DEFAULT_RNG,
    sampler: str | None = None,
    karras: bool = False,
    eta: float | None = None,
    latents: Any = None,
    original_size: Sequence[int] | None = None,
    crops_coords_top_left: Sequence[int] | None = None,
    target_size: Sequence[int] | None = None,
) -> Request:
    """Check the arguments of `Pipeline.__call__` against a bundle's manifest.

    Raises:
        UsageError: An argument is of a wrong type or out of range; the message says what is allowed.
    """
    defaults = manifest.defaults
    if rng not in RNGS:
        raise UsageError(f"rng is {rng!r}; choose one of {', '.join(RNGS)}")
    if negative_prompt is None and not manifest.force_zeros_for_empty_prompt:
        negative_prompt = ""
    prompts, negatives = _per_image_texts(prompt, negative_prompt, num_images_per_prompt)
    rows, columns = checked_size(manifest, height, width)
    eta = None if eta is None else _number("eta", eta)
    steps = _whole(
        "num_inference_steps",
        defaults.num_inference_steps if num_inference_steps is None else num_inference_steps,
    )
    request = Request(
        prompts=prompts,
        negative_prompts=negatives,
        seeds=_per_image_seeds(seed, len(prompts)),
        height=rows,
        width=columns,
        num_inference_steps=steps,
        guidance_scale=_guidance(defaults.guidance_scale if guidance_scale is None else guidance_scale),
        table=_table(manifest, defaults.sampler if sampler is None else sampler, steps, karras, eta),
        karras=karras,
        eta=eta,
        rng=rng,
        latents=latents,
        sizes=_sizes(
            manifest,
            {
                "original_size": (original_size, (rows, columns)),
                "crops_coords_top_left": (crops_coords_top_left, (0, 0)),
                "target_size": (target_size, (rows, columns)),
            },
        ),
    )
    _check_latents(manifest, request)
    return request


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
        size = default if given is None else _whole(name, given)
        if not limit.admits(size):
            raise UsageError(f"{name} is {size}: this bundle draws {limit} pixels")
        sizes.append(size)
    return sizes[0], sizes[1]


def latent_shape(manifest: Manifest, height: int, width: int) -> tuple[int, int, int]:
    """[C, h, w] of one image's latents."""
    geometry = manifest.latents
    return geometry.channels, height // geometry.factor, width // geometry.factor


def _table(
    manifest: Manifest, sampler: object, count: int, karras: object, eta: float | None
) -> SamplerTable:
    if not isinstance(sampler, str):
        raise UsageError(f"sampler is {sampler!r}: a name is wanted, one of {', '.join(SAMPLERS)}")
    if not isinstance(karras, bool):
        raise UsageError(f"karras is {karras!r}: True or False is wanted")
    most = manifest.schedule.num_train_timesteps
    if not 1 <= count <= most:
        raise UsageError(f"num_inference_steps is {count}: allowed are whole numbers from 1 to {most}")
    # No noise is what a sampler without `eta` has anyway; one that has it must be told of a zero.
    has_eta = sampler in SAMPLERS and "eta" in SAMPLERS[sampler].options
    options = SamplerOptions(eta=eta) if eta or (has_eta and eta is not None) else None
    table = make_table(sampler, manifest.schedule, count, options, karras=karras)
    if len(table.timesteps) > MAX_ROWS:
        raise UsageError(
            f"num_inference_steps is {count}, which is {len(table.timesteps)} evaluations of the unet with "
            f"{sampler}: at most {MAX_ROWS}"
        )
    return table


def _sizes(manifest: Manifest, given: Mapping[str, tuple[Any, tuple[int, int]]]) -> dict[str, list[int]]:
    """SDXL's sizes in pixels, height or top first, with defaults for what was not given."""
    if manifest.family != "sdxl":
        for name, (value, _) in given.items():
            if value is not None:
                raise UsageError(f"{name} is {value!r}: only SDXL has it, this bundle is {manifest.family}")
        return {}
    sizes = {}
    for name, (value, default) in given.items():
        pair = default if value is None else value
        if isinstance(value, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise UsageError(f"{name} is {pair!r}: two whole numbers are wanted, as (height, width)")
        sizes[name] = [_whole(name, number) for number in pair]
        if not all(0 <= number <= MAX_SIZE for number in sizes[name]):
            raise UsageError(f"{name} is {pair!r}: from 0 to {MAX_SIZE} pixels")
    return sizes


def _check_latents(manifest: Manifest, request: Request) -> None:
    given = request.latents
    if given is None:
        return
    want = (len(request.prompts), *latent_shape(manifest, request.height, request.width))
    if is_device_array(given):
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


def _per_image_texts(
    prompt: str | Sequence[str], negative: str | Sequence[str] | None, per_prompt: int
) -> tuple[list[str], list[str | None]]:
    """Prompts and negative prompts, one of each per image; no negative prompt stays None."""
    per_prompt = _whole("num_images_per_prompt", per_prompt)
    if per_prompt < 1:
        raise UsageError(f"num_images_per_prompt is {per_prompt}: a whole number of at least 1")
    for given in (prompt, "" if negative is None else negative):
        if not isinstance(given, Sequence):
            raise UsageError(f"a prompt is {type(given).__name__}: a text or a list of texts is wanted")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    single = negative is None or isinstance(negative, str)
    negatives: list[Any] = [negative] * len(prompts) if single else list(negative or ())
    if not prompts:
        raise UsageError("the list of prompts is empty: give at least one")
    for text in (*prompts, *(() if negative is None else negatives)):
        if not isinstance(text, str):
            raise UsageError(f"a prompt is {type(text).__name__}: texts are wanted")
    prompts = list(map(checked_text, prompts))
    negatives = [None if text is None else checked_text(text) for text in negatives]
    if len(negatives) != len(prompts):
        raise UsageError(
            f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one per prompt"
        )
    if len(prompts) * per_prompt > MAX_IMAGES:
        raise UsageError(f"{len(prompts) * per_prompt} images in one call: at most {MAX_IMAGES}")
    return (
        [text for text in prompts for _ in range(per_prompt)],
        [text for text in negatives for _ in range(per_prompt)],
    )


def _per_image_seeds(seed: int | Sequence[int] | None, images: int) -> list[int]:
    """A seed per image; ``None`` draws a random one, which is not the same as 0."""
    if seed is None:
        seed = secrets.randbelow(2**32)
    if isinstance(seed, Sequence):
        if len(seed) != images:
            raise UsageError(f"{len(seed)} seeds for {images} images: give one, or one per image")
        return [validate_seed(value) for value in seed]
    first = validate_seed(seed)
    return [(first + index) % 2**64 for index in range(images)]


def _guidance(given: object) -> float:
    scale = _number("guidance_scale", given)
    if not 0.0 <= scale <= MAX_GUIDANCE_SCALE:
        raise UsageError(f"guidance_scale is {given!r}: from 0 to {MAX_GUIDANCE_SCALE:g}")
    return scale


def _whole(name: str, value: Any) -> int:
    """A whole number of any integer type, NumPy's too; True is none."""
    try:
        if isinstance(value, bool | np.bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{name} is {value!r}: a whole number is wanted") from None


def _number(name: str, value: Any) -> float:
    """A finite number of any real type, NumPy's too."""
    if isinstance(value, bool | np.bool) or not isinstance(value, numbers.Real):
        raise UsageError(f"{name} is {value!r}: a number is wanted")
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond all floats
        number = math.inf
    if not math.isfinite(number):
        raise UsageError(f"{name} is {number!r}: a finite number is wanted")
    return number
