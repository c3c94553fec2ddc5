"""The weight map: which initializers of a bundle's graphs hold which tensor of the checkpoint.

``weights.json`` lies beside the manifest, which names it. A program that changes weights (a LoRA, a refit)
finds in it where to put them, without knowing how the export named and turned them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.json_records import JsonReader
from sdrt.runtime.bundle.limits import MAX_WEIGHT_MAP_BYTES
from sdrt.runtime.errors import BundleError
from sdrt.runtime.system.untrusted import parse_json, read_limited

WEIGHTS_NAME: Final = "weights.json"
# What may have happened to a tensor between the checkpoint and the graph.
CONSTANT_FOLDING: Final = "constant_folding"  # the exporter turned it round, or looked all of it up
WEIGHT_STORAGE: Final = "weight_storage"  # it is stored as float16, and a Cast behind it widens it
SHARED: Final = "deduplication"  # one initializer holds several tensors, which were equal
PASSES: Final = (CONSTANT_FOLDING, WEIGHT_STORAGE, SHARED)


@dataclass(frozen=True, slots=True)
class Holder:
    """One initializer that holds a tensor: transposed, then of ``shape``, rounded to ``dtype``.

    Attributes:
        component: The component whose graph it is in.
        initializer: Its name there.
        dtype: The type of number that it is stored in.
        shape: Its shape in the graph: the transposed tensor's, but for axes of 1 that a constant may have
        gained.
        permutation: Axis i of the transposed tensor is axis ``permutation[i]`` of the checkpoint's.
        passes: What was done to it, of `PASSES`.
    """

    component: str
    initializer: str
    dtype: str
    shape: tuple[int, ...]
    permutation: tuple[int, ...]
    passes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """One tensor of the checkpoint.

    Attributes:
        dtype: Its type of number in the checkpoint's file.
        shape: Its shape there.
        held_by: Each initializer that holds it.
        absent: Why there is none; empty where there is one.
    """

    dtype: str
    shape: tuple[int, ...]
    held_by: tuple[Holder, ...] = ()
    absent: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError if a holder cannot hold it."""
        for holder in self.held_by:
            turned = holder.permutation
            if sorted(turned) != list(range(len(self.shape))):
                raise ValueError(f"{holder.initializer} permutes its axes as {turned}")
            if _without_ones(holder.shape) != _without_ones([self.shape[axis] for axis in turned]):
                raise ValueError(f"{holder.initializer} has another shape than its tensor")


@dataclass(frozen=True, slots=True)
class WeightMap:
    """Subfolder of the checkpoint → name of the tensor, as the file there has it → where it is."""

    tensors: dict[str, dict[str, CheckpointTensor]]

    def to_json(self) -> str:
        """As JSON text, a line for each tensor."""
        folders = [
            f"{json.dumps(folder)}: {{\n"
            + ",\n".join(_line(*item) for item in sorted(tensors.items()))
            + "\n}"
            for folder, tensors in self.tensors.items()
        ]
        return '{"tensors": {\n' + ",\n".join(folders) + "\n}}\n"


def read_weight_map(bundle: Bundle) -> WeightMap:
    """The weight map of a bundle.

    Raises:
        BundleError: It cannot be read, is damaged, or larger than any.
    """
    entry = bundle.manifest.weights
    try:
        document = parse_json(read_limited(bundle.file(entry), MAX_WEIGHT_MAP_BYTES))
    except ValueError as error:
        raise BundleError(f"{entry.path} of {bundle.path} cannot be used: {error}; export it again") from None
    except OSError as error:
        raise BundleError(f"{entry.path} of {bundle.path} cannot be read: {error.strerror}") from error
    return JsonReader(entry.path, "export the bundle again").read(WeightMap, document)


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _line(name: str, tensor: CheckpointTensor) -> str:
    return f"{json.dumps(name)}: {json.dumps(asdict(tensor), separators=(',', ':'))}"
