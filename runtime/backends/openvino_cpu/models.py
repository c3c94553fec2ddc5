"""A component's graph compiled by OpenVINO for one shape, and the compiled models kept from run to run.

OpenVINO compiles for static sizes: with dynamic ones a U-Net takes about twice as long. Compiling the
embedded U-Net takes most of a second; what it exports is loaded in half of that.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from numpy.typing import NDArray

from sdrt.runtime.backends.executor import GraphTensor, check_tensors, check_weights, first_line
from sdrt.runtime.backends.openvino_cpu.hoisting import hoist
from sdrt.runtime.backends.openvino_cpu.library import NAME
from sdrt.runtime.bundle.families.record import ComponentSpec
from sdrt.runtime.bundle.prepared_folder import PreparedFolder, Source
from sdrt.runtime.errors import BackendError
from sdrt.runtime.system.c_library import kept_signal_stack

FORMAT: Final = 2  # a change of what is written, or of how it is loaded
MAIN, LAYOUT = "main.blob", "layout.json"
# Each shape's file holds every weight once more: worth it for small models, where compiling is what a start
# waits for.
MOST_BYTES: Final = 500_000_000
SMALL_INPUTS: Final = 64 << 10  # bytes: results of larger inputs are not kept
MOST_KEPT: Final = 16 << 20  # bytes of results
NO_WEIGHTS: Final[Mapping[str, NDArray[Any]]] = MappingProxyType({})


class CompileTarget(NamedTuple):
    """What a model is compiled for.

    Attributes:
        inputs: The sizes of every input, by name, for one stream.
        streams: How many calls run at the same time.
        threads: The threads of all of them together.
    """

    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    streams: int
    threads: int


class Kept:
    """The last results of a part by its inputs, where those are small: of the timesteps that were seen."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._found: OrderedDict[bytes, NDArray[Any]] = OrderedDict()
        self._bytes = 0

    def get(self, key: bytes) -> NDArray[Any] | None:
        """What `put` was given, if it is still there.

        Args:
            key: The inputs' bytes.
        """
        found = self._found.get(key)
        if found is not None:
            self._found.move_to_end(key)
        return found

    def put(self, key: bytes, results: NDArray[Any]) -> None:
        """Keep a copy; those that were asked for the longest ago make room.

        Args:
            key: The inputs' bytes. If there are many, nothing is kept.
            results: All results in one array.
        """
        if len(key) > SMALL_INPUTS:
            return
        self._found[key] = results.copy()
        self._bytes += results.nbytes
        while self._bytes > MOST_KEPT:
            _, oldest = self._found.popitem(last=False)
            self._bytes -= oldest.nbytes


class Part:
    """A compiled part that need not run at every call: see `hoisting.Hoisted`.

    Attributes:
        compiled: An ``openvino.CompiledModel``.
        inputs: The names of what it reads, in its order.
        results: The names under which the rest reads its results, in their order.
        kept: Results of inputs that it has seen.
    """

    def __init__(self, compiled: Any, inputs: Sequence[str], results: Sequence[str]) -> None:
        """Take what the attributes say."""
        self.compiled, self.inputs, self.results = compiled, tuple(inputs), tuple(results)
        self.kept = Kept()


class Compiled:
    """A component compiled for one shape.

    Attributes:
        main: The ``openvino.CompiledModel`` that runs at every call.
        parts: The parts that run when their inputs have changed.
    """

    def __init__(self, main: Any, parts: Sequence[Part]) -> None:
        """Made by `ModelFile.compiled`."""
        self.main, self.parts = main, tuple(parts)


