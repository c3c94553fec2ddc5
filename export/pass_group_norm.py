"""Pass: group normalisation in fp32 as an instance normalisation, for ONNX Runtime's CPU provider.

That provider has no kernel for `GroupNormalization`: when it loads a graph it puts the operator's definition,
some twenty small nodes, in its place, each of which reads and writes the whole activation. A group is an
instance once its channels are folded into the rows, and `InstanceNormalization` has a kernel: evaluating the
embedded U-Net takes 0.89 of the time (benchmarks/NOTES.md). The definition's nodes also stood behind all the
others in the order of execution, so that the range audit had to widen all weights before the first
normalisation ran (5 GB of a full-size U-Net).

Half precision is left alone: those graphs are for GPUs, whose libraries know the operator.
"""

from __future__ import annotations

import onnx_ir as ir

from sdrt.export.pass_nodes import Inserter, integer, replace
from sdrt.runtime.errors import SdrtError


def write_out_group_norms(model: ir.Model) -> int:
    """Replace each float32 `GroupNormalization` in place; return how many there were.

    Before opset 21 the operator had one scale per group, and nothing is done.

    Raises:
        SdrtError: One has no rank, or lacks an input.
    """
    if model.graph.opset_imports.get("", 0) < 21:
        return 0
    nodes = [
        node
        for node in model.graph.all_nodes()
        if node.op_type == "GroupNormalization"
        and not node.domain
        and node.outputs[0].dtype == ir.DataType.FLOAT
    ]
    for node in nodes:
        _write_out(node)
    return len(nodes)


def _write_out(node: ir.Node) -> None:
    data, scale, bias = node.inputs
    if data is None or scale is None or bias is None or data.shape is None:
        raise SdrtError(f"group normalisation {node.name} lacks an input or its shape")
    build = Inserter(node, str(node.outputs[0].name))
    floats, integers = ir.DataType.FLOAT, ir.DataType.INT64
    groups = integer(node, "num_groups")
    rows = build.op("Reshape", [data, build.constant([0, groups, -1], "rows", integers)], "grouped", floats)
    one = build.constant([1.0] * groups, "one", floats)
    none = build.constant([0.0] * groups, "none", floats)
    epsilon = {"epsilon": node.attributes.get_float("epsilon", 1e-5)}
    normal = build.op("InstanceNormalization", [rows, one, none], "normal", floats, epsilon)
    shape = build.op("Shape", [data], "shape", integers)
    back = build.op("Reshape", [normal, shape], "ungrouped", floats)
    axes = build.constant([*range(1, len(data.shape) - 1)], "axes", integers)
    columns = [build.op("Unsqueeze", [v, axes], n, floats) for v, n in ((scale, "scale"), (bias, "bias"))]
    scaled = build.op("Mul", [back, columns[0]], "scaled", floats)
    replace(node, build.op("Add", [scaled, columns[1]], "shifted", floats))
