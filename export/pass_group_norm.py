"""Pass: group normalisation as an instance normalisation, for the range audit on ONNX Runtime's CPU provider.

That provider has no kernel for `GroupNormalization`: when it loads a graph it puts the operator's definition,
some twenty small nodes, in its place, and behind all the others in its order of execution. In the audit all
weights would then be widened before the first normalisation ran (5 GB of a full-size U-Net).
`InstanceNormalization` has a kernel, and a group is an instance once its channels are folded into the rows.
For drawing it is no faster (the embedded U-Net, interleaved: 1.01 times the time).
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
