"""A part of the schedule: in an ensemble of denoisers one goes on with another's x (Balaji et al. 2022).

``denoising_end`` and ``denoising_start`` are diffusers' names. They are shares of the training timesteps, so
that two models with one sampler and number of steps part it at the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.checks import number
from sdrt.runtime.errors import UsageError
from sdrt.runtime.samplers.schedule import NoiseSchedule
from sdrt.runtime.samplers.table import SamplerTable
from sdrt.runtime.samplers.timestep import pndm

START: Final = "denoising_start"
END: Final = "denoising_end"
_LATENT_AXES: Final = 4  # [N, C, h, w]


@dataclass(frozen=True, slots=True)
class SchedulePart:
    """What of the schedule is run.

    Attributes:
        start: The share that was run before, above 0 and below 1; None for none.
        end: The share after which the run ends; None to the end.
    """

    start: float | None
    end: float | None

    @property
    def recipe(self) -> dict[str, float]:
        """The arguments behind it."""
        return {name: share for name, share in ((START, self.start), (END, self.end)) if share is not None}

    def cut(
        self, make: Callable[[int], SamplerTable], schedule: NoiseSchedule, first: int
    ) -> tuple[SamplerTable, SamplerTable]:
        """The part's table, and the one whose steps guidance counts.

        Args:
            make: The run's table without so many first steps.
            schedule: The bundle's.
            first: The first step of a run that begins at a picture, else 0.

        Raises:
            UsageError: There is no step in the part, or the schedule or the sampler cannot be parted.
        """
        counted = make(first)
        if self.start is None and self.end is None:
            return counted, counted
        if schedule.edm is not None:
            raise UsageError(
                f"{self._shown} is a share of the training timesteps, and this model has none (it is an EDM "
                "model)"
            )
        table = counted
        if self.start is not None:
            if counted.name == pndm.name:
                raise UsageError(
                    f"{self._shown} is given: pndm does its first step twice, and cannot begin amid "
                    "another's run; use ddim, euler or dpmpp_2m"
                )
            done = self._steps_before(counted, schedule, self.start)
            if done == (steps := counted.num_inference_steps):
                raise UsageError(f"{self._shown} leaves none of {steps} steps to do: take more steps")
            table = make(done)
        if self.end is not None:
            table = table.first(self._steps_before(table, schedule, self.end))
        if len(table) == 0:
            raise UsageError(f"{self._shown} is before the first step of this run: there is nothing to do")
        return table, counted

    @property
    def _shown(self) -> str:
        return " and ".join(f"{name} {share:g}" for name, share in self.recipe.items())

    @staticmethod
    def _steps_before(table: SamplerTable, schedule: NoiseSchedule, share: float) -> int:
        """The steps of a table that begin before a share of the schedule, as diffusers' pipelines count."""
        trained = schedule.num_train_timesteps
        return table.steps_above(round(trained - share * trained))


def build_part(options: Mapping[str, Any]) -> SchedulePart:
    """Check what of a call's options is about a part of the schedule.

    Raises:
        UsageError: A share is none, or the part ends before it begins.
    """
    start, end = (_share(name, options.get(name)) for name in (START, END))
    if start is not None and end is not None and start >= end:
        raise UsageError(f"{START} is {start:g} and {END} {end:g}: the part ends before it begins")
    return SchedulePart(start, end)


def _share(name: str, given: object) -> float | None:
    if given is None:
        return None
    share = number(name, given)
    if not 0.0 < share < 1.0:
        raise UsageError(
            f"{name} is {given!r}: a number above 0 and below 1 is wanted, a share of the schedule"
        )
    return share


def with_noisy_latents(manifest: Manifest, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run with ``denoising_start``; its latents may be called ``image``, as in diffusers.

    Args:
        manifest: The bundle's.
        options: The call's.

    Raises:
        UsageError: There are no latents, or something beside them that begins otherwise.
    """
    given = dict(options)
    image = given.get("image")
    if isinstance(image, np.ndarray) and image.ndim == _LATENT_AXES and given.get("latents") is None:
        given["latents"] = given.pop("image")
    for name in ("image", "mask_image", "expand", "strength", "variation"):
        if given.get(name) is not None:
            raise UsageError(
                f"{START} and {name} are given: the run goes on from latents that are noisy already"
            )
    latents = given.get("latents")
    if latents is None:
        raise UsageError(
            f"{START} is {given[START]!r}, and no latents are given: it wants those that a run with "
            f"{END} and output_type='latent' ended with"
        )
    shape = getattr(latents, "shape", ())
    if len(shape) == _LATENT_AXES:
        for name, size in zip(("height", "width"), shape[2:], strict=True):
            given.setdefault(name, int(size) * manifest.latents.factor)
    return given
