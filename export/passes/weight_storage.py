"""Pass: store float32 weights as float16 and widen them when the graph is loaded.

A checkpoint whose weights were saved in fp16 loses nothing by it, and the file is half as large. ONNX
Runtime folds the Cast away at load time; the arithmetic stays in float32.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

STORED: Final = ".fp16"  # ends the names of what is stored so
MIN_ELEMENTS: Final = 64  # below this a Cast node is larger than what it saves


def store_weights_in_fp16(model: ir.Model) -> int:
    """Replace each large float32 initializer that fp16 holds exactly by an fp16 one and a Cast.

    Weights that would change are left alone, so the outputs are equal bit for bit.

    Returns:
        How many initializers were narrowed.
    """
    graph = model.graph
    narrowed = 0
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < MIN_ELEMENTS:
            continue
        wide = tensor.numpy()
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float16)
        if not np.array_equal(narrow.astype(np.float32), wide):
            continue
        stored = ir.Value(
            name=f"{name}{STORED}",
            type=ir.TensorType(ir.DataType.FLOAT16),
            shape=ir.Shape(wide.shape),
            const_value=ir.tensor(narrow, name=f"{name}{STORED}"),
        )
        cast = ir.node("Cast", [stored], {"to": int(ir.DataType.FLOAT)})
        value.replace_all_uses_with(cast.outputs[0])
        del graph.initializers[name]
        cast.outputs[0].name = name
        cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        cast.outputs[0].shape = ir.Shape(wide.shape)
        graph.register_initializer(stored)
        graph.insert_before(graph[0], cast)
        narrowed += 1
    return narrowed
