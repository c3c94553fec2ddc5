"""A graph whose matrices are inputs: they lie in our device memory, where other weights are a copy.

ONNX Runtime reads the second operand of a ``MatMul`` on a GPU where it is, so an input costs no more than an
initializer, and a captured graph goes on to read from the same address. What else a LoRA may change
(kernels of convolutions, biases, norms) must be constant when a graph is loaded: it is put into the graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from numpy.typing import NDArray

from sdrt.runtime.backends.onnx_graph import Initializer, Node, read_graph, with_initializers, with_inputs

_CAST: Final = "Cast"
_MATRIX_OPERATORS: Final = frozenset({"MatMul", "Gemm"})
_SECOND: Final = 1


class WeightInput(NamedTuple):
    """An input in an initializer's place.

    Attributes:
        name: Of the input: the initializer's, or of what a ``Cast`` makes of it.
        initializer: Whose numbers it takes.
        dtype: As NumPy has it; of bfloat16 ``uint16``.
        shape: The initializer's.
    """

    name: str
    initializer: str
    dtype: str
    shape: tuple[int, ...]


def matrices(model: bytes) -> list[WeightInput]:
    """The initializers of a graph that only matrix products read, as inputs in their place.

    Args:
        model: An ONNX file's bytes.
    """
    nodes, initializers = read_graph(model)
    readers: dict[str, list[tuple[Node, int]]] = defaultdict(list)
    for node in nodes:
        for index, value in enumerate(node.inputs):
            readers[value].append((node, index))
    found = []
    for name, own in initializers.items():
        value, dtype = name, own.dtype
        if [node.op_type for node, _ in readers[name]] == [_CAST]:
            # Of weights that are stored as float16: the graph computes in float32.
            value, dtype = readers[name][0][0].outputs[0], "float32"
        if _is_matrix(own) and readers[value] and all(map(_multiplies, readers[value])):
            found.append(WeightInput(value, name, dtype, own.shape))
    return found


def _is_matrix(own: Initializer) -> bool:
    return len(own.shape) == 2 and own.dtype in ("float16", "float32", "uint16")


def _multiplies(reader: tuple[Node, int]) -> bool:
    node, index = reader
    return node.op_type in _MATRIX_OPERATORS and not node.domain and index == _SECOND


def with_weights(model: bytes, inputs: list[WeightInput], constants: Mapping[str, NDArray[Any]]) -> bytes:
    """The graph with inputs in place of its matrices, and other numbers for other initializers.

    Args:
        model: An ONNX file's bytes.
        inputs: What `matrices` found in it.
        constants: Initializer → its numbers, which become part of the graph.

    Raises:
        ValueError: The numbers are more than a graph can hold itself.
    """
    kinds = {entry.name: (entry.dtype, entry.shape) for entry in inputs}
    return with_initializers(with_inputs(model, kinds, {entry.initializer for entry in inputs}), constants)
