"""The table of `sdrt.runtime.admission.graph_operators`, made from the schemas of the package onnx.

``PYTHONPATH=tests python -m support.references.onnx_operator_table`` prints the table's lines.
"""

from __future__ import annotations

import textwrap

import onnx.defs
from onnx.defs import OpSchema

from sdrt.runtime.admission.graph_operators import MAX_OPSET, MIN_OPSET

MANY = 2**31 - 1  # how ONNX writes that there is no upper limit
# Arithmetic and shapes of networks, each with tensors alone. Not among them: control flow, sequences, texts,
# random numbers, training, and what is quantised.
NAMES = (
    "Abs Add And ArgMax ArgMin Atan Attention AveragePool BatchNormalization Cast CastLike Ceil Clip "
    "Concat Constant ConstantOfShape Conv ConvTranspose Cos CumSum DepthToSpace Div Dropout Einsum Elu "
    "Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool "
    "Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization IsInf "
    "IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max MaxPool Mean Min Mish "
    "Mod Mul Neg NonZero Not OneHot Or PRelu Pad Pow RMSNormalization Range Reciprocal ReduceL2 ReduceMax "
    "ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize RotaryEmbedding Round "
    "ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Size Slice Softmax Softplus SpaceToDepth Split "
    "Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor "
)
LETTERS = {
    OpSchema.AttrType.FLOAT: "f",
    OpSchema.AttrType.INT: "i",
    OpSchema.AttrType.STRING: "s",
    OpSchema.AttrType.TENSOR: "t",
    OpSchema.AttrType.FLOATS: "F",
    OpSchema.AttrType.INTS: "I",
    OpSchema.AttrType.STRINGS: "S",
}


def operators() -> dict[str, str]:
    """Operator → its line: what any version of it admits that the opsets have which are exported."""
    return {name: line for name in NAMES.split() if (line := _line(_schemas(name)))}


def _schemas(name: str) -> list[OpSchema]:
    versions = {}
    for opset in range(MIN_OPSET, MAX_OPSET + 1):
        if onnx.defs.has(name, opset):
            schema = onnx.defs.get_schema(name, opset)
            versions[schema.since_version] = schema
    return list(versions.values())


def _line(schemas: list[OpSchema]) -> str:
    inputs, outputs = (
        (min(low for low, _ in counts), max(high for _, high in counts))
        for counts in (
            [(schema.min_input, schema.max_input) for schema in schemas],
            [(schema.min_output, schema.max_output) for schema in schemas],
        )
    )
    attributes: dict[str, str] = {}
    for schema in schemas:
        for name, attribute in schema.attributes.items():
            if attribute.type in LETTERS:
                attributes[name] = LETTERS[attribute.type]
    required = {
        name
        for name in attributes
        if all(name in schema.attributes and schema.attributes[name].required for schema in schemas)
    }
    words = [f"{name}{'!' if name in required else ''}:{kind}" for name, kind in sorted(attributes.items())]
    return " ".join([_range(*inputs), _range(*outputs), *words])


def _range(low: int, high: int) -> str:
    return f"{low}-{'*' if high == MANY else high}"


if __name__ == "__main__":
    for operator, line in operators().items():
        print("\n".join(textwrap.wrap(f"{operator} {line}", 100, subsequent_indent="    ")))
