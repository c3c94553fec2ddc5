"""Group normalisation written out: the same numbers, whatever the rank and the groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.runs.onnx_runs import run

import tolerances
from sdrt.export.parity.components import compare
from sdrt.export.passes.group_norm import write_out_group_norms


def norm_model(shape: list[int], groups: int, dtype: int = TensorProto.FLOAT, opset: int = 23) -> ir.Model:
    generator = np.random.default_rng(0)
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    count = shape[1] if opset >= 21 else groups
    tensors = [numpy_helper.from_array(generator.standard_normal(count).astype(kind), n) for n in ("s", "b")]
    node = helper.make_node(
        "GroupNormalization", ["x", "s", "b"], ["y"], "norm", num_groups=groups, epsilon=1e-3
    )
    values = [helper.make_tensor_value_info(name, dtype, shape) for name in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    model: ir.Model = ir.from_proto(proto)
    return model


@pytest.mark.parametrize(
    ("shape", "groups"), [([2, 8, 5, 3], 4), ([1, 6, 4], 1), ([2, 4, 3, 3], 4), ([2, 12, 2, 2, 2], 3)]
)
def test_the_numbers_are_those_of_the_operator(shape: list[int], groups: int, tmp_path: Path) -> None:
    feeds = {"x": (3 + 2 * np.random.default_rng(1).standard_normal(shape)).astype(np.float32)}
    model = norm_model(shape, groups)
    before = run(model, feeds, tmp_path)[0]
    assert write_out_group_norms(model) == 1
    assert "GroupNormalization" not in [node.op_type for node in model.graph]
    after = run(model, feeds, tmp_path)[0]
    assert compare(after, before)[0] <= tolerances.GROUP_NORM

    grouped = feeds["x"].astype(np.float64).reshape(shape[0], groups, -1)
    normal = grouped - grouped.mean(-1, keepdims=True)
    normal /= np.sqrt(normal.var(-1, keepdims=True) + 1e-3)
    scale, bias = (
        value.const_value.numpy().astype(np.float64).reshape(-1, *[1] * (len(shape) - 2))
        for name in ("s", "b")
        if (value := model.graph.initializers[name]).const_value is not None
    )
    assert compare(after, normal.reshape(shape) * scale + bias)[0] <= tolerances.GROUP_NORM


def test_half_precision_and_the_older_operator_are_left_alone() -> None:
    assert write_out_group_norms(norm_model([2, 8, 5, 3], 4, TensorProto.FLOAT16)) == 0
    assert write_out_group_norms(norm_model([2, 8, 5, 3], 4, opset=18)) == 0
