"""Pass: a bfloat16 graph with float32 arithmetic, for machines that have no bfloat16.

ONNX Runtime's CPU provider cannot run bfloat16, so the parity gate runs this copy: the same nodes and the
same (rounded) weights, every tensor widened. It checks the graph and the weights, not the arithmetic; the
report says so.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_BF16 = ir.DataType.BFLOAT16
_FP32 = ir.DataType.FLOAT


def widen_bfloat16(model: ir.Model) -> None:
    """Turn every bfloat16 tensor of the graph into float32, in place; weights keep their values."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == _BF16:
            value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=value.name)
        _widen_type(value)
    for value in (*model.graph.inputs, *model.graph.outputs):
        _widen_type(value)
    for node in model.graph.all_nodes():
        for output in node.outputs:
            _widen_type(output)
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.INT and name in ("to", "dtype"):
                if attribute.value == int(_BF16):
                    node.attributes[name] = ir.AttrInt64(name, int(_FP32))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == _BF16:
                wide = attribute.value.numpy().astype(np.float32)
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(wide))


def _widen_type(value: ir.Value) -> None:
    if value.dtype == _BF16:
        value.type = ir.TensorType(_FP32)
