"""Pass: a graph of low precision with float32 arithmetic: the same nodes and the same (rounded) weights.

ONNX Runtime's CPU provider cannot run bfloat16, so the parity gate runs such a copy of a bfloat16 graph: it
checks the graph and the weights, not the arithmetic, and the report says so. The range audit runs one of an
fp16 graph, to see by how much a tensor would overflow.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import numpy as np
import onnx_ir as ir

LOW_PRECISION: Final = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_BF16: Final = (ir.DataType.BFLOAT16,)
_FP32: Final = ir.DataType.FLOAT


def widen_bfloat16(model: ir.Model) -> None:
    """Turn every bfloat16 tensor of the graph into float32, in place; weights keep their values."""
    widen(model, _BF16)


def widen(model: ir.Model, types: Collection[ir.DataType], *, in_run: bool = False) -> None:
    """Turn every tensor of the given types into float32, in place.

    Args:
        model: The graph; its weights keep their values.
        types: Which to widen.
        in_run: Leave the weights as they are stored and cast each where it is first used, so that no copy of
            all of them is ever in memory. They must not be folded when the graph is loaded, then.
    """
    low = frozenset(types)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in low and not in_run:
            value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=value.name)
            _widen_type(value, low)
    for node in model.graph.all_nodes():
        for output in node.outputs:
            _widen_type(output, low)
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.INT and name in ("to", "dtype"):
                if attribute.value in [int(kind) for kind in low]:
                    node.attributes[name] = ir.AttrInt64(name, int(_FP32))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in low:
                wide = attribute.value.numpy().astype(np.float32)
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(wide))
    for value in (*model.graph.inputs, *model.graph.outputs):
        _widen_type(value, low)
    if in_run:
        _cast_weights(model.graph, low)


def _widen_type(value: ir.Value, low: Collection[ir.DataType]) -> None:
    if value.dtype in low:
        value.type = ir.TensorType(_FP32)


def _cast_weights(graph: ir.Graph, low: Collection[ir.DataType]) -> None:
    """A Cast in front of the first user of each weight."""
    order = {node: position for position, node in enumerate(graph)}
    for value in list(graph.initializers.values()):
        if value.dtype not in low or not value.uses():
            continue
        first = min((user for user, _ in value.uses()), key=order.__getitem__)
        cast = ir.node("Cast", [value], {"to": int(_FP32)})
        wide = cast.outputs[0]
        wide.name, wide.type, wide.shape = f"{value.name}.wide", ir.TensorType(_FP32), value.shape
        value.replace_all_uses_with(wide)
        cast.replace_input_with(0, value)
        graph.insert_before(first, cast)
