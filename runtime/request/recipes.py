"""Recipes as arguments: what draws a picture again, and what of it only informs.

``pipeline(**output.recipes[0])`` draws the picture anew. So a call takes every field of a recipe: the
arguments of `sdrt.runtime.request.options.DrawOptions`, and those below.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.errors import UsageError

# Nothing is drawn otherwise for them; the model is compared, for another one draws another picture.
INFORMING: Final = (
    *("backend", "model", "model_sha256", "refiner", "refiner_sha256"),
    *("version", "output_size", "fps", "timings", "lora_hashes"),
)
# What must be there, and the same, for the picture to be the same.
CHECKED: Final = (
    "image_sha256",
    "mask_sha256",
    "depth_map_sha256",
    "embeddings",
    "lora_sha256",
    "interrupted_after_step",
)
# Of `Pipeline.interpolate`; ``frame`` is the number of the one frame that is wanted.
OF_FRAMES: Final = ("to_prompt", "to_seed", "frames", "frame")
FIELDS: Final = (*INFORMING, *CHECKED, *OF_FRAMES)
GIVEN: Final = "given"  # stands for latents, which are no plain data

_DIGESTS: Final = {"image": "image_sha256", "mask_image": "mask_sha256", "depth_map": "depth_map_sha256"}


class RecipeWarning(UserWarning):
    """A recipe is drawn by another model than the one that it is of."""


def is_recipe(options: Mapping[str, Any]) -> bool:
    """Whether the arguments of a call are a recipe: all that its picture was drawn with."""
    return options.get("version") is not None


def playable(options: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    """The arguments of a call without what only informs. A recipe says all LoRAs that it was drawn with.

    Raises:
        UsageError: Something that the recipe was drawn from is missing, or it is of an unfinished picture.
    """
    warn_of_another_model(options, manifest)
    unfinished = options.get("interrupted_after_step")
    if unfinished is not None:
        raise UsageError(
            f"the recipe is of a picture that was interrupted after step {unfinished}: "
            "leave interrupted_after_step out to draw it whole"
        )
    if isinstance(options.get("latents"), str) and options["latents"] == GIVEN:
        raise UsageError("the recipe was drawn from latents that the caller gave: give them as latents again")
    for name, field in _DIGESTS.items():
        if options.get(field) is not None and options.get(name) is None:
            raise UsageError(
                f"the recipe was drawn from a picture that was not a file (SHA-256 of its pixels "
                f"{str(options[field])[:12]}…): give it as {name}"
            )
    found = {name: value for name, value in options.items() if value is not None and name not in INFORMING}
    return {"loras": {}, **found} if is_recipe(options) else found


def warn_of_another_model(options: Mapping[str, Any], manifest: Manifest, role: str = "model") -> None:
    """Warn where a recipe is of another model than the bundle's.

    Args:
        options: The recipe's fields.
        manifest: The bundle's.
        role: ``model``, or ``refiner`` for the second of an ensemble.
    """
    digest, own = options.get(f"{role}_sha256"), manifest.provenance.get("source_sha256")
    if digest and own and digest != own:
        here, there = manifest.provenance.get("source", "unknown"), options.get(role, "unknown")
        warnings.warn(
            f"the recipe is of the {role} {there} (SHA-256 {str(digest)[:12]}…), and this bundle is of "
            f"{here} ({str(own)[:12]}…): the picture will be another",
            RecipeWarning,
            stacklevel=3,
        )


def pixels_sha256(pixels: NDArray[Any]) -> str:
    """Of a picture or mask as it was read, before it was brought to a size."""
    import hashlib  # 10 ms that a run without a picture need not spend

    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def check_pixels(options: Mapping[str, Any], name: str, digest: str) -> None:
    """Refuse a picture that is not the one that a recipe was drawn from.

    Args:
        options: The call's options; those without the recipe's digest admit any picture.
        name: ``image``, ``mask_image`` or ``depth_map``.
        digest: The picture's `pixels_sha256`.

    Raises:
        UsageError: It is another.
    """
    field = _DIGESTS[name]
    if options.get(field) not in (None, digest):
        source = options[name] if isinstance(options[name], str) else "that is given"
        raise UsageError(
            f"the {name} {source[:300]} is not the one that the recipe was drawn from (SHA-256 of its pixels "
            f"{digest[:12]}…, not {str(options[field])[:12]}…): give that one, or leave {field} out"
        )


def checked_digests(field: str, wanted: object) -> Mapping[str, Any]:
    """What a recipe says of files that it needs, name → SHA-256; of None nothing.

    Args:
        field: The recipe's, for messages.
        wanted: What it holds.

    Raises:
        UsageError: It is no such table.
    """
    if wanted is None:
        return {}
    if not isinstance(wanted, Mapping):
        raise UsageError(f"{field} is {type(wanted).__name__}: names with the SHA-256 of their files")
    return wanted


def check_lora(name: str, digest: str, wanted: Mapping[str, Any]) -> None:
    """Refuse a LoRA that is not the one that a recipe was drawn with.

    Args:
        name: The LoRA's, as the recipe has it.
        digest: The SHA-256 of its file.
        wanted: What `checked_digests` gave.

    Raises:
        UsageError: It is another.
    """
    if wanted.get(name) not in (None, digest):
        raise UsageError(
            f"the LoRA {name[:200]!r} is not the one that the recipe was drawn with (a file with SHA-256 "
            f"{digest[:12]}…, not {str(wanted[name])[:12]}…): give that one, or leave lora_sha256 out"
        )


def refuse_missing_lora(name: str, wanted: Mapping[str, Any]) -> None:
    """Refuse to draw a recipe without a LoRA that it was drawn with, and of which nobody says where it is.

    Args:
        name: The LoRA's, as the recipe's prompt has it.
        wanted: What `checked_digests` gave.

    Raises:
        UsageError: The recipe was drawn with it.
    """
    if name in wanted:
        raise UsageError(
            f"the recipe's LoRA {name[:99]!r} (a file with SHA-256 {str(wanted[name])[:12]}…) is not loaded: "
            "give the folder where it lies (--lora-dir DIR, Pipeline.load(lora_dir=…)), or load its file "
            "under this name (load_lora_weights)"
        )


def check_embeddings(wanted: Mapping[str, Any], loaded: Mapping[str, str]) -> None:
    """Refuse a recipe whose textual inversions are not there.

    Args:
        wanted: What `checked_digests` gave.
        loaded: The pipeline's, name → SHA-256 of the file.

    Raises:
        UsageError: One is missing or another.
    """
    for name, digest in wanted.items():
        if loaded.get(name) == digest:
            continue
        found = "is not loaded" if name not in loaded else "was loaded from another file"
        raise UsageError(
            f"the recipe's textual inversion {str(name)[:100]!r} (a file with SHA-256 {str(digest)[:12]}…) "
            f"{found}: give it with load_textual_inversion, or --embedding FILE={str(name)[:100]}"
        )
