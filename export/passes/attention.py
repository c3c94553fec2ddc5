"""Pass: which `Attention` nodes TensorRT can run as one kernel; the others are written out.

The ONNX parser makes of a 4-D `Attention` an attention layer that may not be decomposed: a build fails where
there is no fused kernel. Nearly always: one head at one small fixed size was decomposed in silence all the
same, so the attentions of a finished engine are counted in its layers (`sdrt.export.engines.layers`). What
TensorRT for RTX 1.7 accepts, found by building networks of one node (640 builds; two sequences of 64 tokens
unless said otherwise):

====================== ==================================================================================
fp16 and bf16          fused for every head width from 9 to 256; 8 and less, and 257 and more, are not
fp32                   never
width of the values    must be that of queries and keys
mask                   none, causal, boolean or additive, of shape [Q, K], [H, Q, K], [B, H, Q, K] or with
                       ones in it: the same widths
key and value heads    as many as query heads, or a divisor of them
images × heads         2 and more: any length. 1: some shapes, and it depends on the nodes around it (alone,
                       4096 × 4096 at width 64 builds, 1024 × 1024 does not), so one head stays only where
                       the batch is fixed at 2 or more
queries                any number where images × heads × queries ≥ 4
softcap, past keys,    refused by the parser
softmax_precision,
a second output
3-D inputs             always accepted, but decomposed in silence where there is no kernel (widths of 8 and
                       264 build): no proof, so this pass rewrites those that stay into 4-D
====================== ==================================================================================

The fused kernel adds up queries · keys in fp32 and never rounds the logits to fp16 (its source, which the
plan contains, is instantiated with fp32 accumulators), so logits over 65,504 are no reason to write one out.

Separate query, key and value projections need no pass either: TensorRT runs them as one matrix product
(``mm_v+mm_k+mm_q`` in the layer report), and the scale costs no kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from sdrt.export.passes.nodes import Inserter, integer, replace, static, used
from sdrt.runtime.errors import SdrtError

NARROWEST_HEAD: Final = 9
WIDEST_HEAD: Final = 256
FUSED_TYPES: Final = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
MASKED: Final = ".masked_logits_"  # in the name of a tensor that holds −∞ on purpose
_FP32: Final = ir.DataType.FLOAT
_INT64: Final = ir.DataType.INT64


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """What became of the attentions.

    Attributes:
        kept: Names of the nodes that stay one node.
        written_out: Name → why it has no fused kernel.
    """

    kept: tuple[str, ...]
    written_out: dict[str, str]


def legalize_attention(model: ir.Model) -> AttentionReport:
    """Write out, in place, each attention that has no fused kernel; give the others 4-D inputs.

    Raises:
        SdrtError: An attention has to be written out and uses what this pass does not know.
    """
    kept: list[str] = []
    written: dict[str, str] = {}
    for node in attentions(model):
        name = node.name or str(node.outputs[0].name)
        if why := why_not_fused(node):
            write_out(node)
            written[name] = why
        else:
            _in_four_dimensions(node)
            kept.append(name)
    return AttentionReport(tuple(kept), written)


def attentions(model: ir.Model) -> list[ir.Node]:
    """The `Attention` nodes of the ONNX domain, in the order of the graph."""
    return [node for node in model.graph.all_nodes() if node.op_type == "Attention" and not node.domain]


def why_not_fused(node: ir.Node) -> str:
    """The reason that an attention has no fused kernel (see the table above); empty if it has one."""
    query, _, value = _operands(node)
    if query.dtype not in FUSED_TYPES:
        return f"its inputs are {query.dtype}; fused kernels take FLOAT16 and BFLOAT16"
    if beyond := _beyond(node):
        return f"TensorRT has no {beyond}"
    heads, width = head_shape(node)
    if width is None or heads is None:
        return "the number of heads or their width is not fixed in the graph"
    if not NARROWEST_HEAD <= width <= WIDEST_HEAD:
        return f"its heads are {width} wide; fused kernels take {NARROWEST_HEAD} to {WIDEST_HEAD}"
    if len(value.shape or ()) == 4 and static(value, 3) != width:
        return f"its values are {static(value, 3)} wide and its keys {width}"
    if heads == 1 and (static(query, 0) or 1) < 2:
        return "it has one head, and one image of it has no fused kernel"
    return ""


def _operands(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    query, key, value = (used(node, index) for index in range(3))
    if query is None or key is None or value is None or query.shape is None:
        raise SdrtError(f"attention {node.name} lacks an input or its shape")
    return query, key, value


def _beyond(node: ir.Node) -> str:
    """The first feature of opset 23's `Attention` that neither TensorRT nor `write_out` has."""
    if node.attributes.get_float("softcap", 0.0):
        return "softcap"
    if "softmax_precision" in node.attributes:
        return "softmax_precision"
    if any(used(node, index) is not None for index in (4, 5)):
        return "past keys and values"
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return "further outputs"
    return ""


