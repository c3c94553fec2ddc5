"""Pass: convolutions, group norms and gated GELUs as ONNX Runtime's own operators, in NHWC.

Those operators, of the domain com.microsoft, were made for diffusion models and have kernels on CUDA alone
(onnxruntime/contrib_ops/cuda/diffusion; definitions in docs/ContribOperators.md):

- `NhwcConv`, fp16 and fp32: cuDNN's tensor core kernels work in NHWC; for `Conv`, in NCHW, it turns every
  activation round and back. The weights, [O, H, W, I], must be constant when kernels are chosen, which they
  are: ONNX Runtime folds the Transpose (and the Cast of weights stored in fp16) before.
- `GroupNorm` and `SkipGroupNorm`, fp16 and fp32, with float32 scale and shift: one pass over the activation
  for the sums and one for the rest, SiLU and the addition before included, where `GroupNormalization` becomes
  some twenty nodes. A thread takes two channels and a block whole groups, at most 512 channels: hence
  `group_norm_fits`.
- `BiasSplitGelu`, fp16 and fp32: bias, split, GELU and product in one; for the widths of Stable Diffusion
  alone.

What does not meet a kernel's limits stays as it is: these kernels refuse when they run, not at loading.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

import onnx_ir as ir

from sdrt.export.passes.nhwc import ChannelsLast, inserter, move_channels_last, rank_of
from sdrt.export.passes.nodes import (
    Inserter,
    integer,
    length,
    only_user,
    owner,
    replace,
    same_size,
    static,
    used,
)

DOMAIN: Final = "com.microsoft"
DTYPES: Final = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})
CHANNELS_PER_THREAD: Final = 2  # group_norm_common_base.h
CHANNELS_PER_BLOCK: Final = 512
GELU_WIDTHS: Final = frozenset({2560, 5120, 10240})  # bias_split_gelu.cc; both halves together
_LAYOUT: Final = [0, 2, 3, 1]  # of a convolution's weights: [O, I, H, W] → [O, H, W, I]


def to_diffusion_operators(model: ir.Model) -> None:
    """Rewrite in place what those kernels take; the graph's inputs and outputs keep their layout."""
    for node in list(model.graph):
        if node.op_type == "Gelu" and not node.domain:
            _bias_split_gelu(node)
    rules = {"Conv": _convolution}
    if model.graph.opset_imports.get("", 0) >= 21:  # before, there was one scale per group
        rules["GroupNormalization"] = _group_norm
    move_channels_last(model, rules)


def group_norm_fits(channels: int, groups: int) -> bool:
    """Whether the CUDA kernel of `GroupNorm` takes this many channels in this many groups.

    Source: ``LaunchGroupNormKernel`` in group_norm_impl.cu of ONNX Runtime 1.31.
    """
    if groups < 1 or channels % groups:
        return False
    width = channels // groups
    return width % CHANNELS_PER_THREAD == 0 and width <= CHANNELS_PER_BLOCK


def _is_constant(value: ir.Value) -> bool:
    """An initializer, or the Cast of one: constant once the graph is loaded."""
    node = value.producer()
    if node is None:
        return value.is_initializer()
    source = node.inputs[0]
    return node.op_type == "Cast" and source is not None and source.is_initializer()


def _convolution(node: ir.Node, layout: ChannelsLast) -> None:
    data, weights, bias = node.inputs[0], node.inputs[1], used(node, 2)
    if data is None or weights is None or data.dtype not in DTYPES or integer(node, "group", 1) != 1:
        return
    if {*map(rank_of, (data, weights, node.outputs[0]))} != {4} or not _is_constant(weights):
        return
    build = inserter(node)
    turned = build.op("Transpose", [weights], "weights", weights.dtype, {"perm": _LAYOUT})
    turned.shape = ir.Shape([weights.shape[axis] for axis in _LAYOUT]) if weights.shape else None
    inputs = [layout.of(data, build, "data"), turned, *([] if bias is None else [bias])]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    layout.move(
        node, build.op("NhwcConv", inputs, "result", node.outputs[0].dtype, attributes, domain=DOMAIN)
    )


def _group_norm(node: ir.Node, layout: ChannelsLast) -> None:
    data, scale, shift = node.inputs[:3]
    rank = rank_of(data) if data is not None else None
    if data is None or scale is None or shift is None or rank not in (3, 4) or data.dtype not in DTYPES:
        return
    channels, groups = static(data, 1), integer(node, "num_groups")
    if not channels or not group_norm_fits(channels, groups):
        return
    silu = _silu(node)
    last = silu[1] if silu else node
    if rank_of(last.outputs[0]) is None:
        return
    build = inserter(node)
    attributes = {
        "epsilon": node.attributes.get_float("epsilon", 1e-5),
        "groups": groups,
        "activation": int(bool(silu)),
        "channels_last": 1,
    }
    pixels = layout.of(data, build, "data")
    added = _added(data, pixels) if rank == 4 else None
    if added is not None:
        result = _skip_group_norm(node, added, (scale, shift), attributes, layout)
    else:
        operands = [_wide(value, build, name) for value, name in ((scale, "scale"), (shift, "shift"))]
        if rank == 3:  # the kernel wants four axes
            one = build.constant([1], "height", ir.DataType.INT64)
            pixels = build.op("Unsqueeze", [pixels, one], "rows", data.dtype)
        inputs = [pixels, *operands]
        result = build.op("GroupNorm", inputs, "normal", data.dtype, attributes, domain=DOMAIN)
        if rank == 3:
            result = build.op("Squeeze", [result, one], "tokens", data.dtype)
    layout.move(last, result, *((node, silu[0]) if silu else ()))


