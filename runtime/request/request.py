"""One call, checked against a bundle and spread over its images: what `Pipeline.draw` takes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Unpack

import numpy as np

from sdrt.runtime.bundle.families.told import Told
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.request.depth import DepthMap
from sdrt.runtime.request.loras import LoraSet, LoraUse, lora_recipe
from sdrt.runtime.request.output import (
    WITHOUT_PICTURES,
    CallbackOptions,
    Callbacks,
    OutputType,
    build_callbacks,
)
from sdrt.runtime.request.picture import PictureTask, draws_at_start
from sdrt.runtime.request.recipes import GIVEN
from sdrt.runtime.request.sampling import Sampling
from sdrt.runtime.samplers.noise import Rng

_DLPACK_CPU: Final = 1  # kDLCPU of dlpack.h: a tensor in main memory, such as PyTorch's on the CPU


@dataclass(frozen=True, slots=True)
class Continued:
    """A run that another one goes on from.

    Attributes:
        draws: What it took of each image's stream of noise.
        rows: How many rows it ran.
    """

    draws: int = 0
    rows: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What a call asks, with defaults filled in; every list has an entry for each of its N images.

    It is made by `Pipeline.request`, and may be drawn any number of times, each time with the same pictures,
    by any pipeline of the same bundle.

    Attributes:
        manifest: The bundle's that it was checked against.
        conditions: What each image is drawn from, as the bundle's encoder takes it.
        negatives: What each image is moved away from, as the bundle's encoder takes it.
        texts: What the recipe of each image says of the two.
        seeds: Seeds of the noise.
        height: Height that the model draws, in pixels.
        width: Width that the model draws, in pixels.
        sampling: Table and guidance.
        rng: The kind of generator that gives the noise.
        latents: Noise that was given: a NumPy array or device array; None for noise from the seeds.
        latents_scale: What ``latents`` are multiplied with to be x; None for the table's own.
        latents_given: Whether the caller brought them.
        told: What the U-Net is told in numbers, such as SDXL's original_size; else empty.
        picture: What the run starts from, if that is a picture.
        depth: The depth map at the latents' size, for a U-Net that reads one.
        embeddings: Textual inversions that must be loaded, name → SHA-256 of the file.
        loras: The LoRAs of each image, read.
        lora_partial: Whether what has no place in the model was left out of them.
        output_type: What is given back.
        callbacks: The caller's functions.
        continues: Another run, which left ``latents`` as they are for this one; None for a run of its own.
        refinement: What a second bundle, the refiner, draws of the latents that this one ends with; without
            latents and callbacks yet, which it gets from here.
    """

    manifest: Manifest = field(repr=False)
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
    told: Told
    picture: PictureTask | None
    depth: DepthMap | None
    embeddings: Mapping[str, Any]
    loras: list[tuple[LoraUse, ...]] = field(repr=False)
    lora_partial: bool
    output_type: OutputType
    callbacks: Callbacks
    continues: Continued | None = None
    refinement: Request | None = None

    @property
    def draws_at_start(self) -> tuple[str, ...]:
        """See `sdrt.runtime.request.picture.draws_at_start`; a run that continues another draws nothing."""
        return () if self.continues is not None else draws_at_start(self.picture, self.manifest)

    @property
    def first_draw(self) -> int:
        """The number of the first row's draw in each image's stream."""
        return len(self.draws_at_start) if self.continues is None else self.continues.draws

    @property
    def guided(self) -> bool:
        """At a guidance scale of 1 or less the unconditional half would not be used: it is left out."""
        return self.sampling.guided

    @property
    def rows(self) -> int:
        """Rows of the U-Net's batch that each picture takes."""
        return self.manifest.record.guided_rows if self.guided else 1

    @property
    def decodes(self) -> bool:
        """Whether pictures are wanted, not only latents."""
        return self.output_type not in WITHOUT_PICTURES

    @property
    def blends(self) -> bool:
        """Whether the step kernel puts the kept latents back after each step.

        A U-Net that reads mask and picture does without it, as in diffusers.
        """
        masked = self.picture is not None and self.picture.canvas.mask is not None
        return masked and not self.manifest.reads_mask

    @property
    def draws_noise_on_device(self) -> bool:
        """Whether each step draws its noise there; PyTorch's CPU generator runs on the host alone."""
        return self.sampling.table.uses_noise and self.rng == "philox"

    @property
    def lora_sets(self) -> list[LoraSet]:
        """What the model's weights are changed by for each image."""
        return [LoraSet.of(uses) for uses in self.loras]

    def with_callbacks(self, **callbacks: Unpack[CallbackOptions]) -> Request:
        """The same request with other functions to call; those that are not named are not called.

        Raises:
            UsageError: One is no function, or asks for what cannot be given.
        """
        return replace(self, callbacks=build_callbacks(callbacks))

    def recipes(self) -> list[dict[str, Any]]:
        """What draws each image, as plain data."""
        shared: dict[str, Any] = {
            "height": self.height,
            "width": self.width,
            **self.sampling.recipe,
            "rng": self.rng,
            **self.told,
            **({} if self.picture is None else self.picture.recipe),
            **({} if self.depth is None else self.depth.recipe),
        }
        if self.latents_given:
            shared["latents"] = GIVEN  # the seed alone does not give this picture
        return [
            {**text, "seed": seed, **shared, **lora_recipe(uses, partial=self.lora_partial)}
            for text, seed, uses in zip(self.texts, self.seeds, self.loras, strict=True)
        ]


def is_device_array(given: object) -> bool:
    """Whether an object says that it lies in some device's memory (a NumPy array lies in the host's)."""
    if isinstance(given, np.ndarray):
        return False
    if hasattr(given, "__cuda_array_interface__"):
        return True
    place = getattr(given, "__dlpack_device__", None)
    return place is not None and int(place()[0]) != _DLPACK_CPU