def head_shape(node: ir.Node) -> tuple[int | None, int | None]:
    """Number of query heads and the width of each; None where the graph does not fix it."""
    query = _operands(node)[0]
    if len(query.shape or ()) == 4:
        return static(query, 1), static(query, 3)
    heads, hidden = integer(node, "q_num_heads"), static(query, 2)
    return heads or None, None if hidden is None or not heads else hidden // heads


def _in_four_dimensions(node: ir.Node) -> None:
    """Turn inputs [B, S, H·D] into [B, H, S, D], where they are not, and the output back."""
    if len(_operands(node)[0].shape or ()) == 4:
        return
    build = Inserter(node, str(node.outputs[0].name))
    apart = _heads_apart(node, build)
    kept = {key: value for key, value in node.attributes.items() if not key.endswith("_num_heads")}
    fused = build.op("Attention", [*apart, *node.inputs[3:]], "fused", apart[0].dtype, kept)
    replace(node, heads_together(fused, build))


def _heads_apart(node: ir.Node, build: Inserter) -> list[ir.Value]:
    """Queries, keys and values as [B, H, S, D], whatever form they come in."""
    operands = _operands(node)
    if len(operands[0].shape or ()) == 4:
        return list(operands)
    counts = (integer(node, "q_num_heads"), *(integer(node, "kv_num_heads"),) * 2)
    apart = []
    for label, value, heads in zip("qkv", operands, counts, strict=True):
        shape = build.constant([0, 0, heads, -1], f"{label}_shape", _INT64)
        split = build.op("Reshape", [value, shape], f"{label}_split", value.dtype)
        apart.append(build.op("Transpose", [split], f"{label}_heads", value.dtype, {"perm": [0, 2, 1, 3]}))
    return apart


def heads_together(value: ir.Value, build: Inserter, label: str = "y") -> ir.Value:
    """[B, H, S, D] → [B, S, H·D]."""
    last = build.op("Transpose", [value], f"{label}_tokens", value.dtype, {"perm": [0, 2, 1, 3]})
    shape = build.constant([0, 0, -1], f"{label}_joined_shape", _INT64)
    return build.op("Reshape", [last, shape], f"{label}_joined", value.dtype)


def write_out(node: ir.Node) -> None:
    """Replace one attention by the products that define it (ONNX operator `Attention`, version 23).

    ``softmax(a·Q · (b·K)ᵀ + mask) · V`` with a·b = scale: on both factors, as in the operator's definition,
    so that the logits are the only tensor that grows. In fp16 and bf16 the mask and the softmax are
    fp32. The logits are named after the attention's output, with ``.logits`` behind it.

    Raises:
        SdrtError: Grouped key heads, a softcap, past keys, a second output, or an unknown head width.
    """
    width = head_shape(node)[1]
    if width is None or unsupported(node):
        raise SdrtError(f"attention {node.name} cannot be written out: it has {unsupported(node)}")
    build = Inserter(node, str(node.outputs[0].name))
    wide = len(_operands(node)[0].shape or ()) == 4
    query, key, values = _heads_apart(node, build)
    dtype = query.dtype or _FP32
    scale = node.attributes.get_float("scale", None) or 1 / math.sqrt(width)
    query_scaled, key_scaled = (
        build.op("Mul", [value, build.constant(factor, f"{label}_scale", dtype)], f"{label}_scaled", dtype)
        for label, value, factor in zip("qk", (query, key), _factors(scale, dtype), strict=True)
    )
    key_turned = build.op("Transpose", [key_scaled], "k_turned", dtype, {"perm": [0, 1, 3, 2]})
    logits = build.op("MatMul", [query_scaled, key_turned], "logits", dtype)
    logits = _cast(logits, _FP32, "logits_fp32", build)
    logits = _masked(node, logits, query, key, build)
    weights = build.op("Softmax", [logits], "weights_fp32", _FP32, {"axis": -1})
    product = build.op("MatMul", [_cast(weights, dtype, "weights", build), values], "product", dtype)
    replace(node, product if wide else heads_together(product, build))


