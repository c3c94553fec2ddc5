"""A bundle's weights with LoRA files merged into them: exact, and always from the bundle's own numbers.

Each sum is made in float32, file after file in the order of their SHA-256, so that the order in which they
were named does not matter; it is turned as the graph has it, and rounded once to the initializer's type.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.weight_map import SHARED, WEIGHT_STORAGE, Holder
from sdrt.runtime.errors import BundleError, UsageError
from sdrt.runtime.lora.changes import Change, Floats
from sdrt.runtime.lora.file import LoraFile
from sdrt.runtime.lora.names import TensorKey
from sdrt.runtime.lora.stored_weights import BFLOAT16, StoredWeights, stored_weights
from sdrt.runtime.system.side_by_side import SideBySide

_MAX_THREADS: Final = 4  # more wait for memory

Changes = Sequence[tuple[Change, float]]
Weights = dict[str, dict[str, NDArray[Any]]]


class _Job(NamedTuple):
    """One initializer that changes."""

    key: TensorKey
    holder: Holder


def merged_weights(
    bundle: Bundle, loras: Sequence[tuple[LoraFile, float]], components: Container[str] | None = None
) -> Weights:
    """What the initializers must hold that LoRA files change.

    Args:
        bundle: Opened; the files were read for its weight map.
        loras: The files with their weights, in any order; a file of weight 0 changes nothing.
        components: Those that are wanted; by default all.

    Returns:
        Component → initializer → its numbers, of the shape and type that it has in the graph: float16 and
        float32; bfloat16 as its bits in uint16. float32 for one that the weight map says is stored as float16
        since that lost nothing (`WEIGHT_STORAGE`): the sum need not fit into it, and what reads it is a Cast.

    Raises:
        BundleError: The bundle's weights cannot be read.
        UsageError: A sum does not fit into the graph's type, or a file changes one of several tensors that
            share an initializer.
    """
    stored = stored_weights(bundle)
    changes = changes_by_tensor(loras)
    jobs = [
        _Job(key, holder)
        for key in changes
        for holder in stored.map.tensors[key.folder][key.tensor].held_by
        if components is None or holder.component in components
    ]
    for job in jobs:
        _refuse_shared(stored, job)
    for component in {job.holder.component for job in jobs}:
        stored.open(bundle, component)  # once, before several threads ask for it
    merged: Weights = defaultdict(dict)

    def work(job: _Job) -> NDArray[Any]:
        return _merged(bundle, stored, job, changes[job.key])

    with SideBySide(work, jobs, min(_MAX_THREADS, os.cpu_count() or 1)) as working:
        for job, numbers in working.results().items():
            merged[job.holder.component][job.holder.initializer] = numbers
    return dict(merged)


def changes_by_tensor(loras: Sequence[tuple[LoraFile, float]]) -> Mapping[TensorKey, Changes]:
    """The changes of each tensor with their weights, in the order in which they are added."""
    changes: dict[TensorKey, list[tuple[Change, float]]] = defaultdict(list)
    for file, weight in sorted(loras, key=lambda entry: (entry[0].identity, entry[1])):
        if weight:
            for key, change in file.changes.items():
                changes[key].append((change, weight))
    return changes


def merged_tensor(base: Floats, changes: Changes) -> Floats:
    """A tensor of the checkpoint with its changes, in float32.

    Args:
        base: The tensor, whatever its order in memory; it stays as it is.
        changes: In the order in which they are added, at least one.
    """
    total = base
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused at the end
        for change, weight in changes:
            step = change.added(base, weight)
            step += total
            total = step
    return total


def _merged(bundle: Bundle, stored: StoredWeights, job: _Job, changes: Changes) -> NDArray[Any]:
    key, holder = job
    numbers, dtype = stored.numbers(bundle, holder.component, holder.initializer)
    if numbers.shape != holder.shape or dtype != holder.dtype:
        raise BundleError(
            f"{holder.initializer!r} of the {holder.component} is another one than the weight map says: "
            "export the bundle again"
        )
    shape = stored.map.tensors[key.folder][key.tensor].shape
    turned = [shape[axis] for axis in holder.permutation]
    back = np.argsort(holder.permutation)
    total = merged_tensor(numbers.reshape(turned).transpose(back), changes)
    inside = np.ascontiguousarray(total.transpose(holder.permutation)).reshape(holder.shape)
    rounded = _rounded(inside, "float32" if WEIGHT_STORAGE in holder.passes else dtype)
    largest = max(float(inside.max()), -float(inside.min())) if inside.size else 0.0
    kind = np.float16 if rounded.dtype == np.float16 else np.float32  # bfloat16 has float32's range
    limit = float(np.finfo(kind).max)
    if not largest <= limit:
        raise UsageError(
            f"with this LoRA {key.tensor} of the {key.folder} reaches {largest:g}, and {kind.__name__} "
            f"holds {limit:g}: give it a smaller weight"
        )
    return rounded


def _rounded(numbers: Floats, dtype: str) -> NDArray[Any]:
    """Rounded to the nearest, of two equally near ones to the even."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return numbers.astype(np.float16)
    if dtype == BFLOAT16:
        bits = numbers.view(np.uint32)
        return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)
    return numbers


def _refuse_shared(stored: StoredWeights, job: _Job) -> None:
    """An initializer that several tensors share cannot change for one of them."""
    key, holder = job
    if SHARED not in holder.passes:
        return
    others = [
        name
        for folder, tensors in stored.map.tensors.items()
        for name, tensor in tensors.items()
        for other in tensor.held_by
        if (other.component, other.initializer) == (holder.component, holder.initializer)
        and (folder, name) != key
    ]
    raise UsageError(
        f"the LoRA changes {key.tensor} of the {key.folder}, whose weights the bundle shares with "
        f"{others[0] if others else 'another tensor'}, since they were equal: merge it when you export "
        "(sd-export --lora)"
    )
