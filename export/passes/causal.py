"""Pass: a constant triangular mask becomes the attention's own causal mask.

The exporter writes CLIP's causal mask out as a boolean tensor, expanded to the batch. A kernel that knows
that it is causal reads no mask and skips the keys that no query sees.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sdrt.export.passes.attention import attentions
from sdrt.export.passes.nodes import drop_unused, integer, used


def recognise_causal_masks(model: ir.Model) -> int:
    """Drop, in place, each boolean mask that is a lower triangle and set ``is_causal``; return how many."""
    found = 0
    for node in attentions(model):
        mask = used(node, 3)
        if mask is None or integer(node, "is_causal") or not _is_triangle(_constant(mask)):
            continue
        node.replace_input_with(3, None)
        node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
        found += 1
    drop_unused(model)
    return found


def _constant(value: ir.Value) -> NDArray[np.bool_] | None:
    """What a boolean value is known to be, up to repeats along its leading axes."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Expand" and producer.inputs[0] is not None:
        return _constant(producer.inputs[0])
    tensor = value.const_value
    if producer is not None or tensor is None or tensor.dtype != ir.DataType.BOOL:
        return None
    numbers: NDArray[np.bool_] = tensor.numpy()
    return numbers


def _is_triangle(mask: NDArray[np.bool_] | None) -> bool:
    """Whether query i sees exactly the keys up to i. A broadcast last axis cannot be one."""
    if mask is None or mask.ndim < 2 or min(mask.shape[-2:]) < 2:
        return False
    return bool((mask == np.tril(np.ones(mask.shape[-2:], bool))).all())
