"""ONNX Runtime's operators without a CPU kernel, each written out as its documentation defines it.

Source: docs/ContribOperators.md of ONNX Runtime, `GroupNorm`, `SkipGroupNorm`, `NhwcConv`, `BiasSplitGelu`.
A graph of the CUDA provider's dialect then runs on the CPU, all else in it as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.helper import make_node

FIRST, LAST = [0, 3, 1, 2], [0, 2, 3, 1]


def written_out(model: ir.Model) -> ir.Model:
    """A copy of the model in operators of ONNX, but for those that the CPU has."""
    result: ir.Model = ir.from_proto(proto_written_out(ir.to_proto(model)))
    return result


def proto_written_out(proto: ModelProto) -> ModelProto:
    """The same of ONNX's own object, in place."""
    nodes = [part for node in proto.graph.node for part in DEFINITIONS.get(_key(node), _itself)(node)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def _key(node: NodeProto) -> tuple[str, str]:
    return node.domain, node.op_type


def _itself(node: NodeProto) -> Iterator[NodeProto]:
    yield node


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def _convolution(node: NodeProto) -> Iterator[NodeProto]:
    (data, weights, *bias), output = node.input, node.output[0]
    yield make_node("Transpose", [data], [f"{output}/x"], perm=FIRST)
    yield make_node("Transpose", [weights], [f"{output}/w"], perm=FIRST)
    inputs = [f"{output}/x", f"{output}/w", *bias]
    yield make_node("Conv", inputs, [f"{output}/y"], **_attributes(node))
    yield make_node("Transpose", [f"{output}/y"], [output], perm=LAST)


def _group_norm(node: NodeProto) -> Iterator[NodeProto]:
    """In float32 whatever the type of the data is, as ``GroupNorm`` computes."""
    data, scale, shift = node.input[:3]
    output, attributes = node.output[0], _attributes(node)
    assert attributes["channels_last"] == 1
    yield make_node("Cast", [data], [f"{output}/wide"], to=TensorProto.FLOAT)
    yield make_node("Transpose", [f"{output}/wide"], [f"{output}/x"], perm=FIRST)
    settings = {"num_groups": attributes["groups"], "epsilon": attributes["epsilon"]}
    inputs = [f"{output}/x", scale, shift]
    yield make_node("GroupNormalization", inputs, [f"{output}/y"], **settings)
    result = f"{output}/y"
    if attributes["activation"] == 1:
        yield make_node("Sigmoid", [result], [f"{output}/sigmoid"])
        yield make_node("Mul", [result, f"{output}/sigmoid"], [f"{output}/silu"])
        result = f"{output}/silu"
    yield make_node("Transpose", [result], [f"{output}/last"], perm=LAST)
    yield make_node("CastLike", [f"{output}/last", data], [output])


def _skip_group_norm(node: NodeProto) -> Iterator[NodeProto]:
    data, scale, shift, skip, *bias = node.input
    total = node.output[1] if len(node.output) > 1 else f"{node.output[0]}/sum"
    yield make_node("Add", [data, skip], [f"{total}/skip" if bias else total])
    if bias:
        yield make_node("Add", [f"{total}/skip", bias[0]], [total])
    plain = make_node("GroupNorm", [total, scale, shift], node.output[:1])
    plain.attribute.extend(node.attribute)
    yield from _group_norm(plain)


def _bias_split_gelu(node: NodeProto) -> Iterator[NodeProto]:
    (data, bias), output = node.input, node.output[0]
    yield make_node("Add", [data, bias], [f"{output}/sum"])
    halves = [f"{output}/left", f"{output}/right"]
    yield make_node("Split", [f"{output}/sum"], halves, axis=2, num_outputs=2)
    yield make_node("Gelu", halves[1:], [f"{output}/gelu"])
    yield make_node("Mul", [halves[0], f"{output}/gelu"], [output])


DEFINITIONS: dict[tuple[str, str], Callable[[NodeProto], Iterator[NodeProto]]] = {
    ("com.microsoft", "NhwcConv"): _convolution,
    ("com.microsoft", "GroupNorm"): _group_norm,
    ("com.microsoft", "SkipGroupNorm"): _skip_group_norm,
    ("com.microsoft", "BiasSplitGelu"): _bias_split_gelu,
}
