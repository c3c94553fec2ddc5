"""A batch cut into equal parts that are evaluated at the same time, each on its share of the threads.

Entries of a batch do not depend on each other, and fewer threads wait less for each other: guided steps take
0.8 to 0.9 of the time on two cores.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from numpy.typing import NDArray

from sdrt.runtime.bundle.families.record import ComponentSpec

PARTS: Final = 2

Array = NDArray[Any]
Arrays = dict[str, Array]


def parts_of(batch: int, threads: int) -> int:
    """Into how many parts a batch is cut: `PARTS`, or 1 where batch or threads cannot be shared evenly."""
    return PARTS if batch % PARTS == 0 and threads % PARTS == 0 else 1


def batch_parts(
    spec: ComponentSpec,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Array],
    axes: Collection[str],
    parts: int,
) -> list[tuple[Arrays, Arrays]]:
    """Views of each part's inputs and outputs; what is not by entries of the batch stays whole in each.

    Args:
        spec: The component's inputs and outputs.
        inputs: The whole batch's, by name.
        outputs: The whole batch's, by name.
        axes: Names of first axes that count the entries of the batch.
        parts: How many; the batch is a multiple of it.
    """
    by_entry = {entry.name for entry in (*spec.inputs, *spec.outputs) if entry.shape[0] in axes}

    def part(arrays: Mapping[str, Array], index: int) -> Arrays:
        found = dict(arrays)
        for name in by_entry & arrays.keys():
            each = len(arrays[name]) // parts
            found[name] = arrays[name][index * each : (index + 1) * each]
        return found

    return [(part(inputs, index), part(outputs, index)) for index in range(parts)]
