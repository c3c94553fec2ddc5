"""Which nodes of an ONNX graph only compute shapes, read from the file's bytes without the package onnx.

Of ONNX's messages (onnx.proto) only these fields are needed: ModelProto.graph = 7; GraphProto.node = 1,
.initializer = 5; NodeProto.input = 1, .output = 2, .name = 3, .op_type = 4; TensorProto.name = 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from sdrt.runtime.admission.wire_format import BYTES, read_fields

_SOURCES: Final = frozenset({"Shape", "Size"})


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the main graph."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_nodes(model: bytes) -> tuple[list[Node], set[str]]:
    """The nodes of a model's main graph, and the names of its initializers.

    Args:
        model: An ONNX file's bytes; weights may lie elsewhere.

    Raises:
        ValueError: Not the bytes of a protobuf message.
    """
    nodes, constants = [], set()
    for field, graph in _fields(memoryview(model)):
        if field != 7:
            continue
        for inner, message in _fields(graph):
            if inner == 1:
                nodes.append(_node(message))
            elif inner == 5:
                constants |= {_text(value) for number, value in _fields(message) if number == 8}
    return nodes, constants


def shape_nodes(nodes: list[Node], constants: set[str]) -> set[str]:
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


def _node(message: memoryview) -> Node:
    texts: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
    for field, value in _fields(message):
        if field in texts:
            texts[field].append(_text(value))
    name, op_type = ("".join(texts[field]) for field in (3, 4))
    return Node(name, op_type, tuple(texts[1]), tuple(texts[2]))


def _text(value: memoryview) -> str:
    return bytes(value).decode()


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and contents of every field that holds bytes; numbers are passed over."""
    for number, wire, value in read_fields(message):
        if wire == BYTES:
            yield number, value
