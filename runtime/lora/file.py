"""A LoRA file as it was read: what it changes of which tensor of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.bundle.families.record import Family
from sdrt.runtime.bundle.weight_map import WeightMap
from sdrt.runtime.errors import UsageError
from sdrt.runtime.lora.changes import Change
from sdrt.runtime.lora.content import Content, read_content
from sdrt.runtime.lora.families import refuse_other_family, said_family
from sdrt.runtime.lora.keys import by_layer
from sdrt.runtime.lora.kinds import BIAS, WEIGHT, Parts, Target, changes_of
from sdrt.runtime.lora.names import Layer, Layers, TensorKey
from sdrt.runtime.lora.numbered import is_numbered, numbered_layers
from sdrt.runtime.lora.peft_config import PEFT_PREFIX, PeftConfig, peft_configs
from sdrt.runtime.lora.words import words_in

NUMBERED: Final = "numbered pairs"
# How a file's keys begin → what people call its form.
_FORMATS: Final = {
    "lora_": "kohya",
    "lycoris_": "kohya",
    PEFT_PREFIX: "PEFT",
    "diffusion_model.": "ComfyUI",
    "model.diffusion_model.": "ComfyUI",
}


@dataclass(frozen=True, slots=True, eq=False)
class LoraFile:
    """A LoRA file that was read for a model.

    Attributes:
        path: The file.
        sha256: Of its bytes, in hex.
        format: What people call the form of its keys.
        changes: Tensor → what the file adds to it.
        left_out: Keys that found no place; none unless only a part was asked for.
        embeddings: Words of textual inversion that it brings → for each text encoder float32 [k, width].
        config: What was taken from a file of PEFT's beside it; empty where there was none.
    """

    path: Path
    sha256: str
    format: str
    changes: Mapping[TensorKey, Change]
    left_out: tuple[str, ...]
    embeddings: Mapping[str, tuple[NDArray[np.float32], ...]]
    config: str = ""

    @property
    def identity(self) -> str:
        """Another one for each file that changes a model otherwise."""
        return f"{self.sha256} {self.config}"


def read_lora(path: str | Path, weights: WeightMap, family: Family, *, partial: bool = False) -> LoraFile:
    """Read a LoRA file for a model.

    Args:
        path: A safetensors file in any of the forms that are about.
        weights: The model's weight map.
        family: The model's.
        partial: Leave out what has no place in the model, in place of refusing the file.

    Raises:
        UsageError: No such file, a pickle, damaged, too large, with NaN or infinity, for another family, or
            with keys that have no place in the model.
    """
    content = read_content(path)
    if words := refuse_other_family(content, weights):
        raise UsageError(f"{content.path} {words}: give a LoRA that was made for this model")
    reading = _Reading(content, weights, family)
    if not reading.changes:
        raise UsageError(f"{content.path} {_nothing_fits(content, reading)}")
    if reading.left and not partial:
        raise UsageError(
            f"{content.path}: {reading.reasons[reading.left[0]]} ({len(reading.left)} such of "
            f"{len(content.tensors)} keys); a LoRA that was made for this model has none such, and "
            "--lora-partial (partial=True) takes what fits"
        )
    return LoraFile(
        content.path,
        content.sha256,
        reading.format,
        reading.changes,
        tuple(reading.left),
        reading.embeddings,
        reading.config,
    )


class _Reading:
    """The way from a file's keys to changes."""

    def __init__(self, content: Content, weights: WeightMap, family: Family) -> None:
        self.content, self.weights = content, weights
        self.changes: dict[TensorKey, Change] = {}
        self.reasons: dict[str, str] = {}  # key that found no place → why
        self.config = ""
        words = words_in(content, weights, family)
        self.embeddings = {name: word.vectors for name, word in words.items()}
        of_words = {key for word in words.values() for key in word.keys}
        keys = [key for key in content.tensors if key not in of_words]
        if is_numbered(keys):
            self.format = NUMBERED
            self._read_numbered(keys)
        else:
            first = keys[0] if keys else ""
            names = (name for start, name in _FORMATS.items() if first.startswith(start))
            self.format = next(names, "diffusers")
            self._read_named(keys)

    @property
    def left(self) -> list[str]:
        """The keys that found no place, in the file's order."""
        return [key for key in self.content.tensors if key in self.reasons]

    def _read_numbered(self, keys: list[str]) -> None:
        try:
            layers, left = numbered_layers(keys, self.content.metadata, self.weights)
        except ValueError as error:
            raise UsageError(f"{self.content.path} cannot be read: {error}") from None
        for layer, parts in layers.items():
            self._add(layer, parts, None)
        self._leave(left)

    def _read_named(self, keys: list[str]) -> None:
        layers, left = by_layer(keys)
        self._leave(left)
        known = Layers(self.weights)
        by_peft = any(key.startswith(PEFT_PREFIX) for key in keys)
        configs = peft_configs(self.content.path, self.content.metadata, saved_by_peft=by_peft)
        self.config = repr(configs[PEFT_PREFIX]) if PEFT_PREFIX in configs else ""
        for name, parts in layers.items():
            layer = known.find(name)
            if layer is None:
                self._leave(parts.values())
                continue
            config = next(((start, one) for start, one in configs.items() if name.startswith(start)), None)
            self._add(layer, parts, config and _scale(self.content, name, parts, *config))

    def _add(self, layer: Layer, parts: Mapping[str, str], scale: float | None) -> None:
        tensors = {part: self.content.tensors[key] for part, key in parts.items()}
        try:
            found = {
                layer.tensor(name): change
                for name, change in changes_of(Parts(tensors, scale), self._target(layer))
            }
            if twice := found.keys() & self.changes.keys():
                raise ValueError(f"{next(iter(twice)).tensor} of the {layer.folder} is changed twice")
        except ValueError as error:
            first = next(iter(parts.values()))
            self.reasons.update(dict.fromkeys(parts.values(), f"the key {first!r} does not fit: {error}"))
            return
        self.changes.update(found)

    def _target(self, layer: Layer) -> Target:
        tensors = self.weights.tensors[layer.folder]
        keys = {name: layer.tensor(name).tensor for name in (WEIGHT, BIAS)}
        return Target({name: tensors[key].shape for name, key in keys.items() if key in tensors})

    def _leave(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.reasons[key] = f"the key {key!r} has no place in this model"


def _scale(
    content: Content, name: str, parts: Mapping[str, str], prefix: str, config: PeftConfig
) -> float | None:
    """Alpha over the rank by PEFT's configuration; None where it does not say alpha."""
    layer = name.removeprefix(prefix)
    for part in ("down", "hada_w1_b"):
        if part in parts and content.tensors[parts[part]].ndim:
            return config.scale(layer, content.tensors[parts[part]].shape[0] or 1)
    if any(part.startswith("lokr_") for part in parts):  # its factors may be whole and have no rank
        return config.scale(layer, config.rank_of(layer))
    return None


def _nothing_fits(content: Content, reading: _Reading) -> str:
    if not content.tensors:
        return "is empty: it holds no tensors"
    if not reading.reasons:
        return "holds embeddings alone"
    said = said_family(content)
    words = f"; its header says that it is for {said}" if said else ""
    return f"has nothing that this model can use: {next(iter(reading.reasons.values()))}{words}"
