"""Prompts, negative prompts and seeds of a call, checked and spread over its images."""

from __future__ import annotations

import numbers
import os
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from sdrt.runtime.bundle.limits import MAX_CALL_CHARACTERS
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.checks import flag, whole
from sdrt.runtime.errors import UsageError
from sdrt.runtime.samplers.noise import validate_seed
from sdrt.runtime.text.chunks import COMMA_LOOKBACK, Prompt, check_clip_skip
from sdrt.runtime.text.syntax import LoraTag, PromptSyntaxWarning, lora_tags, remarks_on
from sdrt.runtime.text.tokenizer import checked_text

MAX_IMAGES: Final = 1000
RANDOM_SEED: Final = -1  # as in A1111's web UI


class Conditions(NamedTuple):
    """What each of N images is drawn from, and what its recipe says of it.

    Attributes:
        wanted: Prompts, or pictures where the bundle draws variations of one.
        unwanted: What the images are moved away from; None stands for zeros.
        texts: The recipe's share.
        tags: The LoRAs that each prompt asks for.
    """

    wanted: list[Hashable]
    unwanted: list[Hashable]
    texts: list[dict[str, Any]]
    tags: list[tuple[LoraTag, ...]]


def prompt_conditions(
    manifest: Manifest, prompt: str | Sequence[str], options: Mapping[str, Any], *, remark: bool = True
) -> Conditions:
    """Check what of a call's options is about prompts; ``remark`` on what means something elsewhere.

    Raises:
        UsageError: No texts, not as many of one as of the other, too many images, a weight that is no number,
            or an option out of its range.
    """
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
    for text, negative in dict.fromkeys(
        [*((text, False) for text in prompts), *((text, True) for text in unwanted)]
    ):
        # A weight that is no number is refused now.
        for words in remarks_on(text or "", plain=plain, negative=negative):
            if remark:
                warnings.warn(words, PromptSyntaxWarning, stacklevel=2)
    how: dict[str, Any] = {"plain": plain, "clip_skip": skip, "comma_lookback": lookback}
    beyond = {
        **({"plain_prompt": True} if plain else {}),
        **({"clip_skip": skip} if skip else {}),
        **({"comma_lookback": lookback} if lookback != COMMA_LOOKBACK else {}),
    }
    return Conditions(
        [Prompt(text, **how) for text in prompts],
        [Prompt(text, **how, negative=True) for text in unwanted],
        [
            {"prompt": text, "negative_prompt": other, **beyond}
            for text, other in zip(prompts, unwanted, strict=True)
        ],
        [lora_tags(text, plain=plain) for text in prompts],
    )


def per_image_texts(
    prompt: str | Sequence[str], negative: str | Sequence[str] | None, per_prompt: object
) -> tuple[list[str], list[str | None]]:
    """Prompts and negative prompts, one of each per image; no negative prompt stays None.

    Raises:
        UsageError: No texts, not as many of one as of the other, or too many images.
    """
    count = whole("num_images_per_prompt", per_prompt)
    if count < 1:
        raise UsageError(f"num_images_per_prompt is {count}: a whole number of at least 1")
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
    characters = sum(len(text or "") for text in {*prompts, *negatives})
    if characters > MAX_CALL_CHARACTERS:
        raise UsageError(f"{characters} characters in the prompts of one call: at most {MAX_CALL_CHARACTERS}")
    if len(prompts) * count > MAX_IMAGES:
        raise UsageError(f"{len(prompts) * count} images in one call: at most {MAX_IMAGES}")
    return (
        [text for text in prompts for _ in range(count)],
        [text for text in negatives for _ in range(count)],
    )


def per_image_seeds(seed: int | Sequence[int] | None, images: int) -> list[int]:
    """A seed per image; ``None``, which is not the same as 0, and -1 draw a random one.

    Raises:
        UsageError: One is no seed, or there are not as many as images.
    """
    if isinstance(seed, Sequence):
        if len(seed) != images:
            raise UsageError(f"{len(seed)} seeds for {images} images: give one, or one per image")
        return [_seed(value) for value in seed]
    first = _seed(RANDOM_SEED if seed is None else seed)
    return [(first + index) % 2**64 for index in range(images)]


def _seed(given: Any) -> int:
    if isinstance(given, numbers.Integral) and given == RANDOM_SEED:
        return int.from_bytes(os.urandom(4))
    return validate_seed(given)
