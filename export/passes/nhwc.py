"""Pass: channels last, from the first convolution to the last.

A value [N, C, …] that has a twin [N, …, C] is computed as that twin alone. The graph is gone through in its
order; an operator's rule gives its result's twin from its operands' twins, and only where a node without a
rule reads such a value is it turned back, by one Transpose. The graph's own inputs and outputs keep their
layout. Which operators have kernels for this layout is the caller's to say: its rules make the
first twins, those here carry them on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import onnx_ir as ir

from sdrt.export.passes.nodes import (
    Inserter,
    constant_ints,
    drop_unused,
    integer,
    owner,
    replace,
    same_size,
    static,
    used,
)

ELEMENTWISE: Final = frozenset({"Add", "Sub", "Mul", "Div", "Sigmoid", "Cast"})


def to_last(rank: int) -> list[int]:
    """The permutation [N, C, …] → [N, …, C]."""
    return [0, *range(2, rank), 1]


def to_first(rank: int) -> list[int]:
    """The permutation [N, …, C] → [N, C, …]."""
    return [0, rank - 1, *range(1, rank - 1)]


def rank_of(value: ir.Value) -> int | None:
    """How many axes a value has; None where that is not known."""
    return None if value.shape is None else len(value.shape)


class ChannelsLast:
    """The values that have a twin with the channels last."""

    def __init__(self) -> None:
        self._last: dict[ir.Value, ir.Value] = {}
        self._moved: dict[ir.Node, ir.Value] = {}  # node → its output, which is computed as a twin now

    def twin_of(self, value: ir.Value | None) -> ir.Value | None:
        """The twin of a value, if it has one."""
        return None if value is None else self._last.get(value)

    def of(self, value: ir.Value, build: Inserter, label: str) -> ir.Value:
        """The twin of a value of known rank; it is made in front of the builder's anchor if there is none."""
        if value not in self._last:
            self._last[value] = _unsqueezed(value, build, label) or _transposed(value, build, label)
        return self._last[value]

    def moved(self, node: ir.Node) -> bool:
        """Whether a node's output is computed as a twin."""
        return node in self._moved

    def move(self, node: ir.Node, twin: ir.Value, *inner: ir.Node) -> None:
        """The twin is what the node computes; ``inner`` are nodes that it computes too, unseen by others.

        The rank of the node's output must be known.
        """
        output = node.outputs[0]
        self._last[output] = twin
        for part in (*inner, node):
            self._moved[part] = part.outputs[0]
        if output.shape is not None:
            twin.shape = ir.Shape([output.shape[axis] for axis in to_last(len(output.shape))])

    def exchange(self, old: ir.Value, new: ir.Value) -> None:
        """Another value takes the place of a twin."""
        old.replace_all_uses_with(new)
        self._last |= {value: new for value, twin in self._last.items() if twin is old}

    def finish(self) -> None:
        """Turn back what nodes that stay read, and the graph's outputs."""
        for node, value in reversed(self._moved.items()):
            stays = any(user not in self._moved for user in value.consumers())
            if value in self._last and (stays or value.is_graph_output()):
                twin, build = self._last[value], Inserter(node, str(value.name))
                perm = {"perm": to_first(rank_of(value) or 0)}
                replace(node, build.op("Transpose", [twin], "channels_first", value.dtype, perm))


Rule = Callable[[ir.Node, ChannelsLast], None]


def move_channels_last(model: ir.Model, rules: Mapping[str, Rule]) -> None:
    """Compute in place as much as the rules allow with the channels last.

    Args:
        model: A graph with shapes.
        rules: Operator of ONNX → what makes its result's twin with `ChannelsLast.move`, or leaves it.
    """
    layout = ChannelsLast()
    every = {**CARRIED, **rules}
    for node in list(model.graph):
        if not node.domain and node.op_type in every and not layout.moved(node):
            every[node.op_type](node, layout)
    layout.finish()
    drop_unused(model)


def inserter(node: ir.Node) -> Inserter:
    """For nodes that make the twin of a node's output."""
    return Inserter(node, f"{node.outputs[0].name}.channels_last")


def _transposed(value: ir.Value, build: Inserter, label: str) -> ir.Value:
    shape = value.shape
    if shape is None:
        raise ValueError(f"{value.name} has no rank")
    order = to_last(len(shape))
    turned = ir.Shape([shape[axis] for axis in order])
    return build.op("Transpose", [value], label, value.dtype, {"perm": order}, shape=turned)


def _unsqueezed(value: ir.Value, build: Inserter, label: str) -> ir.Value | None:
    """[N, 1, …, C] of a value [N, C, 1, …] that was made from [N, C]: without moving anything."""
    node, rank = value.producer(), rank_of(value)
    if node is None or node.op_type != "Unsqueeze" or rank is None or rank < 3:
        return None
    source, axes = used(node, 0), used(node, 1)
    if source is None or axes is None or constant_ints(axes) != [*range(2, rank)]:
        return None
    inner = build.constant([*range(1, rank - 1)], f"{label}_axes", ir.DataType.INT64)
    return build.op("Unsqueeze", [source, inner], label, value.dtype)


