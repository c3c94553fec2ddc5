"""``sd-run --from``: the recipe inside a picture as options, beneath those of the command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sdrt.runtime.errors import UsageError
from sdrt.runtime.lora.weights import SUFFIX
from sdrt.runtime.request.recipes import FIELDS

_LEVELS: Final = ("karras", "sigma_schedule", "timesteps", "sigmas")
# An option that is given on the command line → what of the recipe goes with the recipe's own.
_REPLACES: Final[Mapping[str, tuple[str, ...]]] = {
    "sampler": (*_LEVELS, "spacing", "eta", "solver_order", "lower_order_final", "original_inference_steps"),
    "num_inference_steps": ("timesteps", "sigmas"),
    "timesteps": (*_LEVELS, "num_inference_steps"),
    "sigmas": (*_LEVELS, "num_inference_steps"),
    "sigma_schedule": _LEVELS,
    "karras": _LEVELS,
    "image": ("image_sha256",),
    "mask_image": ("mask_sha256", "variation"),
    "loras": ("lora_sha256",),
    "depth_map": ("depth_map_sha256",),
    "expand": ("variation",),
    "strength": ("variation",),
    "variation": ("strength",),
    "height": ("original_size", "target_size"),
    "width": ("original_size", "target_size"),
    "prompt": ("embeddings",),
    "negative_prompt": ("embeddings",),
}
# What is said of frames: of the command's own, and all of it in the recipe of one frame.
_OF_ALL_FRAMES: Final = ("to_prompt", "to_seed", "frames", "fps")
_ASKED_FOR: Final = {"image": "--image", "mask_image": "--mask", "depth_map": "--depth"}


def with_recipe(
    arguments: argparse.Namespace, recipe: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The prompt of a recipe, and the options of a run by it.

    Args:
        arguments: The command line's; an animation's ends are put into it, where it has none of its own.
        recipe: As `sdrt.runtime.pictures.metadata.read_recipe` gives it.
        given: Options of the command line, by the pipeline's names.

    Raises:
        UsageError: A picture that the recipe starts from is not there, or the recipe is damaged.
    """
    from sdrt.runtime.cli.prompts import has_prompt
    from sdrt.runtime.request.options import JSON_OPTIONS, check_names

    source = f"the recipe in {arguments.from_picture}"
    check_names(recipe, ("prompt", *JSON_OPTIONS), source, also=(*FIELDS, "latents"))
    if not isinstance(recipe.get("prompt"), str):
        raise UsageError(f"{source} is damaged: it has no prompt")
    named = {**given, **({"prompt": None} if has_prompt(arguments) else {})}
    gone = {name for option in named for name in _REPLACES.get(option, ())}
    options = {name: value for name, value in recipe.items() if name not in gone and name not in named}
    for name, option in _ASKED_FOR.items():
        if options.get(name) is not None:
            options[name] = _found(options[name], name, option, Path(arguments.from_picture))
    _put_loras_beside(options, Path(arguments.from_picture))
    options.pop("prompt", None)
    own = any(getattr(arguments, name) is not None for name in _OF_ALL_FRAMES)
    if own or "frame" not in options:
        options.pop("frame", None)
        for name in _OF_ALL_FRAMES:
            value = options.pop(name, None)
            if getattr(arguments, name) is None:
                setattr(arguments, name, value)
    return recipe["prompt"], {**options, **given}


def _put_loras_beside(options: dict[str, Any], picture: Path) -> None:
    """Of LoRAs that are not where the recipe has them take those that lie as far from the picture."""
    for name in list(options["loras"]) if isinstance(options.get("loras"), Mapping) else ():
        near = str(picture.parent / name)
        if name.endswith(SUFFIX) and not os.path.lexists(name) and os.path.lexists(near):
            for field in ("loras", "lora_sha256"):
                table = options.get(field)
                if isinstance(table, Mapping):
                    options[field] = {near if key == name else key: value for key, value in table.items()}


def _found(name: Any, what: str, option: str, picture: Path) -> str:
    """The file of a given picture: as the recipe has it, or beside the picture with the recipe."""
    if not isinstance(name, str):
        raise UsageError(f"the recipe in {picture} is damaged: {what} is {type(name).__name__}, no file name")
    for place in (name, str(picture.parent / name), str(picture.parent / Path(name).name)):
        if os.path.lexists(place):
            return place
    raise UsageError(
        f"{picture} was drawn from the {what} {name[:300]}, which is neither here nor beside it: give it "
        f"with {option} FILE"
    )
