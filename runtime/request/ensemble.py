"""A request that two bundles draw: a base one and its refiner, which takes over amid the schedule."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.errors import UsageError
from sdrt.runtime.request.recipes import warn_of_another_model
from sdrt.runtime.request.request import Continued, Request
from sdrt.runtime.request.schedule_part import END, START
from sdrt.runtime.request.sizes import latent_shape

REFINE_FROM: Final = "refine_from"
# Of the texts' options what the refiner is asked, too, beside all that is about sampling.
_SHARED: Final = (
    "plain_prompt",
    "comma_lookback",
    "clip_skip",
    "negative_prompt",
    "num_images_per_prompt",
    "depth_map",
)
_SPACING: Final = ("num_train_timesteps", "timestep_spacing", "steps_offset")
_SIGNAL: Final = 1e-5  # relative, of two schedules that are one

Build = Callable[[Manifest, Mapping[str, Any], bool], Request]


def check_refiner(manifest: Manifest, refiner: Manifest) -> None:
    """Refuse a second bundle that cannot go on with the latents of the first.

    Raises:
        UsageError: It is of another family, of other latents, or needs more than these.
    """
    if manifest.family not in (refiner.family, *refiner.record.refines):
        raise UsageError(
            f"the refiner is of the family {refiner.family}, the bundle of {manifest.family}: it does not "
            "draw on with that one's latents"
        )
    if manifest.latents != refiner.latents:
        raise UsageError(
            f"the refiner's latents have {refiner.latents.channels} channels of {refiner.latents.factor} "
            f"pixels, the bundle's {manifest.latents.channels} of {manifest.latents.factor}: they must be "
            "alike"
        )
    for name, one in (("refiner", refiner), ("bundle", manifest)):
        if one.needs_picture:
            raise UsageError(f"the {name} draws from a picture: an ensemble is drawn from text")


def build_ensemble(
    manifest: Manifest, refiner: Manifest | None, options: Mapping[str, Any], build: Build
) -> Request:
    """The request of a call with ``refine_from``.

    The refiner is asked what the base is: prompts, seeds, sampler, steps and guidance. What only it has, as
    the aesthetic score, is taken from the same options.

    Args:
        manifest: The base bundle's.
        refiner: The refiner's; None where there is none.
        options: The call's.
        build: Makes a request for one bundle; told whether that one refines.

    Raises:
        UsageError: As `sdrt.runtime.request.build.build_request`, or the two do not fit together.
    """
    share = options[REFINE_FROM]
    if refiner is None:
        raise UsageError(
            f"{REFINE_FROM} is {share!r}, and there is no refiner: give one, Pipeline.load(…, refiner=…) or "
            "--refiner BUNDLE"
        )
    for name in (START, END, "mask_image", "expand"):
        if options.get(name) is not None:
            raise UsageError(f"{REFINE_FROM} and {name} are given: they do not go together")
    check_refiner(manifest, refiner)
    own = {name for option in refiner.record.told_options for name in option.names}
    own -= {name for option in manifest.record.told_options for name in option.names}
    begun = {name: value for name, value in options.items() if name not in (REFINE_FROM, *own)}
    try:
        first = build(manifest, {**begun, END: share}, False)
        second = build(refiner, _of_refiner(first, refiner, options), True)
    except UsageError as error:
        raise UsageError(re.sub(f"{START}|{END}", REFINE_FROM, str(error))) from error
    _check_level(first, second)
    warn_of_another_model(options, refiner, "refiner")
    draws = first.first_draw + int(first.sampling.table.draws.max(initial=-1)) + 1
    second = replace(
        second,
        latents=None,
        latents_given=False,
        continues=Continued(draws, len(first.sampling.table)),
    )
    recipe = {name: value for name, value in first.sampling.recipe.items() if name != END}
    told = {name: value for name, value in second.told.items() if name in own}
    origin = {
        "refiner": str(refiner.provenance.get("source", "unknown")),
        "refiner_sha256": str(refiner.provenance.get("source_sha256", "")),
    }
    recipe |= {REFINE_FROM: float(share), **told, **origin}
    return replace(first, sampling=replace(first.sampling, recipe=recipe), refinement=second)


def _of_refiner(first: Request, refiner: Manifest, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the refiner's request; the latents, which are not there yet, are zeros."""
    told = {name for option in refiner.record.told_options for name in option.names}
    recipe = dict(first.sampling.recipe)
    shape = latent_shape(first.manifest, first.height, first.width)
    return {
        **{name: options[name] for name in (*_SHARED, *told) if name in options},
        **recipe,
        START: recipe.pop(END),
        END: None,
        "seed": first.seeds,
        "rng": first.rng,
        "height": first.height,
        "width": first.width,
        "latents": np.broadcast_to(np.float32(0.0), (len(first.seeds), *shape)),
    }


def _check_level(first: Request, second: Request) -> None:
    """Refuse bundles of which the second does not begin where the first ends."""
    one, other = first.sampling.schedule, second.sampling.schedule
    for name in _SPACING:
        ours, theirs = getattr(one, name), getattr(other, name)
        if ours != theirs:
            raise UsageError(
                f"{name} is {ours!r} in the bundle and {theirs!r} in its refiner: they do not pass through "
                "the same noise levels"
            )
    if not np.allclose(one.alphas_cumprod, other.alphas_cumprod, rtol=_SIGNAL):
        raise UsageError("the bundle and its refiner were trained with other noise levels (betas)")
