"""What an ONNX graph consists of, read from the file's bytes without the package onnx.

Of ONNX's messages (onnx.proto) only these fields are needed: ModelProto.graph = 7; GraphProto.node = 1,
.initializer = 5, .input = 11, .value_info = 13; NodeProto.input = 1, .output = 2, .name = 3, .op_type = 4,
.domain = 7; TensorProto.dims = 1, .data_type = 2, .name = 8, .raw_data = 9; ValueInfoProto.name = 1. What an
initializer says of its place is read as `sdrt.runtime.admission.graph_messages` has it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.admission.graph_messages import ELEMENT_TYPES, MESSAGES
from sdrt.runtime.admission.wire_format import BYTES, VARINT, parse, read_fields, write_fields

_GRAPH: Final = 7
_NODE, _INITIALIZER, _INPUT, _VALUE_INFO = 1, 5, 11, 13
_DIMS, _DATA_TYPE, _TENSOR_NAME, _RAW_DATA = 1, 2, 8, 9
BFLOAT16: Final = 16  # TensorProto.BFLOAT16: NumPy has no such type, and its bits are uint16 here
_TYPE_NUMBERS: Final = {
    **{dtype: number for number, (dtype, _, _) in ELEMENT_TYPES.items()},
    "uint16": BFLOAT16,
}
_MAX_BYTES: Final = (1 << 31) - (1 << 20)


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the main graph."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Initializer:
    """A constant of the main graph.

    Attributes:
        dtype: NumPy's name of its type of number; of bfloat16, which NumPy lacks, ``uint16``.
        shape: Its sizes.
        data: Its numbers, if they are in the graph itself.
        file: The file that they are in otherwise, from the graph's folder on.
        offset: Where they begin there.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview | None
    file: str = ""
    offset: int = 0

    def read(self, folder: Path, rows: int | None = None) -> NDArray[Any]:
        """The numbers.

        Args:
            folder: That of the graph.
            rows: Only so many along the first axis, where there are more.

        Raises:
            OSError: The file cannot be read.
            ValueError: There are fewer than ``shape`` says, or they are not kept as bytes.
        """
        shape = (
            self.shape if rows is None else (*(min(size, rows) for size in self.shape[:1]), *self.shape[1:])
        )
        count = math.prod(shape)
        if self.data is not None:
            return np.frombuffer(self.data, self.dtype, count).reshape(shape)
        if not self.file:
            raise ValueError("its numbers are not kept as bytes")
        return np.fromfile(folder / self.file, self.dtype, count, offset=self.offset).reshape(shape)

    def within(self, content: memoryview) -> NDArray[Any]:
        """The numbers, where they are in the content of the file, or in ``data``.

        Raises:
            ValueError: There are fewer than ``shape`` says.
        """
        offset, count = (self.offset if self.data is None else 0), math.prod(self.shape)
        if (
            min(self.shape, default=0) < 0
            or not 0 <= offset <= len(content) - count * np.dtype(self.dtype).itemsize
        ):
            raise ValueError(f"a weight of the shape {list(self.shape)} lies beyond the end of its numbers")
        return np.frombuffer(content, self.dtype, count, offset).reshape(self.shape)


def read_graph(model: bytes) -> tuple[list[Node], dict[str, Initializer]]:
    """The nodes of a model's main graph, and its initializers by name.

    Args:
        model: An ONNX file's bytes; weights may lie elsewhere.

    Raises:
        ValueError: Not the bytes of a protobuf message, or an initializer of no known type.
    """
    nodes: list[Node] = []
    constants: dict[str, Initializer] = {}
    for number, graph in _fields(memoryview(model)):
        if number != _GRAPH:
            continue
        for inner, message in _fields(graph):
            if inner == _NODE:
                nodes.append(_node(message))
            elif inner == _INITIALIZER:
                tensor = parse(message, "tensor", MESSAGES)
                constants[tensor.get("name", "")] = _initializer(tensor)
    return nodes, constants


