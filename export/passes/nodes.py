"""What the passes share: new nodes beside an existing one, with names and types filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sdrt.runtime.errors import SdrtError

LAYER: Final = "layer"  # of a node's metadata: the path of the module that it computes a part of


class Inserter:
    """Makes nodes in front of ``anchor``, in the order of the calls; every name begins with ``prefix``.

    They are of the anchor's layer.
    A second pass over the same graph gives the same names, so a name in a range audit means the same tensor
    in the graph that the engine is built from.
    """

    def __init__(self, anchor: ir.Node, prefix: str) -> None:
        self.anchor, self.prefix = anchor, prefix
        self.graph = owner(anchor)

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        dtype: ir.DataType | None,
        attributes: Mapping[str, Any] | None = None,
        *,
        shape: ir.Shape | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Add one node with one output; ``name`` becomes ``prefix.name`` for both."""
        full = f"{self.prefix}.{name}"
        value = ir.Value(name=full, shape=shape, type=None if dtype is None else ir.TensorType(dtype))
        node = ir.node(op_type, inputs, attributes, outputs=[value], name=full, domain=domain)
        if layer := self.anchor.metadata_props.get(LAYER):
            node.metadata_props[LAYER] = layer
        self.graph.insert_before(self.anchor, node)
        return value

    def constant(self, array: ArrayLike, name: str, dtype: ir.DataType) -> ir.Value:
        """Add an initializer of the given type."""
        numbers = np.asarray(array, dtype.numpy())
        full = f"{self.prefix}.{name}"
        value = ir.Value(
            name=full,
            type=ir.TensorType(dtype),
            shape=ir.Shape(numbers.shape),
            const_value=ir.tensor(numbers, dtype=dtype, name=full),
        )
        self.graph.register_initializer(value)
        return value


def owner(node: ir.Node) -> ir.Graph:
    """The graph that a node stands in.

    Raises:
        SdrtError: The node is in none, or inside a function.
    """
    if not isinstance(node.graph, ir.Graph):
        raise SdrtError(f"node {node.name} is not part of a graph")
    return node.graph


def replace(node: ir.Node, value: ir.Value) -> None:
    """Put ``value`` in the place of the node's first output, under that output's name, and drop the node."""
    old = node.outputs[0]
    name = old.name
    value.shape, value.type = old.shape, old.type
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    owner(node).remove(node, safe=True)
    value.name = name


def only_user(node: ir.Node) -> ir.Node | None:
    """The one node that reads a node's first output; None if there are others, or the graph gives it out."""
    output = node.outputs[0]
    users = output.consumers()
    return users[0] if len(users) == 1 and not output.is_graph_output() else None


def integer(node: ir.Node, name: str, default: int = 0) -> int:
    """An integer attribute of a node."""
    return node.attributes.get_int(name, default)


def used(node: ir.Node, index: int) -> ir.Value | None:
    """The input at ``index``; None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def static(value: ir.Value, axis: int) -> int | None:
    """The size of one axis; None where it is dynamic or not known."""
    if value.shape is None:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def same_size(one: object, other: object) -> bool:
    """Whether two sizes of a shape are known to be equal; an axis without a name may have any."""
    return str(one) == str(other) != str(None)


def length(vector: ir.Value | None) -> int | None:
    """How many numbers a vector has; None where that is dynamic, not known, or the value is no vector."""
    return static(vector, 0) if vector is not None and len(vector.shape or ()) == 1 else None


def constant_ints(value: ir.Value | None) -> list[int] | None:
    """The integers of an initializer; None where they are computed."""
    tensor = value.const_value if value is not None and value.is_initializer() else None
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]


def drop_unused(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing reads any more."""
    RemoveUnusedNodesPass()(model)
