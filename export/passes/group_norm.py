"""Pass: group normalisation in fp32 as an instance normalisation, for ONNX Runtime's CPU provider.

That provider has no kernel for `GroupNormalization`: when it loads a graph it puts the operator's definition,
some twenty small nodes, in its place, each of which reads and writes the whole activation. A group is an
instance once its channels are folded into the rows, and `InstanceNormalization` has a kernel: evaluating the
embedded U-Net takes 0.89 of the time (benchmarks/NOTES.md). The definition's nodes also stood behind all the
others in the order of execution, so that the range audit had to widen all weights before the first
normalisation ran (5 GB of a full-size U-Net).

Half precision is left alone: those graphs are for GPUs, whose libraries know the operator.
`restore_group_norms` undoes it for such a library: ONNX Runtime's CUDA provider has no kernel for
`InstanceNormalization` of the opsets that are exported.
"""

from __future__ import annotations

import onnx_ir as ir

from sdrt.export.passes.nodes import Inserter, constant_ints, integer, length, only_user, replace, static
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


def restore_group_norms(model: ir.Model) -> int:
    """Make each group normalisation one node again, in place, that `write_out_group_norms` wrote out.

    What is left over of the old nodes has no users; `drop_unused` removes it. Returns how many there were.
    Before opset 21 the operator had one scale per group, and nothing is done.
    """
    if model.graph.opset_imports.get("", 0) < 21:
        return 0
    nodes = [node for node in model.graph if node.op_type == "InstanceNormalization" and not node.domain]
    return sum(map(_restore, nodes))


def _restore(normal: ir.Node) -> bool:
    """Reshape → normal → Reshape → Mul by one factor per channel → Add of one number per channel."""
    rows = normal.inputs[0].producer() if normal.inputs[0] else None
    back = only_user(normal)
    scaled = only_user(back) if back is not None else None
    shifted = only_user(scaled) if scaled is not None else None
    if rows is None or back is None or scaled is None or shifted is None:
        return False
    kinds = [node.op_type for node in (rows, back, scaled, shifted)]
    data, groups = rows.inputs[0], length(normal.inputs[1])
    if kinds != ["Reshape", "Reshape", "Mul", "Add"] or not groups or data is None or data.shape is None:
        return False
    rank = len(data.shape)
    scale, bias = _per_channel(scaled, back, rank), _per_channel(shifted, scaled, rank)
    output = shifted.outputs[0]
    one_row_each = [0, groups, -1]
    if not scale or not bias or constant_ints(rows.inputs[1]) != one_row_each or not _plain(normal, groups):
        return False
    channels = static(data, 1)
    if not channels or {static(output, 1), length(scale), length(bias)} != {channels}:
        return False
    attributes = {"epsilon": normal.attributes.get_float("epsilon", 1e-5), "num_groups": groups}
    build = Inserter(shifted, str(output.name))
    inputs = [data, scale, bias]
    replace(shifted, build.op("GroupNormalization", inputs, "whole", output.dtype, attributes))
    return True


def _plain(normal: ir.Node, groups: int) -> bool:
    """Whether an instance normalisation, one instance per group, scales by one and adds nothing."""
    tensors = [value.const_value if value is not None else None for value in normal.inputs[1:3]]
    return all(
        tensor is not None and tensor.shape == (groups,) and (tensor.numpy() == number).all()
        for tensor, number in zip(tensors, (1.0, 0.0), strict=True)
    )


def _per_channel(node: ir.Node, before: ir.Node, rank: int) -> ir.Value | None:
    """The vector that a node combines the result of another, of that rank, with: one number per channel."""
    other = next((value for value in node.inputs if value is not before.outputs[0]), None)
    producer = other.producer() if other is not None else None
    if producer is None or producer.op_type != "Unsqueeze":
        return None
    second = [*range(1, rank - 1)]  # [C, 1, …], which lies along the second axis
    return producer.inputs[0] if constant_ints(producer.inputs[1]) == second else None
