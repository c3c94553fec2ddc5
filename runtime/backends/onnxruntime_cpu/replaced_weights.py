"""Other weights for a graph on the CPU: where its initializers are in what ONNX Runtime prepared of it.

A prepared graph has most initializers under the name that the bundle's graph has (or under that of the
``Cast`` that widened them); convolutions have theirs in blocks of output channels, under names of ONNX
Runtime's own. So a session with other weights takes the prepared graph, all of which stays mapped, and only
what changes is packed anew: the numbers, to the bit, of a bundle that was exported with these weights.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.backends.executor import check_weights, first_line
from sdrt.runtime.backends.onnx_graph import Node, read_graph, with_initializers
from sdrt.runtime.backends.onnxruntime_sessions import cpu_options
from sdrt.runtime.errors import BackendError

if TYPE_CHECKING:
    from sdrt.runtime.backends.onnxruntime_cpu.prepared_graphs import PreparedGraph

Array = NDArray[Any]
Layout = Callable[[Array], Array]

# Nodes behind an initializer that leave its numbers as they are.
_MOVES: Final = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_WEIGHTS_FOLDER: Final = "session.model_external_initializers_file_folder_path"
_BLOCKED_DOMAIN: Final = "com.microsoft.nchwc"
_BLOCKS: Final = (8, 16)  # channels, by the width of the CPU's registers
_COMPARED: Final = 1 << 16  # numbers at the beginning of a tensor that show its layout


class Place(NamedTuple):
    """Where a prepared graph has an initializer of the bundle's.

    Attributes:
        name: The name there.
        shape: The shape there.
        layout: What makes the numbers there of the bundle's.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout


class Graph:
    """An ONNX file's nodes and initializers, and who reads what."""

    def __init__(self, file: Path) -> None:
        """Read the file.

        Args:
            file: The ONNX file.
        """
        self.folder = file.parent
        self.content = file.read_bytes()
        nodes, self.initializers = read_graph(self.content)
        self.readers: dict[str, list[tuple[Node, int]]] = defaultdict(list)
        self.blocked: dict[str, Node] = {}  # convolutions in blocks of channels, by name
        for node in nodes:
            for index, name in enumerate(node.inputs):
                self.readers[name].append((node, index))
            if node.domain == _BLOCKED_DOMAIN and node.op_type == "Conv":
                self.blocked[node.name] = node

    def uses(self, name: str) -> Iterator[tuple[Node, int, str]]:
        """Node, number of the input and name of the value, of each use of an initializer's numbers."""
        for node, index in self.readers[name]:
            if index == 0 and (node.op_type in _MOVES or self._looks_up_all(node)):
                yield from self.uses(node.outputs[0])
            else:
                yield node, index, name

    def _looks_up_all(self, node: Node) -> bool:
        """Whether it is a lookup of all rows of a table, such as that of positions."""
        indices = self.initializers.get(node.inputs[1]) if node.op_type == "Gather" else None
        if indices is None or indices.dtype != "int64":
            return False
        rows = indices.read(self.folder).reshape(-1)
        return np.array_equal(rows, np.arange(rows.size))