def with_initializers(model: bytes, arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """A model with other numbers, and types, for some of its initializers; they lie in the graph itself.

    Args:
        model: An ONNX file's bytes.
        arrays: Initializer → its numbers. What the graph says of their types elsewhere is left out.

    Raises:
        ValueError: It would have more than protobuf's 2 GB.
    """
    if len(model) + sum(array.nbytes for array in arrays.values()) > _MAX_BYTES:
        raise ValueError("a graph holds at most 2 GB of numbers itself")

    def graph_field(number: int, wire: int, value: Any) -> Iterator[tuple[int, int, Any]]:
        if number == _VALUE_INFO and _name_of(value, 1) in arrays:
            return
        if number == _INITIALIZER and (name := _name_of(value, _TENSOR_NAME)) in arrays:
            value = _tensor(name, arrays[name])
        yield number, wire, value

    def model_field(number: int, wire: int, value: Any) -> tuple[int, int, Any]:
        if number == _GRAPH:
            value = write_fields(field for found in read_fields(value) for field in graph_field(*found))
        return number, wire, value

    return write_fields(model_field(*field) for field in read_fields(memoryview(model)))


def with_inputs(
    model: bytes, inputs: Mapping[str, tuple[str, tuple[int, ...]]], initializers: Collection[str]
) -> bytes:
    """A model with inputs in place of some initializers, or of what single nodes make of them.

    Args:
        model: An ONNX file's bytes.
        inputs: Name of the value → its dtype and shape.
        initializers: Those whose place they take. They are left out, as are nodes that make an input.
    """

    def stays(number: int, _wire: int, value: Any) -> bool:
        if number == _NODE:
            return not any(name in inputs for name in _node(value).outputs)
        if number == _INITIALIZER:
            return _name_of(value, _TENSOR_NAME) not in initializers
        return number != _VALUE_INFO or _name_of(value, 1) not in inputs

    def model_field(number: int, wire: int, value: Any) -> tuple[int, int, Any]:
        if number == _GRAPH:
            kept = [field for field in read_fields(value) if stays(*field)]
            made = [(_INPUT, BYTES, _value_info(name, *kind)) for name, kind in inputs.items()]
            value = write_fields([*kept, *made])
        return number, wire, value

    return write_fields(model_field(*field) for field in read_fields(memoryview(model)))


def _value_info(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """ValueInfoProto: name = 1, type = 2; TypeProto.tensor_type = 1, with elem_type = 1 and shape = 2."""
    sizes = write_fields((1, BYTES, write_fields([(1, VARINT, size)])) for size in shape)
    tensor = write_fields([(1, VARINT, _TYPE_NUMBERS[dtype]), (2, BYTES, sizes)])
    return write_fields([(1, BYTES, name.encode()), (2, BYTES, write_fields([(1, BYTES, tensor)]))])


def _tensor(name: str, array: NDArray[Any]) -> bytes:
    return write_fields(
        [
            *((_DIMS, VARINT, size) for size in array.shape),
            (_DATA_TYPE, VARINT, _TYPE_NUMBERS[str(array.dtype)]),
            (_TENSOR_NAME, BYTES, name.encode()),
            (_RAW_DATA, BYTES, array.tobytes()),
        ]
    )


def _initializer(tensor: dict[str, Any]) -> Initializer:
    kind = ELEMENT_TYPES.get(tensor.get("data_type", 0))
    if kind is None:
        raise ValueError(f"{tensor.get('name')} is of an unknown type")
    dtype = "uint16" if kind[0] == "bfloat16" else kind[0]
    place = {pair["key"]: pair["value"] for pair in tensor.get("external_data", [])}
    return Initializer(
        dtype,
        tuple(tensor.get("dims", ())),
        tensor.get("raw_data"),
        place.get("location", ""),
        int(place.get("offset", 0)),
    )


def _node(message: memoryview) -> Node:
    texts: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: [], 7: []}
    for field, value in _fields(message):
        if field in texts:
            texts[field].append(_text(value))
    name, op_type, domain = ("".join(texts[field]) for field in (3, 4, 7))
    return Node(name, op_type, tuple(texts[1]), tuple(texts[2]), domain)


def _name_of(message: memoryview, number: int) -> str:
    return next((_text(value) for field, value in _fields(message) if field == number), "")


def _text(value: memoryview) -> str:
    return bytes(value).decode()


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and contents of every field that holds bytes; numbers are passed over."""
    for number, wire, value in read_fields(message):
        if wire == BYTES:
            yield number, value
