"""The arguments of one call, checked and spread over its images."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.errors import UsageError
from sdrt.runtime.noise import RNGS, Rng, validate_seed
from sdrt.runtime.solvers import SAMPLERS, SamplerTable

if TYPE_CHECKING:
    from sdrt.runtime.pipeline import Pipeline

MAX_IMAGES: Final = 1000
MAX_GUIDANCE_SCALE: Final = 1000.0  # float16 predictions times more than this cannot be meant

StepEndCallback = Callable[["Pipeline", int, float, dict[str, Any]], "dict[str, Any] | None"]


@dataclass(frozen=True, slots=True)
class Request:
    """A call's arguments after defaults and checks; every per-image list has N entries."""

    prompts: list[str]
    negative_prompts: list[str]
    seeds: list[int]
    height: int
    width: int
    guidance_scale: float
    table: SamplerTable
    karras: bool
    eta: float
    rng: Rng
    latents: NDArray[np.float32] | None
    callback: StepEndCallback | None

    @property
    def guided(self) -> bool:
        """At a guidance scale of 1 or less the unconditional half would not be used: it is left out."""
        return self.guidance_scale > 1.0

    def recipe(self) -> dict[str, Any]:
        """What all images have in common, as plain data."""
        return {
            "height": self.height,
            "width": self.width,
            "num_inference_steps": len(self.table.timesteps),
            "guidance_scale": self.guidance_scale,
            "sampler": self.table.name,
            "karras": self.karras,
            "eta": self.eta,
            "rng": self.rng,
        }


def per_image_texts(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None, per_prompt: int
) -> tuple[list[str], list[str]]:
    """Prompts and negative prompts, one of each per image."""
    if isinstance(per_prompt, bool) or not isinstance(per_prompt, int) or per_prompt < 1:
        raise UsageError(f"num_images_per_prompt is {per_prompt!r}: a whole number of at least 1")
    negative = "" if negative_prompt is None else negative_prompt
    for given in (prompt, negative):
        if not isinstance(given, Sequence):
            raise UsageError(f"a prompt is {type(given).__name__}: a text or a list of texts is wanted")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    if not prompts:
        raise UsageError("the list of prompts is empty: give at least one")
    for text in (*prompts, *negatives):
        if not isinstance(text, str):
            raise UsageError(f"a prompt is {type(text).__name__}: texts are wanted")
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


def per_image_seeds(seed: int | Sequence[int] | None, images: int) -> list[int]:
    """A seed per image; ``None`` draws a random one, which is not the same as 0."""
    if seed is None:
        seed = secrets.randbelow(2**32)
    if isinstance(seed, Sequence):
        if len(seed) != images:
            raise UsageError(f"{len(seed)} seeds for {images} images: give one, or one per image")
        return [validate_seed(value) for value in seed]
    first = validate_seed(seed)
    return [(first + index) % 2**64 for index in range(images)]


def check_options(sampler: object, karras: object, eta: object, rng: object, callback: object) -> None:
    """Refuse options of a wrong type, and an unknown rng, before anything has been computed."""
    if not isinstance(sampler, str):
        raise UsageError(f"sampler is {sampler!r}: a name is wanted, one of {', '.join(SAMPLERS)}")
    if not isinstance(karras, bool):
        raise UsageError(f"karras is {karras!r}: True or False is wanted")
    if isinstance(eta, bool) or not isinstance(eta, int | float):
        raise UsageError(f"eta is {eta!r}: a number from 0 to 1 is wanted")
    if rng not in RNGS:
        raise UsageError(f"rng is {rng!r}; choose one of {', '.join(RNGS)}")
    if callback is not None and not callable(callback):
        raise UsageError(f"callback_on_step_end is {type(callback).__name__}: a function is wanted")


def checked_guidance(scale: float) -> float:
    """The guidance scale as a float, if it is finite and in range."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise UsageError(f"guidance_scale is {scale!r}: a finite number is wanted")
    if not 0.0 <= scale <= MAX_GUIDANCE_SCALE:
        raise UsageError(f"guidance_scale is {scale!r}: from 0 to {MAX_GUIDANCE_SCALE:g}")
    return float(scale)
