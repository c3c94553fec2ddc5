"""Pass: single tensors of an fp16 graph kept in fp32, where they would overflow.

What makes and what reads a named tensor computes in fp32: inputs are cast up in front of those nodes and
outputs down behind them; between two nodes of one island nothing is cast, and a tensor that several of them
read is cast once. Weights that go into an island are widened in the graph, which changes no value. TensorRT
may run fp32 convolutions and products in TF32, which has the range of fp32 and the mantissa of fp16.

What needs no island in TensorRT (looked up in the kernels that TensorRT for RTX 1.7 generates, whose source
is in the plan): `LayerNormalization` casts to fp32 before the mean and takes mean and variance in fp32,
whatever ``stash_type`` says; `GroupNormalization` and `InstanceNormalization` keep sums, mean and variance
in fp32; `Softmax` subtracts the maximum, so that no exponential is over 1, and adds up in fp32; the fused
attention adds up its logits in fp32. So only tensors that are themselves too large are left, and those a
range audit names (`sdrt.export.graphs.range_audit`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from sdrt.export.passes.attention import attentions, write_out
from sdrt.export.passes.nodes import Inserter, integer
from sdrt.export.passes.widen import LOW_PRECISION
from sdrt.runtime.errors import SdrtError

_FP32: Final = ir.DataType.FLOAT
# These take a float of any type beside outputs of their own type: nothing to compute in fp32.
_INDIFFERENT: Final = ("Cast", "Shape", "Size", "IsNaN", "IsInf")


@dataclass(frozen=True, slots=True)
class IslandReport:
    """What the pass did.

    Attributes:
        tensors: The tensors that are fp32 now.
        nodes: Names of the nodes that compute in fp32.
        casts: How many Cast nodes were added.
        written_out: Names of the attentions that had to be, since they touch a named tensor.
    """

    tensors: tuple[str, ...]
    nodes: tuple[str, ...]
    casts: int
    written_out: tuple[str, ...]


def insert_islands(model: ir.Model, tensors: Collection[str]) -> IslandReport:
    """Keep the named tensors in fp32, in place.

    Args:
        model: The graph; attentions that touch a named tensor are written out.
        tensors: Names of inputs or node outputs, also of those that an attention has inside once it is
            written out. Those that are fp32 already stay as they are.

    Raises:
        SdrtError: The graph has no tensor of that name (the audit is of another graph), or no type for it.
    """
    nodes = attentions(model)
    outputs = {f"{node.outputs[0].name}.": node for node in nodes}
    touched = {node for name in tensors for prefix, node in outputs.items() if name.startswith(prefix)}
    inner = {name for name in tensors if name.startswith(tuple(outputs))}
    touched |= {node for value in _named(model, set(tensors) - inner) for node in _touching(value)}
    unfused = [node for node in nodes if node in touched]
    names = tuple(str(node.name or node.outputs[0].name) for node in unfused)
    for node in unfused:
        write_out(node)
    values = [value for value in _named(model, tensors) if not _is_kept(value)]
    island = {node: None for value in values for node in _touching(value) if node.op_type not in _INDIFFERENT}
    makers = [value.producer() for value in values]
    order = {node: position for position, node in enumerate(model.graph)}
    work = _Islands(model.graph, frozenset(values), frozenset(island))
    for maker in makers:
        if maker is not None and maker.op_type == "Cast":
            maker.attributes["to"] = ir.AttrInt64("to", int(_FP32))
            work.widen_output(maker.outputs[0])
    for node in sorted(island, key=order.__getitem__):
        work.widen_inputs(node)
        for output in node.outputs:
            work.widen_output(output)
    _drop_idle_casts(model.graph, keep=tensors)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    return IslandReport(
        tuple(str(value.name) for value in values),
        tuple(str(node.name or node.outputs[0].name) for node in island),
        work.casts,
        names,
    )


def _named(model: ir.Model, names: Collection[str]) -> list[ir.Value]:
    """The values of those names, in the order of the graph."""
    outputs = (output for node in model.graph for output in node.outputs)
    found = [value for value in (*model.graph.inputs, *outputs) if value.name in names]
    missing = set(names) - {value.name for value in found}
    if missing:
        raise SdrtError(
            f"the graph has no tensor {sorted(missing)[0]}: the range audit was made on another one; "
            "export the bundle again"
        )
    for value in found:
        if value.dtype is None:
            raise SdrtError(f"the graph does not say the type of {value.name}: infer shapes before this pass")
    return found


def _is_kept(value: ir.Value) -> bool:
    """Whether a value is fp32, or is what the graph gives out of one that is."""
    maker = value.producer()
    source = maker.inputs[0] if maker is not None and maker.op_type == "Cast" else None
    given_out = value.is_graph_output() and source is not None and source.dtype == _FP32
    return value.dtype not in LOW_PRECISION or given_out


def _touching(value: ir.Value) -> Iterable[ir.Node]:
    """The node that makes a value and those that read it."""
    producer = value.producer()
    if producer is not None:
        yield producer
    yield from value.consumers()


def _drop_idle_casts(graph: ir.Graph, keep: Collection[str]) -> None:
    """Remove casts to fp32 of what is fp32 already, say in front of a softmax whose logits are an island.

    Those that make a named tensor stay: an engine's builder asks for the tensors by name once more.
    """
    for node in list(graph):
        source, output = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Cast" or source is None or source.dtype != _FP32 or output.is_graph_output():
            continue
        if output.name not in keep and integer(node, "to") == int(_FP32):
            output.replace_all_uses_with(source)
            graph.remove(node, safe=True)


class _Islands:
    """Moves nodes to fp32 one by one, in the order of the graph, and remembers what was cast."""

    def __init__(self, graph: ir.Graph, tensors: frozenset[ir.Value], nodes: frozenset[ir.Node]) -> None:
        self.graph, self.tensors, self.nodes = graph, tensors, nodes
        self.casts = 0
        self._wide: dict[ir.Value, ir.Value] = {}

    def widen_inputs(self, node: ir.Node) -> None:
        """Cast each fp16 input up, or take its fp32 original where that is in the graph."""
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in LOW_PRECISION:
                continue
            if value not in self._wide:
                self._wide[value] = self._widened(value, node)
            node.replace_input_with(index, self._wide[value])

    def _widened(self, value: ir.Value, user: ir.Node) -> ir.Value:
        tensor = value.const_value
        build = Inserter(user, str(value.name))
        if value.is_initializer() and tensor is not None:
            return build.constant(tensor.numpy(), "fp32", _FP32)
        self.casts += 1
        return build.op("Cast", [value], "fp32", _FP32, {"to": int(_FP32)}, shape=value.shape)

    def widen_output(self, output: ir.Value) -> None:
        """Make an output fp32; readers outside the island, and the graph's own output, get it cast down."""
        low = output.dtype
        if low not in LOW_PRECISION:
            return
        output.type = ir.TensorType(_FP32)
        outside = [
            (user, index)
            for user, index in output.uses()
            if user not in self.nodes and user.op_type not in _INDIFFERENT
        ]
        if not outside and not output.is_graph_output():
            return
        name = str(output.name)
        narrow = ir.Value(name=f"{name}.low", shape=output.shape, type=ir.TensorType(low))
        cast = ir.node("Cast", [output], {"to": int(low)}, outputs=[narrow], name=f"{name}.low")
        self.casts += 1
        for user, index in outside:
            user.replace_input_with(index, narrow)
        producer = output.producer()
        assert producer is not None
        self.graph.insert_after(producer, cast)
        for position, value in enumerate(self.graph.outputs):
            if value is output:
                self.graph.outputs[position] = narrow
                output.name, narrow.name = f"{name}.fp32", name