def _factors(scale: float, dtype: ir.DataType) -> tuple[float, float]:
    """Two numbers of the type, each near √scale, whose product is nearest to the scale.

    Twice the rounded root would be up to 1e-3 off in fp16, and every logit with it.
    """
    kind = dtype.numpy()
    root = np.asarray(math.sqrt(scale), kind)
    candidates = [np.asarray(float(root) * (1 + step * 2.0**-8), kind) for step in range(-64, 65)]
    pairs = [(float(first), float(np.asarray(scale / float(first), kind))) for first in candidates]
    return min(pairs, key=lambda pair: abs(pair[0] * pair[1] - scale))


def unsupported(node: ir.Node) -> str:
    """What a rewriting of an attention, here or for another runtime, does not know; empty if it knows all."""
    if beyond := _beyond(node):
        return beyond
    if None in head_shape(node):
        return "heads of a number or width that the graph does not fix"
    heads = integer(node, "q_num_heads") or static(_operands(node)[0], 1)
    keys = integer(node, "kv_num_heads") or static(_operands(node)[1], 1)
    return "" if heads == keys else "fewer key heads than query heads"


def _cast(value: ir.Value, dtype: ir.DataType, name: str, build: Inserter) -> ir.Value:
    if value.dtype == dtype:
        return value
    return build.op("Cast", [value], name, dtype, {"to": int(dtype)})


def _masked(node: ir.Node, logits: ir.Value, query: ir.Value, key: ir.Value, build: Inserter) -> ir.Value:
    """Logits [B, H, Q, K] in fp32 with the causal and the given mask on them."""
    mask = used(node, 3)
    allowed = [_causal(query, key, build)] if integer(node, "is_causal") else []
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        allowed.append(mask)
    elif mask is not None:
        logits = build.op("Add", [logits, _cast(mask, _FP32, "mask_fp32", build)], "biased_logits", _FP32)
    for index, seen in enumerate(allowed):
        never = build.constant(-np.inf, f"never_{index}", _FP32)
        logits = build.op("Where", [seen, logits, never], f"{MASKED[1:]}{index}", _FP32)
    return logits


def _causal(query: ir.Value, key: ir.Value, build: Inserter) -> ir.Value:
    """Boolean [Q, K]: query i sees the keys up to i, counted from the first (the operator's alignment)."""
    zero, one = (build.constant(number, f"int_{number}", _INT64) for number in (0, 1))
    axis = build.constant([1], "last_axis", _INT64)
    ranges = []
    for label, value in (("q", query), ("k", key)):
        length = build.op("Shape", [value], f"{label}_length", _INT64, {"start": 2, "end": 3})
        scalar = build.op("Squeeze", [length], f"{label}_tokens", _INT64)
        ranges.append(build.op("Range", [zero, scalar, one], f"{label}_range", _INT64))
    column = build.op("Unsqueeze", [ranges[0], axis], "q_column", _INT64)
    return build.op("LessOrEqual", [ranges[1], column], "causal_mask", ir.DataType.BOOL)


def write_out_all(model: ir.Model) -> int:
    """Write out every attention, for a graph whose logits are to be seen; return how many there were."""
    nodes = attentions(model)
    for node in nodes:
        write_out(node)
    return len(nodes)
