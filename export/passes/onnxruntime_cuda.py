"""Pass: the dialect of ONNX Runtime's CUDA provider.

Each opset-23 `Attention` becomes one `com.microsoft.MultiHeadAttention`, which that provider runs as one
kernel (flash or memory-efficient attention, logits in fp32). It takes queries, keys and values as the
projections leave them, [B, S, H·D]: the Reshape and Transpose before and after each attention go away with
it. Convolutions and what stands between them go over to NHWC and the operators of
`sdrt.export.passes.diffusion_operators`.

A guided step of SD 1.5 showed why (2 rows, 512 × 512, fp16, H100): of 16.8 ms on the GPU, 3.3 were spent
turning activations round for convolutions, some 4 on group norms and SiLU as ONNX Runtime writes them out,
0.6 on convolutions' biases. ONNX Runtime's loader fuses none of this. These operators have no kernels on the
CPU: the tests run such graphs there with each of them written out as its documentation defines it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from sdrt.export.passes.attention import attentions, head_shape, heads_together, unsupported
from sdrt.export.passes.causal import recognise_causal_masks
from sdrt.export.passes.diffusion_operators import DOMAIN, to_diffusion_operators
from sdrt.export.passes.group_norm import restore_group_norms
from sdrt.export.passes.nodes import Inserter, drop_unused, integer, only_user, replace, static, used
from sdrt.runtime.errors import SdrtError

_SWAP: Final = (0, 2, 1, 3)  # [B, S, H, D] ↔ [B, H, S, D]
# Added to the logits of keys that are not seen. Not −∞: the softmax of a tile without a key would be NaN.
_NEVER: Final = -65504.0


@dataclass(frozen=True, slots=True)
class DialectReport:
    """What the pass did.

    Attributes:
        attentions: Names of the nodes that are `MultiHeadAttention` now.
        causal: How many of them had a triangular mask written out, which is gone.
        operators: How many nodes there are now of each of the provider's own operators.
    """

    attentions: tuple[str, ...]
    causal: int
    operators: dict[str, int]


def to_onnxruntime_cuda(model: ir.Model) -> DialectReport:
    """Rewrite a graph in place.

    Raises:
        SdrtError: An attention has grouped key heads, a softcap, past keys, or a width that is not fixed.
    """
    causal = recognise_causal_masks(model)
    nodes = attentions(model)
    names = tuple(str(node.name or node.outputs[0].name) for node in nodes)
    for node in nodes:
        _rewrite(node)
    restore_group_norms(model)
    drop_unused(model)
    to_diffusion_operators(model)
    operators = Counter(node.op_type for node in model.graph if node.domain == DOMAIN)
    if operators:
        model.graph.opset_imports.setdefault(DOMAIN, 1)
    return DialectReport(names, causal, dict(operators))


def _rewrite(node: ir.Node) -> None:
    query = node.inputs[0]
    heads = head_shape(node)[0]
    if query is None or heads is None or unsupported(node):
        raise SdrtError(
            f"attention {node.name} cannot become a MultiHeadAttention: it has {unsupported(node)}"
        )
    build = Inserter(node, str(node.outputs[0].name))
    apart = len(query.shape or ()) == 4
    operands = [
        _tokens(value, label, build) if apart and value is not None else value
        for value, label in zip(node.inputs[:3], "qkv", strict=True)
    ]
    attributes: dict[str, int | float] = {"num_heads": heads}
    if (scale := node.attributes.get_float("scale", None)) is not None:
        attributes["scale"] = scale
    if integer(node, "is_causal"):
        attributes["unidirectional"] = 1
    inputs = [*operands, None, None, _bias(node, build)]
    fused = build.op("MultiHeadAttention", inputs, "fused", query.dtype, attributes, domain=DOMAIN)
    last = _joined(node) if apart else node
    if last is not None:
        replace(last, fused)
        return
    sizes = build.constant([0, 0, heads, -1], "apart_shape", ir.DataType.INT64)
    split = build.op("Reshape", [fused, sizes], "apart", query.dtype)
    replace(node, build.op("Transpose", [split], "heads", query.dtype, {"perm": list(_SWAP)}))


def _tokens(value: ir.Value, label: str, build: Inserter) -> ir.Value:
    """[B, S, H·D] for a value [B, H, S, D]: what it was made from, where it was made by taking that apart."""
    swap = value.producer()
    split = swap.inputs[0].producer() if swap is not None and _swaps(swap) and swap.inputs[0] else None
    if split is not None and split.op_type == "Reshape" and split.inputs[0] is not None:
        source, heads, width = split.inputs[0], static(value, 1), static(value, 3)
        if heads and width and len(source.shape or ()) == 3 and static(source, 2) == heads * width:
            return source
    return heads_together(value, build, label)


def _joined(node: ir.Node) -> ir.Node | None:
    """The Reshape that makes [B, S, H·D] of an attention's output, if that is all that is done with it."""
    swap = only_user(node)
    reshape = only_user(swap) if swap is not None and _swaps(swap) else None
    if reshape is None or reshape.op_type != "Reshape" or len(reshape.outputs[0].shape or ()) != 3:
        return None
    heads, width = static(node.outputs[0], 1), static(node.outputs[0], 3)
    joined = static(reshape.outputs[0], 2)
    return reshape if heads and width and joined == heads * width else None


def _swaps(node: ir.Node) -> bool:
    """Whether a node exchanges the axes of heads and tokens."""
    return node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", ())) == _SWAP


def _bias(node: ir.Node, build: Inserter) -> ir.Value | None:
    """The mask as a number to add, of rank 4; None without one."""
    mask = used(node, 3)
    query = node.inputs[0]
    if mask is None or query is None or query.dtype is None:
        return None
    if mask.dtype == ir.DataType.BOOL:
        seen = build.constant(0.0, "seen", query.dtype)
        never = build.constant(_NEVER, "never", query.dtype)
        mask = build.op("Where", [mask, seen, never], "bias", query.dtype, shape=mask.shape)
    missing = 4 - len(mask.shape or ())
    if not missing:
        return mask
    axes = build.constant([*range(missing)], "bias_axes", ir.DataType.INT64)
    return build.op("Unsqueeze", [mask, axes], "bias_of_rank_4", query.dtype)
