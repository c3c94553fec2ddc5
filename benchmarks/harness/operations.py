"""Operations and bytes of a component at one size, counted from its ONNX graph.

Shapes are those that onnxscript's optimiser finds, which folds the small computations of shapes. A
multiply-add counts as 2 operations; only matrix products, convolutions and attentions count: the rest is less
than a hundredth. Bytes are those that no implementation without fusion can avoid: weights read once, every
activation written once and read once. Views (`Reshape` and the like) move nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx
import onnx_ir as ir

from sdrt.benchmarks.document.document import Work
from sdrt.runtime.backends.backend import RequestShape
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.errors import SdrtError

_VIEWS: Final = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
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
    loaded = ir.load(model) if isinstance(model, Path) else ir.from_proto(model)
    _infer(loaded, inputs)
    return _count(loaded.graph)


def weight_elements(bundle: Bundle) -> int:
    """Elements of all components' weights, whatever they are stored in."""
    graphs = (ir.load(bundle.path / part.model).graph for part in bundle.manifest.components.values())
    return sum(
        math.prod(_shape(value))
        for graph in graphs
        for value in graph.initializers.values()
        if value.dtype is not None and value.dtype.is_floating_point()
    )


def _infer(model: ir.Model, inputs: Mapping[str, Shape]) -> None:
    """Give every value the shape that it has for these inputs."""
    from onnxscript.optimizer import fold_constants

    for value in model.graph.inputs:
        if value.name is not None and value.name in inputs:
            value.shape = ir.Shape(inputs[value.name])
    for node in model.graph:
        for value in node.outputs:
            value.shape = None  # it was of the sizes that the graph was exported for
    limits = {"input_size_limit": _MAX_FOLDED, "output_size_limit": _MAX_FOLDED}
    fold_constants(model, onnx_shape_inference=True, should_fold=_is_of_shapes, **limits)
    values = (value for node in model.graph for value in node.outputs if value.name)
    missing = [value.name for value in values if value.shape is None or not value.shape.is_static()]
    if missing:
        raise SdrtError(f"the shape of {missing[0]} cannot be inferred, nor of {len(missing) - 1} others")


def _is_of_shapes(node: ir.Node) -> bool | None:
    """Whether a node may be folded: small weights are left as they are stored."""
    is_float = any(
        value is not None and value.dtype and value.dtype.is_floating_point() for value in node.inputs
    )
    return False if is_float and node.op_type != "Shape" else None


def _shape(value: ir.Value | None) -> Shape:
    assert value is not None
    assert value.shape is not None
    return value.shape.numpy()


def _count(graph: ir.Graph) -> Count:
    flop, moved = 0, sum(map(_bytes, graph.inputs))
    # Weights, and what is computed of weights alone, such as their casts.
    constants, read = set(graph.initializers.values()), set[ir.Value]()
    outputs = set(graph.outputs)
    for node in graph:
        sources = [value for value in node.inputs if value is not None]
        if all(value in constants for value in sources):
            constants |= set(node.outputs)
            continue
        if count := _FLOP.get(node.op_type):
            flop += count(node)
        if node.op_type in _VIEWS:
            continue
        # Of a table of embeddings only the rows that are looked up are read.
        weights = constants.intersection(sources[1:] if node.op_type == "Gather" else sources) - read
        read |= weights
        moved += sum(map(_bytes, weights))
        # Read once by whatever comes after; what the caller gets is read by the caller.
        moved += sum(_bytes(value) * (1 if value in outputs else 2) for value in node.outputs if value.name)
    return Count(flop, moved)


def _bytes(value: ir.Value) -> int:
    return math.prod(_shape(value)) * (4 if value.dtype is None else int(value.dtype.itemsize))


def _attribute(node: ir.Node, name: str, default: int = 0) -> int:
    return int(node.attributes[name].as_int()) if name in node.attributes else default


def _matmul(node: ir.Node) -> int:
    return 2 * math.prod(_shape(node.outputs[0])) * _shape(node.inputs[0])[-1]


def _gemm(node: ir.Node) -> int:
    inner = _shape(node.inputs[0])[0 if _attribute(node, "transA") else 1]
    return 2 * math.prod(_shape(node.outputs[0])) * inner


def _conv(node: ir.Node) -> int:
    # The weights are [M, C/groups, kernel…].
    return 2 * math.prod(_shape(node.outputs[0])) * math.prod(_shape(node.inputs[1])[1:])


def _conv_transpose(node: ir.Node) -> int:
    # The weights are [C, M/groups, kernel…]: each element of the input meets all of its channel's.
    return 2 * math.prod(_shape(node.inputs[0])) * math.prod(_shape(node.inputs[1])[1:])


def _attention(node: ir.Node) -> int:
    """Queries · keys, then their weights · values; heads of keys and values may be shared."""
    query, key, value = map(_shape, node.inputs[:3])
    if len(query) == 4:  # [B, heads, tokens, width]
        batch, heads, length, width = query
        return 2 * batch * heads * length * key[2] * (width + value[3])
    heads = _attribute(node, "q_num_heads")  # [B, tokens, heads · width]
    value_width = value[2] // _attribute(node, "kv_num_heads", heads)
    return 2 * query[0] * query[1] * key[1] * (query[2] + heads * value_width)


def _einsum(node: ir.Node) -> int:
    terms = node.attributes["equation"].as_string().replace(" ", "").partition("->")[0].split(",")
    if len(terms) != 2:
        return 0  # a sum or a transposition
    sizes: dict[str, int] = {}
    for term, value in zip(terms, node.inputs, strict=True):
        sizes |= dict(zip(term, _shape(value), strict=True))
    return 2 * math.prod(sizes.values())


_FLOP: Final[Mapping[str, Callable[[ir.Node], int]]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Attention": _attention,
    "Einsum": _einsum,
}
