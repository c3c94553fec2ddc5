"""An ensemble of denoisers: one bundle draws the first steps, its refiner the rest (Podell et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sdrt.runtime.drawing.callbacks import Hook
from sdrt.runtime.drawing.draw import draw
from sdrt.runtime.drawing.parts import Parts
from sdrt.runtime.request.output import PipelineOutput
from sdrt.runtime.request.request import Request


def draw_all(
    request: Request,
    recipes: Sequence[dict[str, Any]],
    parts: Parts,
    refiner: Parts | None,
    new_hook: Callable[[Request], Hook],
) -> PipelineOutput:
    """Draw all images of a request, and of its refinement.

    The latents of all images go to the refiner together: on a GPU once to the host and back.

    Args:
        request: What is asked, of the parts' bundle.
        recipes: The images' recipes.
        parts: What draws it.
        refiner: What draws the refinement.
        new_hook: Gives what is asked and told in a run.

    Raises:
        NumericsError: A component gave NaN or infinity; the message names it.
    """
    if request.refinement is None or refiner is None:
        return draw(request, recipes, parts, new_hook(request))
    quiet = replace(request.callbacks, on_batch_end=None)  # nothing is finished yet
    begun = replace(request, output_type="latents", callbacks=quiet)
    hook = new_hook(begun)
    noisy = draw(begun, recipes, parts, hook)
    rest = replace(
        request.refinement,
        latents=noisy.latents,
        output_type=request.output_type,
        callbacks=request.callbacks,
    )
    second = new_hook(rest)
    second.interrupted = hook.interrupted
    output = draw(rest, recipes, refiner, second)
    stages = {**noisy.timings, **output.timings}
    seconds = {stage: noisy.timings.get(stage, 0.0) + output.timings.get(stage, 0.0) for stage in stages}
    rows = len(request.sampling.table) + len(rest.sampling.table)
    seconds["step"] = seconds["denoise"] / rows
    return replace(output, timings=seconds)
