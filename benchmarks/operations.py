"""Operations and bytes of a component at one size, counted from its ONNX graph.

Shapes come from ONNX's own inference, with the small computations of shapes folded in between. A
multiply-add counts as 2 operations; only matrix products, convolutions and attentions count: the rest is less
than a hundredth. Bytes are those that no implementation without fusion can avoid: weights read once, every
activation written once and read once. Views (`Reshape` and the like) move nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from sdrt.benchmarks.document import Work
from sdrt.runtime.backends.backend import RequestShape
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.errors import SdrtError

_VIEWS: Final = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
# What inference does not see through, and what leaves the shape of its first input as it is.
_KEEP_SHAPE: Final = frozenset({"GroupNormalization", "Gelu"})
_MAX_FOLDED: Final = 64  # elements of a tensor that can be a shape, or a part of one

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Count:
    """Operations of one call, and the bytes it moves."""

    flop: int
    bytes_moved: int


def count_bundle(bundle: Bundle, height: int, width: int, batch: int) -> tuple[Work, ...]:
    """The work of every component for a guided drawing.

    The text encoders count together, as ``text_encoder``, on two texts for each picture; the U-Net has two
    rows for each.

    Args:
        bundle: Opened.
        height: Pixels.
        width: Pixels.
        batch: Pictures.

    Raises:
        SdrtError: A graph's shapes cannot be inferred.
    """
    manifest = bundle.manifest
    axes = RequestShape(batch, height, width).axes(manifest.latents.factor, manifest.tokens)
    counts: dict[str, list[Count]] = {}
    for name, part in manifest.components.items():
        is_text = name.startswith("text_encoder")
        sizes = {**axes, "batch": 2 * batch} if is_text else axes
        inputs = {spec.name: spec.concrete(sizes) for spec in part.spec.inputs}
        count = count_graph(bundle.path / part.model, inputs)
        counts.setdefault("text_encoder" if is_text else name, []).append(count)
    return tuple(
        Work(
            name,
            height,
            width,
            batch,
            sum(count.flop for count in found),
            sum(count.bytes_moved for count in found),
        )
        for name, found in counts.items()
    )


def count_graph(model: Path | onnx.ModelProto, inputs: Mapping[str, Shape]) -> Count:
    """Count one graph.

    Args:
        model: The graph or its file; weights that lie elsewhere are not read.
        inputs: Shape of every input.

    Raises:
        SdrtError: A shape cannot be inferred.
    """
    loaded = onnx.load(model, load_external_data=False) if isinstance(model, Path) else model
    return _count(_infer(loaded, inputs))


def weight_elements(bundle: Bundle) -> int:
    """Elements of all components' weights, whatever they are stored in."""
    graphs = (onnx.load(bundle.path / part.model, load_external_data=False).graph for part in _parts(bundle))
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    return sum(
        math.prod(tensor.dims)
        for graph in graphs
        for tensor in graph.initializer
        if tensor.data_type in floats
    )


def _parts(bundle: Bundle) -> list[Any]:
    return list(bundle.manifest.components.values())


@dataclass(slots=True)
class _Graph:
    """A graph whose shapes are known.

    ``constants`` are weights and what is computed of weights alone, such as their casts.
    """

    nodes: list[onnx.NodeProto]
    shapes: dict[str, Shape]
    item_bytes: dict[str, int]
    inputs: tuple[str, ...]
    outputs: frozenset[str]
    constants: set[str] = field(default_factory=set)


def _infer(source: onnx.ModelProto, inputs: Mapping[str, Shape]) -> _Graph:
    model = onnx.ModelProto()
    model.CopyFrom(source)
    graph = model.graph
    del graph.value_info[:]
    for entry in graph.input:
        if entry.name in inputs:
            _set_shape(entry, inputs[entry.name])
    for entry in graph.output:
        entry.type.tensor_type.ClearField("shape")
    original = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    for node in graph.node:
        if node.op_type in _KEEP_SHAPE:
            node.op_type = "Identity"
            del node.input[1:]
            del node.attribute[:]
    folded: set[str] = set()
    while True:
        shapes, item_bytes = _known(onnx.shape_inference.infer_shapes(model, data_prop=True))
        new = _fold(model, shapes)
        folded |= new
        if not new:
            break
    nodes = [node for node in original if not set(node.output) <= folded]
    missing = [name for node in nodes for name in node.output if name and name not in shapes]
    if missing:
        raise SdrtError(f"the shape of {missing[0]} cannot be inferred, nor of {len(missing) - 1} others")
    names = {tensor.name for tensor in graph.initializer}
    result = _Graph(
        nodes,
        shapes,
        item_bytes,
        tuple(entry.name for entry in graph.input if entry.name not in names),
        frozenset(entry.name for entry in graph.output),
        set(names),
    )
    for node in nodes:
        if all(not name or name in result.constants for name in node.input):
            result.constants |= set(node.output)
    return result


def _set_shape(entry: onnx.ValueInfoProto, shape: Shape) -> None:
    for dimension, size in zip(entry.type.tensor_type.shape.dim, shape, strict=True):
        dimension.Clear()
        dimension.dim_value = size