class ModelFile:
    """A component's ONNX file.

    Attributes:
        is_small: Whether what is compiled of it may be kept, in memory and from run to run.
    """

    def __init__(self, ov: Any, model: Path, spec: ComponentSpec, source: Source | None) -> None:
        """Nothing is read yet.

        Args:
            ov: The module openvino.
            model: The ONNX file.
            spec: The component's inputs and outputs.
            source: The bundle's files that the graph consists of; without them no compiled model is taken
                from the cache, nor put there.
        """
        self._ov, self._core = ov, ov.Core()
        self._model, self._spec = model, spec
        self.is_small = source is not None and _is_small(source)
        self._source = source if self.is_small else None

    def compiled(self, target: CompileTarget, weights: Mapping[str, NDArray[Any]] = NO_WEIGHTS) -> Compiled:
        """The component compiled for a shape, from the cache where it is there.

        Args:
            target: What it is compiled for.
            weights: See `Executor.replace_weights`; of what is compiled with them nothing is kept.

        Raises:
            BackendError: OpenVINO refuses the graph or the shape, or the graph has no such weights.
            BundleError: It is not the graph that the manifest describes.
        """
        if self._source is None or weights:
            return self._compile(self._model, target, weights)
        place = self._place(self._source, target)
        if (kept := self._load(place, target)) is not None:
            return kept
        fresh: list[Compiled] = []

        def fill(model: Path, folder: Path) -> None:
            fresh.append(self._compile(model, target))
            _save(fresh[0], folder)

        place.make(fill)
        # The file itself where there is no room for a copy, and to say what is wrong with the graph.
        return fresh[0] if fresh else self._compile(self._model, target)

    def read(self, model: Path | None = None) -> Any:
        """The graph as an ``openvino.Model`` with dynamic sizes.

        Args:
            model: A copy of the file to read in its place.

        Raises:
            BackendError: OpenVINO refuses the graph.
            BundleError: It is not the graph that the manifest describes.
        """
        try:
            graph = self._core.read_model(model or self._model)
        except Exception as error:  # also UnicodeDecodeError, of a name
            raise BackendError(f"OpenVINO refuses {self._model}: {reason(error)}") from error
        names = {entry.name for entry in (*self._spec.inputs, *self._spec.outputs)}
        inputs, outputs = (
            [_tensor(port, names) for port in ports] for ports in (graph.inputs, graph.outputs)
        )
        check_tensors(inputs, outputs, self._spec, str(self._model))
        return graph

    def check(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Refuse weights that the graph does not have.

        Raises:
            BackendError: There are such, or OpenVINO refuses the graph.
            BundleError: It is not the graph that the manifest describes.
        """
        if weights:
            self._check(_constants(self.read()), weights)

    def _check(self, constants: Mapping[str, Any], weights: Mapping[str, NDArray[Any]]) -> None:
        def own(name: str) -> tuple[str, tuple[int, ...]] | None:
            if name not in constants:
                return None
            kind = constants[name].get_element_type().get_type_name()
            return _DTYPES.get(kind, kind), tuple(constants[name].get_output_shape(0))

        check_weights(weights, own, str(self._model))

    def _replace(self, graph: Any, weights: Mapping[str, NDArray[Any]]) -> None:
        constants = _constants(graph)
        self._check(constants, weights)
        for name, array in weights.items():
            constant = self._ov.opset13.constant(array)
            for target in constants[name].output(0).get_target_inputs():
                target.replace_source_output(constant.output(0))
        graph.validate_nodes_and_infer_types()

    def _compile(
        self, model: Path, target: CompileTarget, weights: Mapping[str, NDArray[Any]] = NO_WEIGHTS
    ) -> Compiled:
        graph = self.read(model)
        self._replace(graph, weights)
        try:
            graph.reshape(dict(target.inputs))
            hoisted = hoist(self._ov, graph, [frozenset(group) for group in self._spec.recurring])
            main = self._build(graph, settings(target))
            parts = [
                Part(self._build(part.model, _settings_of_parts(target)), part.inputs, part.results)
                for part in hoisted
            ]
        except Exception as error:
            raise BackendError(f"OpenVINO cannot compile {self._model}: {reason(error)}") from error
        return Compiled(main, parts)

    # Each model by itself: its end gives the thread back the signal stack that its making found.
    @kept_signal_stack()
    def _build(self, graph: Any, configuration: Mapping[str, Any]) -> Any:
        return self._core.compile_model(graph, "CPU", configuration)

    def _place(self, source: Source, target: CompileTarget) -> PreparedFolder:
        key = {
            "format": FORMAT,
            "openvino": self._ov.get_version(),
            "spec": repr(self._spec),
            "target": repr(target),
            "settings": [settings(target), _settings_of_parts(target)],
        }
        return PreparedFolder(NAME, source, key)

    def _load(self, place: PreparedFolder, target: CompileTarget) -> Compiled | None:
        if not place.exists():
            return None
        try:
            layout = json.loads((place.path / LAYOUT).read_text(encoding="utf-8"))
            main = self._import(place.path / MAIN, settings(target))
            parts = [
                Part(self._import(place.path / name, _settings_of_parts(target)), inputs, results)
                for name, inputs, results in layout
            ]
        except (OSError, ValueError, RuntimeError):  # it is compiled anew
            return None
        place.loaded()
        return Compiled(main, parts)

    @kept_signal_stack()
    def _import(self, file: Path, configuration: Mapping[str, Any]) -> Any:
        # In memory of OpenVINO's own: it goes on to read the weights where they are.
        data = self._ov.Tensor(self._ov.Type.u8, [file.stat().st_size])
        with file.open("rb") as stream:
            stream.readinto(data.data)
        return self._core.import_model(data, "CPU", configuration)


def _constants(graph: Any) -> dict[str, Any]:
    """A graph's constants; the name of one that was an initializer is the initializer's."""
    return {node.get_friendly_name(): node for node in graph.get_ops() if node.get_type_name() == "Constant"}


def _is_small(source: Source) -> bool:
    return sum(entry.size for entry in source.files) <= MOST_BYTES


def _save(compiled: Compiled, folder: Path) -> None:
    (folder / MAIN).write_bytes(compiled.main.export_model().getbuffer())
    layout = []
    for index, part in enumerate(compiled.parts):
        name = f"part-{index}.blob"
        (folder / name).write_bytes(part.compiled.export_model().getbuffer())
        layout.append((name, part.inputs, part.results))
    (folder / LAYOUT).write_text(json.dumps(layout), encoding="utf-8")


def settings(target: CompileTarget) -> dict[str, Any]:
    """OpenVINO's properties of a compiled model."""
    return {
        # Without it a CPU with AMX or AVX-512 BF16 computes in bfloat16.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": target.threads,
        "NUM_STREAMS": target.streams,
        # Threads that are bound to cores wait for whatever else runs there.
        "ENABLE_CPU_PINNING": False,
    }


def _settings_of_parts(target: CompileTarget) -> dict[str, Any]:
    """A part is small, and runs once for a picture: on one thread."""
    return {**settings(target), "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1}


# OpenVINO's names of the dtypes in a manifest.
_DTYPES: Final = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64"}


def name_of(port: Any, names: Container[str]) -> str:
    """Which of the names an input or output has: it takes over those of operations that were left out.

    Args:
        port: An input or output of a model, compiled or not.
        names: The names among which the port's is looked for; if none is, any of the port's is given back.
    """
    own: list[str] = sorted(port.get_names())
    return next((name for name in own if name in names), own[0])


def _tensor(port: Any, names: Container[str]) -> GraphTensor:
    kind = port.get_element_type().get_type_name()
    sizes = [axis.get_length() if axis.is_static else str(axis) for axis in port.get_partial_shape()]
    return GraphTensor(name_of(port, names), _DTYPES.get(kind, kind), tuple(sizes))


def reason(error: Exception) -> str:
    """What OpenVINO's exception says, in one line: it begins with places in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    words = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return words[0] if words else first_line(error)