def _elementwise(node: ir.Node, layout: ChannelsLast) -> None:
    rank = rank_of(node.outputs[0])
    operands = [value for value in node.inputs if value is not None]
    if rank is None or not any(layout.twin_of(value) for value in operands):
        return
    ranks = [rank_of(value) for value in operands]
    if not set(ranks) <= {0, rank}:  # a vector would be laid along another axis
        return
    build = inserter(node)
    turned = [
        layout.of(value, build, f"operand_{index}") if size else value
        for index, (value, size) in enumerate(zip(operands, ranks, strict=True))
    ]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    layout.move(node, build.op(node.op_type, turned, "result", node.outputs[0].dtype, attributes))


def _concat(node: ir.Node, layout: ChannelsLast) -> None:
    rank = rank_of(node.outputs[0])
    operands = [value for value in node.inputs if value is not None]
    if rank is None or integer(node, "axis") != 1 or {*map(rank_of, operands)} != {rank}:
        return
    if not any(layout.twin_of(value) for value in operands):
        return
    build = inserter(node)
    turned = [layout.of(value, build, f"operand_{index}") for index, value in enumerate(operands)]
    layout.move(node, build.op("Concat", turned, "result", node.outputs[0].dtype, {"axis": rank - 1}))


def _resize(node: ir.Node, layout: ChannelsLast) -> None:
    data, output = node.inputs[0], node.outputs[0]
    twin, rank = layout.twin_of(data), rank_of(output)
    fits = node.attributes.get_string("mode", "nearest") == "nearest" and "axes" not in node.attributes
    if twin is None or rank is None or used(node, 1) is not None or not fits:
        return
    build = inserter(node)
    vectors = [
        None if value is None else _reordered(value, to_last(rank), build, name)
        for value, name in ((used(node, 2), "scales"), (used(node, 3), "sizes"))
    ]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    inputs = [twin, None, *(vectors if vectors[1] is not None else vectors[:1])]
    layout.move(node, build.op("Resize", inputs, "result", output.dtype, attributes))


def _reordered(vector: ir.Value, order: Sequence[int], build: Inserter, label: str) -> ir.Value:
    """A vector of one number per axis, for axes in another order."""
    tensor = vector.const_value if vector.is_initializer() else None
    if tensor is not None and vector.dtype is not None:
        return build.constant(tensor.numpy()[list(order)], label, vector.dtype)
    axes = build.constant([*order], f"{label}_order", ir.DataType.INT64)
    return build.op("Gather", [vector, axes], label, vector.dtype, shape=vector.shape)


def _transpose(node: ir.Node, layout: ChannelsLast) -> None:
    data, output = node.inputs[0], node.outputs[0]
    perm = [*node.attributes.get_ints("perm", ())]
    if data is None or len(perm) < 3:
        return
    twin = layout.twin_of(data)
    if twin is not None and perm == to_last(len(perm)):
        output.replace_all_uses_with(twin, replace_graph_outputs=False)
        if output.is_graph_output():
            replace(node, inserter(node).op("Identity", [twin], "result", output.dtype))
        else:
            owner(node).remove(node, safe=True)
    elif twin is None and perm == to_first(len(perm)):
        layout.move(node, data)


def _reshape(node: ir.Node, layout: ChannelsLast) -> None:
    """Pixels that become one axis, or that one axis becomes."""
    data, shape, output = node.inputs[0], used(node, 1), node.outputs[0]
    twin = layout.twin_of(data)
    if data is None or shape is None or twin is None or data.shape is None or output.shape is None:
        return
    ranks, channels = (len(data.shape), len(output.shape)), static(data, 1)
    if channels is None or channels != static(output, 1) or not same_size(data.shape[0], output.shape[0]):
        return
    build = inserter(node)
    if ranks == (4, 3):
        sizes = build.constant([0, -1, channels], "sizes", ir.DataType.INT64)
        layout.move(node, build.op("Reshape", [twin, sizes], "result", output.dtype))
    elif ranks == (3, 4) and (integer(node, "allowzero") or 0 not in (constant_ints(shape) or [0])):
        sizes = _reordered(shape, to_last(4), build, "sizes")
        layout.move(node, build.op("Reshape", [twin, sizes], "result", output.dtype, {"allowzero": 1}))


def _shape(node: ir.Node, layout: ChannelsLast) -> None:
    """Sizes are the same numbers, in another order."""
    data, output = node.inputs[0], node.outputs[0]
    twin, rank = layout.twin_of(data), rank_of(data) if data is not None else None
    if twin is None or rank is None:
        return
    build = inserter(node)
    sizes = build.op("Shape", [twin], "sizes", output.dtype, shape=ir.Shape([rank]))
    wanted = to_first(rank)[integer(node, "start") : integer(node, "end", rank)]
    axes = build.constant(wanted, "axes", ir.DataType.INT64)
    replace(node, build.op("Gather", [sizes, axes], "result", output.dtype))


CARRIED: Final[dict[str, Rule]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    "Concat": _concat,
    "Resize": _resize,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Shape": _shape,
}
