"""The operators that a bundle's graph may have: how many inputs and outputs, which attributes.

ONNX's own are those of networks that draw, of the opsets that are exported, taken from the schemas of the
package onnx (``onnx_operator_table.py`` of the tests makes the table). Those of com.microsoft are the ones
that our passes write (docs/ContribOperators.md of ONNX Runtime).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Final, NamedTuple

MIN_OPSET: Final = 18
MAX_OPSET: Final = 23
# Domain → versions that a graph may ask for.
DOMAINS: Final[Mapping[str, range]] = {
    "": range(MIN_OPSET, MAX_OPSET + 1),
    "ai.onnx": range(MIN_OPSET, MAX_OPSET + 1),
    "com.microsoft": range(1, 2),
}
# Letter → the field of an attribute that holds the value.
_FIELDS: Final = {
    "f": "f",
    "i": "i",
    "s": "s",
    "t": "t",
    "F": "floats",
    "I": "ints",
    "S": "strings",
}


class Operator(NamedTuple):
    """What a node of one type may have.

    Attributes:
        inputs: Fewest and most; None where there is no upper limit.
        outputs: Fewest and most; None where there is no upper limit.
        attributes: Name → the field that holds the value.
        required: Attributes that must be there.
    """

    inputs: tuple[int, int | None]
    outputs: tuple[int, int | None]
    attributes: Mapping[str, str]
    required: frozenset[str]


def find_operator(domain: str, op_type: str) -> Operator | None:
    """The operator of that name, if there is one."""
    return _table("" if domain == "ai.onnx" else domain).get(op_type)


def operator_lines(domain: str) -> dict[str, str]:
    """Operator → its line of the table."""
    lines = _TABLES.get(domain, "").replace("\n    ", " ").strip().splitlines()
    return dict(line.split(" ", 1) for line in lines)


@cache
def _table(domain: str) -> dict[str, Operator]:
    return {name: _operator(line.split()) for name, line in operator_lines(domain).items()}


def _operator(words: list[str]) -> Operator:
    """Of a line's words: inputs, outputs, and ``name:letter`` with ``!`` where it is required."""
    counts = [
        (int(low), None if high == "*" else int(high))
        for low, high in (word.split("-") for word in words[:2])
    ]
    pairs = [word.split(":") for word in words[2:]]
    return Operator(
        counts[0],
        counts[1],
        {name.rstrip("!"): _FIELDS[letter] for name, letter in pairs},
        frozenset(name[:-1] for name, _ in pairs if name.endswith("!")),
    )