def _known(model: onnx.ModelProto) -> tuple[dict[str, Shape], dict[str, int]]:
    """Shapes without an unknown dimension, and bytes of an element."""
    shapes: dict[str, Shape] = {}
    item_bytes: dict[str, int] = {}
    graph = model.graph
    for entry in (*graph.input, *graph.value_info, *graph.output):
        kind = entry.type.tensor_type
        if kind.elem_type:
            item_bytes[entry.name] = _item_bytes(kind.elem_type)
        if kind.HasField("shape") and all(axis.HasField("dim_value") for axis in kind.shape.dim):
            shapes[entry.name] = tuple(axis.dim_value for axis in kind.shape.dim)
    for tensor in graph.initializer:
        shapes[tensor.name] = tuple(tensor.dims)
        item_bytes[tensor.name] = _item_bytes(tensor.data_type)
    return shapes, item_bytes


def _item_bytes(element: int) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(element).itemsize)


def _fold(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> set[str]:
    """Put numbers in the place of nodes that compute shapes; the names of what was folded."""
    graph = model.graph
    values = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_location != onnx.TensorProto.EXTERNAL and math.prod(tensor.dims) <= _MAX_FOLDED
    }
    kept, folded = [], set()
    for node in graph.node:
        results = _evaluate(model, node, values, shapes)
        if results is None:
            kept.append(node)
            continue
        for name, value in zip(node.output, results, strict=True):
            values[name] = value
            folded.add(name)
            graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    if folded:
        remaining = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(remaining)
    return folded


def _evaluate(
    model: onnx.ModelProto,
    node: onnx.NodeProto,
    values: Mapping[str, NDArray[Any]],
    shapes: Mapping[str, Shape],
) -> list[NDArray[Any]] | None:
    """The outputs of a node that computes shapes; None of any other node, or where it is too early."""
    if node.op_type == "Shape":
        if node.input[0] not in shapes:
            return None
        limits = {entry.name: entry.i for entry in node.attribute}
        return [np.array(shapes[node.input[0]][limits.get("start", 0) : limits.get("end")], np.int64)]
    if not all(not name or name in values for name in node.input):
        return None
    inputs = [name for name in node.input if name]
    if any(values[name].dtype.kind not in "iub" for name in inputs) or node.domain:
        return None
    from onnx.reference import ReferenceEvaluator

    graph = onnx.helper.make_graph(
        [node],
        "one",
        [
            onnx.helper.make_tensor_value_info(name, _element(values[name]), None)
            for name in dict.fromkeys(inputs)
        ],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in node.output],
    )
    run = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=model.opset_import))
    outputs = run.run(None, {name: values[name] for name in inputs})
    return [np.asarray(value) for value in outputs]


def _element(value: NDArray[Any]) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(value.dtype))


def _count(graph: _Graph) -> Count:
    flop, moved = 0, 0
    read: set[str] = set()
    for node in graph.nodes:
        if set(node.output) <= graph.constants:
            continue
        if count := _FLOP.get(node.op_type):
            flop += count(node, graph.shapes)
        if node.op_type in _VIEWS:
            continue
        # Of a table of embeddings only the rows that are looked up are read.
        sources = node.input[1:] if node.op_type == "Gather" else node.input
        weights = {name for name in sources if name in graph.constants} - read
        read |= weights
        moved += sum(_bytes(graph, name) for name in weights)
        # Read once by whatever comes after; what the caller gets is read by the caller.
        for name in filter(None, node.output):
            moved += _bytes(graph, name) * (1 if name in graph.outputs else 2)
    return Count(flop, moved + sum(_bytes(graph, name) for name in graph.inputs))


def _bytes(graph: _Graph, name: str) -> int:
    return math.prod(graph.shapes[name]) * graph.item_bytes.get(name, 4)


def _attribute(node: onnx.NodeProto, name: str, default: int = 0) -> int:
    return next((int(entry.i) for entry in node.attribute if entry.name == name), default)


def _matmul(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    return 2 * math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


def _gemm(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    inner = shapes[node.input[0]][0 if _attribute(node, "transA") else 1]
    return 2 * math.prod(shapes[node.output[0]]) * inner


def _conv(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    # The weights are [M, C/groups, kernel…].
    return 2 * math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])


def _conv_transpose(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    # The weights are [C, M/groups, kernel…]: each element of the input meets all of its channel's.
    return 2 * math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])


def _attention(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Queries · keys, then their weights · values; heads of keys and values may be shared."""
    query, key, value = (shapes[name] for name in node.input[:3])
    if len(query) == 4:  # [B, heads, tokens, width]
        batch, heads, length, width = query
        return 2 * batch * heads * length * key[2] * (width + value[3])
    heads = _attribute(node, "q_num_heads")  # [B, tokens, heads · width]
    value_width = value[2] // _attribute(node, "kv_num_heads", heads)
    return 2 * query[0] * query[1] * key[1] * (query[2] + heads * value_width)


def _einsum(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    equation = next(entry.s for entry in node.attribute if entry.name == "equation").decode()
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    if len(terms) != 2:
        return 0  # a sum or a transposition
    sizes = {
        label: size
        for term, name in zip(terms, node.input, strict=True)
        for label, size in zip(term, shapes[name], strict=True)
    }
    return 2 * math.prod(sizes.values())


_FLOP: Final[Mapping[str, Callable[[onnx.NodeProto, Mapping[str, Shape]], int]]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Attention": _attention,
    "Einsum": _einsum,
}