class ReplacedWeights:
    """What sessions with certain weights are made of; they read them in place, and must not outlive this."""

    def __init__(
        self,
        ort: Any,
        prepared: tuple[PreparedGraph, dict[str, Array]] | None,
        plain: Callable[[], bytes],
        folder: Path,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            ort: The module onnxruntime.
            prepared: A prepared graph and its initializers, if it has all of them.
            plain: Gives the bundle's graph with these weights inside.
            folder: The bundle's graph's.
        """
        self._ort, self._prepared, self._plain, self._folder = ort, prepared, plain, folder
        self._values: list[Any] = []

    def load(self, threads: int) -> Any:
        """A session with that many threads inside one operator.

        Raises:
            BackendError: ONNX Runtime refuses it.
        """
        options = cpu_options(self._ort, threads)
        if self._prepared is not None:
            graph, arrays = self._prepared
            for name, array in arrays.items():
                value = self._ort.OrtValue.ortvalue_from_numpy(array)
                options.add_initializer(name, value)
                self._values.append(value)
            session = graph.load(options)
            if session is not None:
                return session
            options = cpu_options(self._ort, threads)
        return self._load_plain(options)

    def _load_plain(self, options: Any) -> Any:
        logging.getLogger("sdrt").info("loading %s anew, with other weights", self._folder)
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(self._folder))
        try:
            return self._ort.InferenceSession(
                self._plain(), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BackendError(
                f"ONNX Runtime refuses other weights for {self._folder}: {first_line(error)}"
            ) from error


class ReplaceableWeights:
    """The initializers of a component's graph, and where they are in the prepared one."""

    def __init__(self, ort: Any, model: Path, prepared: PreparedGraph | None) -> None:
        """Nothing is read yet.

        Args:
            ort: The module onnxruntime.
            model: The bundle's ONNX file.
            prepared: What was prepared of it, if anything was.
        """
        self._ort, self._model, self._prepared_graph = ort, model, prepared
        self._places: dict[str, tuple[Place, ...] | None] = {}

    @cached_property
    def _graph(self) -> Graph:
        return Graph(self._model)

    @cached_property
    def _prepared(self) -> Graph | None:
        graph = self._prepared_graph
        return Graph(graph.file) if graph is not None and graph.exists() else None

    def with_weights(self, weights: Mapping[str, Array]) -> ReplacedWeights:
        """What has these weights, and the graph's own else.

        Args:
            weights: See `Executor.replace_weights`.

        Raises:
            BackendError: A name that is not an initializer's, another shape, or another type.
        """
        check_weights(weights, self._own, str(self._model))
        arrays = self._for_prepared(weights)
        prepared = None
        if self._prepared_graph is not None and arrays is not None:
            prepared = (self._prepared_graph, arrays)
        plain = partial(with_initializers, self._graph.content, dict(weights))
        return ReplacedWeights(self._ort, prepared, plain, self._graph.folder)

    def _own(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        found = self._graph.initializers.get(name)
        return None if found is None else (found.dtype, found.shape)

    def _for_prepared(self, weights: Mapping[str, Array]) -> dict[str, Array] | None:
        """The initializers of the prepared graph that hold these; None where it does not have all of them."""
        found: dict[str, Array] = {}
        for name, array in weights.items():
            places = self._places_of(name)
            if places is None or str(array.dtype) != "float32":
                return None
            for place in places:
                found[place.name] = np.ascontiguousarray(place.layout(array)).reshape(place.shape)
        return found

    def _places_of(self, name: str) -> tuple[Place, ...] | None:
        if name not in self._places:
            self._places[name] = self._find_places(name)
        return self._places[name]

    def _find_places(self, name: str) -> tuple[Place, ...] | None:
        """Every place of an initializer, or None unless it is certain that these are all and how they lie."""
        prepared = self._prepared
        if prepared is None:
            return None
        uses = list(self._graph.uses(name))
        targets: dict[str, bool] = {}  # whether it is a convolution's kernel in blocks
        for node, index, value in uses:
            blocked = prepared.blocked.get(f"{node.outputs[0]}_nchwc") if node.op_type == "Conv" else None
            targets[value if blocked is None else blocked.inputs[index]] = blocked is not None and index == 1
        # One use that ONNX Runtime folded into something else would go on with the old numbers.
        if sum(len(prepared.readers[target]) for target in targets) != len(uses):
            return None
        places = [self._place(name, target, in_blocks) for target, in_blocks in targets.items()]
        return None if None in places else tuple(place for place in places if place is not None)

    def _place(self, name: str, target: str, in_blocks: bool) -> Place | None:
        """How the numbers lie there, by comparing those that the bundle has."""
        assert self._prepared is not None
        own, there = self._graph.initializers[name], self._prepared.initializers.get(target)
        if there is None or there.dtype != "float32":
            return None
        rows = max(_COMPARED // max(math.prod(own.shape[1:]), 1) // max(_BLOCKS), 1) * max(_BLOCKS)
        base = own.read(self._graph.folder, rows).astype(np.float32)
        content = there.read(self._prepared.folder, rows).reshape(-1)
        fitting = [
            layout
            for layout in _layouts(own.shape, there.shape, in_blocks)
            if _begins_with(content, layout(base))
        ]
        return Place(target, there.shape, fitting[0]) if len(fitting) == 1 else None


def _begins_with(content: Array, numbers: Array) -> bool:
    """Bit for bit, and as far as both go."""
    flat = np.ascontiguousarray(numbers).reshape(-1)[: content.size]
    return content[: flat.size].tobytes() == flat.tobytes()


def _layouts(own: tuple[int, ...], there: tuple[int, ...], in_blocks: bool) -> list[Layout]:
    """How an initializer may lie in a prepared graph that has ``there`` for its shape ``own``."""
    if not in_blocks:
        padding = there[0] - own[0] if len(own) == len(there) == 1 else 0
        if padding > 0:  # a convolution's bias: channels up to a whole block
            return [partial(np.pad, pad_width=(0, padding))]
        return [_as_it_is] if math.prod(own) == math.prod(there) else []
    channels, pixels = own[1], math.prod(own[2:])
    return [
        partial(_in_blocks, outputs=block, inputs=inputs)
        for block in _BLOCKS
        # Of whole blocks of kernels of one pixel the two are the same.
        for inputs in ((block, 1) if pixels > 1 or channels % block else (block,))
        if _whole(own[0], block) * _whole(channels, inputs) * pixels == math.prod(there)
    ]


def _as_it_is(array: Array) -> Array:
    return array


def _in_blocks(kernel: Array, *, outputs: int, inputs: int) -> Array:
    """A convolution's kernel [O, I, H, W] as [O / outputs, I / inputs, H, W, inputs, outputs].

    MLAS, "OIHWBiBo" and, for few input channels, "OIHWBo". What is missing in the last blocks is zero.
    """
    missing = (_whole(len(kernel), outputs) - len(kernel), _whole(kernel.shape[1], inputs) - kernel.shape[1])
    full = np.pad(kernel, ((0, missing[0]), (0, missing[1]), (0, 0), (0, 0))) if any(missing) else kernel
    o, i, h, w = full.shape
    return full.reshape(o // outputs, outputs, i // inputs, inputs, h, w).transpose(0, 2, 4, 5, 3, 1)


def _whole(count: int, block: int) -> int:
    """The count up to whole blocks."""
    return count + -count % block