def _silu(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """Sigmoid and product of x · sigmoid(x), if that is all that is done with a node's output."""
    output = node.outputs[0]
    users = {user.op_type: user for user in output.consumers()}
    if set(users) != {"Sigmoid", "Mul"} or len(output.consumers()) != 2 or output.is_graph_output():
        return None
    sigmoid, product = users["Sigmoid"], users["Mul"]
    if only_user(sigmoid) is not product or {*product.inputs} != {output, sigmoid.outputs[0]}:
        return None
    return sigmoid, product


def _wide(vector: ir.Value, build: Inserter, label: str) -> ir.Value:
    """Scale or shift in float32, as the kernel wants them whatever the activation's type is."""
    if vector.dtype == ir.DataType.FLOAT:
        return vector
    to = {"to": int(ir.DataType.FLOAT)}
    return build.op("Cast", [vector], label, ir.DataType.FLOAT, to, shape=vector.shape)


class _Sum(NamedTuple):
    """An activation, what was added to it and, if nobody else reads it, the convolution that gave it."""

    addition: ir.Node
    full: ir.Value
    other: ir.Value  # of the same shape, or one number per channel
    convolution: ir.Node | None


def _added(data: ir.Value, pixels: ir.Value) -> _Sum | None:
    """What an activation is the sum of: ``data`` in the graph as it was, ``pixels`` its twin."""
    plain, twin = data.producer(), pixels.producer()
    if plain is None or twin is None or plain.op_type != "Add" or twin.op_type != "Add":
        return None
    pairs = list(zip(plain.inputs, twin.inputs, strict=True))
    for (first, full), (second, other) in (pairs, pairs[::-1]):
        if first is None or second is None or full is None or other is None:
            return None
        if first.shape is None or second.shape is None or data.shape is None:
            return None
        per_channel = [data.shape[0], data.shape[1], 1, 1]
        if _same(first.shape, data.shape) and any(
            _same(second.shape, wanted) for wanted in (data.shape, per_channel)
        ):
            maker = full.producer()
            alone = first.consumers() == (plain,) and full.consumers() == (twin,) and full is not other
            bare = maker is not None and maker.op_type == "NhwcConv" and not first.is_graph_output()
            return _Sum(twin, full, other, maker if alone and bare else None)
    return None


def _same(one: Iterable[object], other: Iterable[object]) -> bool:
    sizes, others = list(one), list(other)
    return len(sizes) == len(others) and all(map(same_size, sizes, others))


def _skip_group_norm(
    node: ir.Node,
    added: _Sum,
    vectors: tuple[ir.Value, ir.Value],
    attributes: dict[str, float | int],
    layout: ChannelsLast,
) -> ir.Value:
    """The normalisation with the addition before it; others read the sum as its second output."""
    addition, total = added.addition, added.addition.outputs[0]
    build = Inserter(addition, f"{node.outputs[0].name}.channels_last")
    scale, shift = (
        _wide(value, build, name) for value, name in zip(vectors, ("scale", "shift"), strict=True)
    )
    inputs = [added.full, scale, shift, added.other]
    if added.convolution is not None and (bias := used(added.convolution, 2)) is not None:
        inputs.append(bias)  # cuDNN would add it in a kernel of its own
        added.convolution.resize_inputs(2)
    names = [f"{build.prefix}.normal", f"{build.prefix}.sum"]
    kind = None if total.dtype is None else ir.TensorType(total.dtype)
    outputs = [ir.Value(name=name, shape=total.shape, type=kind) for name in names]
    fused = ir.node("SkipGroupNorm", inputs, attributes, outputs=outputs, name=names[0], domain=DOMAIN)
    owner(addition).insert_before(addition, fused)
    layout.exchange(total, outputs[1])
    owner(addition).remove(addition, safe=True)
    return outputs[0]


def _bias_split_gelu(node: ir.Node) -> None:
    """(x + bias) in two halves, the first times GELU of the second."""
    split = node.inputs[0].producer() if node.inputs[0] is not None else None
    product = only_user(node)
    exact = node.attributes.get_string("approximate", "none") == "none"
    if split is None or product is None or split.op_type != "Split" or product.op_type != "Mul" or not exact:
        return
    whole, halves = split.inputs[0], split.outputs
    if whole is None or whole.dtype not in DTYPES or rank_of(whole) != 3 or len(halves) != 2:
        return
    alone = only_user(split) is product and halves[1].consumers() == (node,)
    ours = alone and {*product.inputs} == {halves[0], node.outputs[0]} and node.inputs[0] is halves[1]
    even = {static(half, 2) for half in halves} == {(static(whole, 2) or 0) // 2}
    if not ours or not even or integer(split, "axis") not in (2, -1) or static(whole, 2) not in GELU_WIDTHS:
        return
    addition = whole.producer()
    if addition is None or addition.op_type != "Add" or only_user(addition) is not split:
        return
    for data, bias in (addition.inputs, addition.inputs[::-1]):
        if data is not None and bias is not None and rank_of(data) == 3 and length(bias) == static(whole, 2):
            build = Inserter(product, str(product.outputs[0].name))
            inputs = [data, bias]
            replace(product, build.op("BiasSplitGelu", inputs, "fused", whole.dtype, domain=DOMAIN))
            return
