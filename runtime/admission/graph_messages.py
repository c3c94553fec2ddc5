"""ONNX's messages (onnx.proto3 of onnx 1.23) as far as a bundle's graphs have them.

What is left out has no place in a bundle, so that `sdrt.runtime.admission.wire_format.parse` refuses it:
functions, training, subgraphs, sparse tensors, quantisation, sequences and maps.
"""

from __future__ import annotations

from typing import Final

from sdrt.runtime.admission.wire_format import Field, Messages

_PAIRS: Final = Field("metadata_props", "pair", repeated=True)
_DOC: Final = Field("doc_string", "text")

MESSAGES: Final[Messages] = {
    "model": {
        1: Field("ir_version", "int"),
        2: Field("producer_name", "text"),
        3: Field("producer_version", "text"),
        4: Field("domain", "text"),
        5: Field("model_version", "int"),
        6: _DOC,
        7: Field("graph", "graph"),
        8: Field("opset_import", "opset", repeated=True),
        14: _PAIRS,
    },
    "opset": {1: Field("domain", "text"), 2: Field("version", "int")},
    "pair": {1: Field("key", "text"), 2: Field("value", "text")},
    "graph": {
        1: Field("node", "node", repeated=True),
        2: Field("name", "text"),
        5: Field("initializer", "tensor", repeated=True),
        10: _DOC,
        11: Field("input", "value", repeated=True),
        12: Field("output", "value", repeated=True),
        13: Field("value_info", "value", repeated=True),
        16: _PAIRS,
    },
    "node": {
        1: Field("input", "text", repeated=True),
        2: Field("output", "text", repeated=True),
        3: Field("name", "text"),
        4: Field("op_type", "text"),
        5: Field("attribute", "attribute", repeated=True),
        6: _DOC,
        7: Field("domain", "text"),
        8: Field("overload", "text"),
        9: _PAIRS,
    },
    "attribute": {
        1: Field("name", "text"),
        2: Field("f", "float"),
        3: Field("i", "int"),
        4: Field("s", "text"),
        5: Field("t", "tensor"),
        7: Field("floats", "float", repeated=True),
        8: Field("ints", "int", repeated=True),
        9: Field("strings", "text", repeated=True),
        13: _DOC,
        20: Field("type", "int"),
    },
    "tensor": {
        1: Field("dims", "int", repeated=True),
        2: Field("data_type", "int"),
        4: Field("float_data", "float", repeated=True),
        5: Field("int32_data", "int", repeated=True),
        7: Field("int64_data", "int", repeated=True),
        8: Field("name", "text"),
        9: Field("raw_data", "bytes"),
        10: Field("double_data", "double", repeated=True),
        11: Field("uint64_data", "int", repeated=True),
        12: _DOC,
        13: Field("external_data", "pair", repeated=True),
        14: Field("data_location", "int"),
        16: _PAIRS,
    },
    "value": {
        1: Field("name", "text"),
        2: Field("type", "type"),
        3: _DOC,
        4: _PAIRS,
    },
    "type": {1: Field("tensor_type", "tensor_type"), 6: Field("denotation", "text")},
    "tensor_type": {1: Field("elem_type", "int"), 2: Field("shape", "shape")},
    "shape": {1: Field("dim", "dim", repeated=True)},
    "dim": {1: Field("dim_value", "int"), 2: Field("dim_param", "text"), 3: Field("denotation", "text")},
}

# TensorProto.DataType → its name and bytes of an element, and the field for values that are not raw.
ELEMENT_TYPES: Final = {
    1: ("float32", 4, "float_data"),
    2: ("uint8", 1, "int32_data"),
    3: ("int8", 1, "int32_data"),
    4: ("uint16", 2, "int32_data"),
    5: ("int16", 2, "int32_data"),
    6: ("int32", 4, "int32_data"),
    7: ("int64", 8, "int64_data"),
    9: ("bool", 1, "int32_data"),
    10: ("float16", 2, "int32_data"),
    11: ("float64", 8, "double_data"),
    12: ("uint32", 4, "uint64_data"),
    13: ("uint64", 8, "uint64_data"),
    16: ("bfloat16", 2, "int32_data"),
}
EXTERNAL: Final = 1  # TensorProto.data_location
# AttributeProto.type → the field that holds the value.
ATTRIBUTE_TYPES: Final = {
    1: "f",
    2: "i",
    3: "s",
    4: "t",
    6: "floats",
    7: "ints",
    8: "strings",
}