_TABLES: Final[Mapping[str, str]] = {
    "com.microsoft": """
BiasSplitGelu 2-2 1-1
GroupNorm 3-3 1-1 activation!:i channels_last:i epsilon:f groups!:i
MultiHeadAttention 1-10 1-4 mask_filter_value:f num_heads!:i scale:f unidirectional:i
NhwcConv 2-3 1-1 auto_pad:s dilations:I group:i kernel_shape:I pads:I strides:I
SkipGroupNorm 4-5 1-2 activation!:i channels_last:i epsilon:f groups!:i
""",
    "": """
Abs 1-1 1-1
Add 2-2 1-1
And 2-2 1-1
ArgMax 1-1 1-1 axis:i keepdims:i select_last_index:i
ArgMin 1-1 1-1 axis:i keepdims:i select_last_index:i
Atan 1-1 1-1
Attention 3-6 1-4 is_causal:i kv_num_heads:i q_num_heads:i qk_matmul_output_mode:i scale:f softcap:f
    softmax_precision:i
AveragePool 1-1 1-1 auto_pad:s ceil_mode:i count_include_pad:i dilations:I kernel_shape!:I pads:I
    strides:I
BatchNormalization 5-5 1-3 epsilon:f momentum:f training_mode:i
Cast 1-1 1-1 saturate:i to!:i
CastLike 2-2 1-1 saturate:i
Ceil 1-1 1-1
Clip 1-3 1-1
Concat 1-* 1-1 axis!:i
Constant 0-0 1-1 value:t value_float:f value_floats:F value_int:i value_ints:I value_string:s
    value_strings:S
ConstantOfShape 1-1 1-1 value:t
Conv 2-3 1-1 auto_pad:s dilations:I group:i kernel_shape:I pads:I strides:I
ConvTranspose 2-3 1-1 auto_pad:s dilations:I group:i kernel_shape:I output_padding:I output_shape:I
    pads:I strides:I
Cos 1-1 1-1
CumSum 2-2 1-1 exclusive:i reverse:i
DepthToSpace 1-1 1-1 blocksize!:i mode:s
Div 2-2 1-1
Dropout 1-3 1-2 seed:i
Einsum 1-* 1-1 equation!:s
Elu 1-1 1-1 alpha:f
Equal 2-2 1-1
Erf 1-1 1-1
Exp 1-1 1-1
Expand 2-2 1-1
Flatten 1-1 1-1 axis:i
Floor 1-1 1-1
Gather 2-2 1-1 axis:i
GatherElements 2-2 1-1 axis:i
GatherND 2-2 1-1 batch_dims:i
Gelu 1-1 1-1 approximate:s
Gemm 2-3 1-1 alpha:f beta:f transA:i transB:i
GlobalAveragePool 1-1 1-1
Greater 2-2 1-1
GreaterOrEqual 2-2 1-1
GroupNormalization 3-3 1-1 epsilon:f num_groups!:i stash_type:i
HardSigmoid 1-1 1-1 alpha:f beta:f
HardSwish 1-1 1-1
Identity 1-1 1-1
InstanceNormalization 3-3 1-1 epsilon:f
IsInf 1-1 1-1 detect_negative:i detect_positive:i
IsNaN 1-1 1-1
LayerNormalization 2-3 1-3 axis:i epsilon:f stash_type:i
LeakyRelu 1-1 1-1 alpha:f
Less 2-2 1-1
LessOrEqual 2-2 1-1
Log 1-1 1-1
LogSoftmax 1-1 1-1 axis:i
MatMul 2-2 1-1
Max 1-* 1-1
MaxPool 1-1 1-2 auto_pad:s ceil_mode:i dilations:I kernel_shape!:I pads:I storage_order:i strides:I
Mean 1-* 1-1
Min 1-* 1-1
Mish 1-1 1-1
Mod 2-2 1-1 fmod:i
Mul 2-2 1-1
Neg 1-1 1-1
NonZero 1-1 1-1
Not 1-1 1-1
OneHot 3-3 1-1 axis:i
Or 2-2 1-1
PRelu 2-2 1-1
Pad 2-4 1-1 mode:s
Pow 2-2 1-1
RMSNormalization 2-2 1-1 axis:i epsilon:f stash_type:i
Range 3-3 1-1
Reciprocal 1-1 1-1
ReduceL2 1-2 1-1 keepdims:i noop_with_empty_axes:i
ReduceMax 1-2 1-1 keepdims:i noop_with_empty_axes:i
ReduceMean 1-2 1-1 keepdims:i noop_with_empty_axes:i
ReduceMin 1-2 1-1 keepdims:i noop_with_empty_axes:i
ReduceProd 1-2 1-1 keepdims:i noop_with_empty_axes:i
ReduceSum 1-2 1-1 keepdims:i noop_with_empty_axes:i
ReduceSumSquare 1-2 1-1 keepdims:i noop_with_empty_axes:i
Relu 1-1 1-1
Reshape 2-2 1-1 allowzero:i
Resize 1-4 1-1 antialias:i axes:I coordinate_transformation_mode:s cubic_coeff_a:f exclude_outside:i
    extrapolation_value:f keep_aspect_ratio_policy:s mode:s nearest_mode:s
RotaryEmbedding 3-4 1-1 interleaved:i num_heads:i rotary_embedding_dim:i
Round 1-1 1-1
ScatterElements 3-3 1-1 axis:i reduction:s
ScatterND 3-3 1-1 reduction:s
Selu 1-1 1-1 alpha:f gamma:f
Shape 1-1 1-1 end:i start:i
Sigmoid 1-1 1-1
Sign 1-1 1-1
Sin 1-1 1-1
Size 1-1 1-1
Slice 3-5 1-1
Softmax 1-1 1-1 axis:i
Softplus 1-1 1-1
SpaceToDepth 1-1 1-1 blocksize!:i
Split 1-2 1-* axis:i num_outputs:i
Sqrt 1-1 1-1
Squeeze 1-2 1-1
Sub 2-2 1-1
Sum 1-* 1-1
Tanh 1-1 1-1
Tile 2-2 1-1
TopK 2-2 2-2 axis:i largest:i sorted:i
Transpose 1-1 1-1 perm:I
Trilu 1-2 1-1 upper:i
Unsqueeze 2-2 1-1
Where 3-3 1-1
Xor 2-2 1-1
""",
}
