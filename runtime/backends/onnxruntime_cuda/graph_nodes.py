"""Which nodes of an ONNX graph only compute shapes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from sdrt.runtime.backends.onnx_graph import Node

_SOURCES: Final = frozenset({"Shape", "Size"})


def shape_nodes(nodes: list[Node], constants: Collection[str]) -> set[str]:
    """Names of the nodes that compute from nothing but tensors' shapes: a few numbers each.

    Those are ``Shape`` and ``Size``, and what has only their results and constants as inputs.

    Args:
        nodes: The nodes in the graph's order, which is topological.
        constants: Names of the initializers.
    """
    constant = set(constants) | {""}  # an optional input that is left out has no name
    computed: set[str] = set()
    names = set()
    for node in nodes:
        if node.op_type in _SOURCES or (
            any(name in computed for name in node.inputs)
            and all(name in computed or name in constant for name in node.inputs)
        ):
            names.add(node.name)
            computed.update(node.outputs)
        elif constant.issuperset(node.inputs):  # a Constant, or what is computed from constants alone
            constant.update(node.outputs)
    return names
