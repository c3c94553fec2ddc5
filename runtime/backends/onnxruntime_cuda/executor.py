"""ONNX Runtime's CUDA provider, in our stream and on our buffers, with nothing left to the CPU in silence."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.admission.records import admit_rewritten
from sdrt.runtime.backends.component_weights import ComponentWeights
from sdrt.runtime.backends.executor import check_buffers, check_weights, first_line
from sdrt.runtime.backends.onnx_graph import BFLOAT16, read_graph
from sdrt.runtime.backends.onnxruntime_cuda.graph_nodes import shape_nodes
from sdrt.runtime.backends.onnxruntime_cuda.library import NAME, PROVIDER, import_with_cuda
from sdrt.runtime.backends.onnxruntime_cuda.weight_inputs import WeightInput, matrices, with_weights
from sdrt.runtime.backends.onnxruntime_sessions import check_graph, quiet_options
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.engine_search import Engine, build_command, find_engine
from sdrt.runtime.bundle.families.record import ComponentSpec
from sdrt.runtime.devices.device import Buffer
from sdrt.runtime.errors import BackendError, DeviceMemoryError

if TYPE_CHECKING:
    from sdrt.runtime.devices.gpu.device import CudaDevice

# ONNX Runtime puts arithmetic on shapes on the CPU on purpose. It is recognised in the graph by where its
# numbers come from; nodes that ONNX Runtime made itself (fusions, inlined functions) only by these types.
SHAPE_OPERATORS: Final = frozenset(
    {"Shape", "Size", "Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Cast", "Range", "Constant"}
    | {"Add", "Sub", "Mul", "Div", "Mod", "Equal", "Where", "ConstantOfShape", "Expand", "Reshape"}
)
_RECORD_ASSIGNMENT: Final = "session.record_ep_graph_assignment_info"
_WEIGHTS_FOLDER: Final = "session.model_external_initializers_file_folder_path"
_MAX_LISTED: Final = 5
_FATAL: Final = 4  # of ONNX Runtime's severities
_OUT_OF_MEMORY: Final = re.compile(
    r"out of memory|failed to allocate|BFCArena|cudaErrorMemoryAllocation", re.I
)


def find_graph(
    bundle: Bundle, component: str, version: str, axes: Mapping[str, int]
) -> tuple[Engine | None, str]:
    """The graph that was rewritten for CUDA, if the bundle has one that fits, and a line that says so."""
    try:
        engine = find_engine(bundle, component, NAME, version, None, axes)
    except BackendError as error:
        return None, f"the {component}'s plain graph, since {error}"
    return engine, f"the {component}'s graph rewritten for CUDA (engines/{engine.folder.name})"


class OnnxRuntimeCudaExecutor:
    """A component on ONNX Runtime's CUDA provider.

    Attributes:
        spec: The component's inputs and outputs.
        about: A line that says which graph it runs, and why.
        capturable: True for a rewritten graph without operators on the CPU: after a first run it only queues
            kernels, and what the host computes about shapes is the same each time.
        generation: Changes where weights could not be replaced by a copy.
    """

    capturable: bool
    about: str
    generation = 0
    _graph: _Graph | None = None

    def __init__(
        self,
        bundle: Bundle,
        component: str,
        device: CudaDevice,
        *,
        allow_cpu_nodes: Collection[str] = (),
        verify: bool = True,
    ) -> None:
        """Load the rewritten graph if the bundle has one that fits, else the plain one.

        Args:
            bundle: The bundle that holds the component.
            component: The component's name.
            device: The CUDA device whose stream and buffers are used.
            allow_cpu_nodes: Operator types that may run on the CPU; arithmetic on shapes always may.
            verify: Compare the rewritten graph's SHA-256 with its manifest; otherwise only the size.

        Raises:
            BackendError: The CUDA provider is missing, refuses the graph, or leaves nodes to the CPU.
            BundleError: The rewritten graph is damaged, or not the component's.
            DeviceMemoryError: The weights do not fit.
        """
        self._ort = import_with_cuda()
        self.spec: ComponentSpec = bundle.component(component).spec
        self._bundle, self._device, self._verify = bundle, device, verify
        self._allowed = frozenset(allow_cpu_nodes)
        self.capturable = not self._allowed
        self._own = ComponentWeights(bundle, component)
        self._replaced: dict[str, NDArray[Any]] = {}
        self._settled = True  # whether all graphs have them: not where replacing failed or was interrupted
        self._matrices: dict[str, Buffer] = {}  # inputs in place of initializers, by name
        self._bound: WeakSet[_BoundCudaSession] = WeakSet()
        device.make_current()
        self._use_graph_for({})
        # A buffer keeps the GPU's context. It is released after the session, which needs the context.
        self._context_holder = device.zeros((1,), "uint8")

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Callable[[], None]:
        """See `Executor.bind`; buffers are device memory. Another graph is loaded if that fits the shape.

        Raises:
            UsageError: A buffer does not fit the spec.
            BackendError: As for loading.
            BundleError: As for loading.
            DeviceMemoryError: As for loading.
        """
        axes = check_buffers(self.spec, inputs, outputs)
        self._device.make_current()
        graph = self._use_graph_for(axes)
        bound = _BoundCudaSession(self._ort, self._device, self.spec, inputs, outputs)
        bound.use(graph, self._matrices)
        self._bound.add(bound)
        return bound

    def _use_graph_for(self, axes: Mapping[str, int]) -> _Graph:
        engine, about = find_graph(self._bundle, self.spec.name, self._ort.__version__, axes)
        if self._graph is None or engine != self._graph.engine:
            self._graph = self._load(engine)  # bindings keep the one before
            self.about = about
            # Once a plain graph was bound, nothing is captured: who asks does not know which graph is meant.
            self.capturable = self.capturable and engine is not None
        return self._graph

    def replace_weights(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """See `Executor.replace_weights`.

        From the first call on that names any, the matrices lie in memory of ours, and others are copied to
        them. Only where something else changes, or there are none any more, the graph is loaded anew.
        """
        check_weights(weights, self._own.find, f"the {self.spec.name} of {self._bundle.path}")
        settled, self._settled = self._settled, False
        if weights or self._replaced or not settled:
            self._device.make_current()
            graphs = [graph for graph in (self._graph, *(bound.graph for bound in self._bound)) if graph]
            copies = settled and weights and self._replaced
            if copies and all(self._differs_in_matrices(graph, weights) for graph in graphs):
                self._copy(graphs, weights)
            else:
                self._load_anew(graphs, weights)
        self._settled = True

    def _copy(self, graphs: Sequence[_Graph], weights: Mapping[str, NDArray[Any]]) -> None:
        changed = {**dict.fromkeys(self._replaced), **weights}
        inputs = {entry.name: entry for graph in graphs for entry in graph.inputs}
        for entry in inputs.values():
            if entry.initializer in changed:
                self._fill(entry, weights)
        self._replaced = dict(weights)

    def _differs_in_matrices(self, graph: _Graph, weights: Mapping[str, NDArray[Any]]) -> bool:
        """Whether nothing of a graph that is constant in it would become another."""
        inputs = {entry.initializer for entry in graph.inputs}
        before, now = (
            {name: array for name, array in some.items() if name not in inputs}
            for some in (self._replaced, weights)
        )
        return before.keys() == now.keys() and all(np.array_equal(before[name], now[name]) for name in now)

    def _load_anew(self, graphs: Sequence[_Graph], weights: Mapping[str, NDArray[Any]]) -> None:
        before = self._replaced, self._matrices
        self._replaced, self._matrices = dict(weights), {}
        try:
            engines = {graph.name: graph.engine for graph in graphs}
            loaded = {name: self._load(engine) for name, engine in engines.items()}
        except Exception:
            self._replaced, self._matrices = before
            raise
        self.generation += 1
        if self._graph is not None:
            self._graph = loaded[self._graph.name]
        for bound in self._bound:
            if bound.graph is not None:
                bound.use(loaded[bound.graph.name], self._matrices)

    def _fill(self, entry: WeightInput, weights: Mapping[str, NDArray[Any]]) -> None:
        array = weights.get(entry.initializer)
        numbers = self._own.read(entry.initializer) if array is None else array
        self._device.upload(numbers.astype(entry.dtype, copy=False), self._matrices[entry.name])

    def _with_weights(self, content: bytes) -> tuple[bytes, list[WeightInput]]:
        """A graph with the weights that were replaced, whose matrices are inputs with their numbers."""
        inputs = matrices(content)
        for entry in inputs:
            if entry.name not in self._matrices:
                self._matrices[entry.name] = self._device.zeros(entry.shape, entry.dtype)
                self._fill(entry, self._replaced)
        named = {entry.initializer for entry in inputs}
        constants = {name: array for name, array in self._replaced.items() if name not in named}
        try:
            return with_weights(content, inputs, constants), inputs
        except ValueError as error:
            raise BackendError(f"the {self.spec.name} cannot take these weights: {error}") from error

    def close(self) -> None:
        """See `Executor.close`; there is nothing to keep."""

    def _load(self, engine: Engine | None) -> _Graph:
        part = self._bundle.component(self.spec.name)
        model = self._bundle.file(part.model_entry)
        options = quiet_options(self._ort)
        options.add_session_config_entry(_RECORD_ASSIGNMENT, "1")
        graph: str | bytes = str(model)
        if engine is None:
            from sdrt.runtime.admission.first_load import read_graph

            content = read_graph(self._bundle, part)
        else:
            content = engine.read_plan(verify=self._verify)
        entry_of_engine = None if engine is None else engine.manifest.files[0]
        admit_rewritten(self._bundle, self.spec.name, NAME, entry_of_engine, content)
        inputs: list[WeightInput] = []
        if self._replaced:
            content, inputs = self._with_weights(content)
        if engine is not None or self._replaced:
            graph = content
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(model.parent))
        where = f"engines/{engine.folder.name}" if engine else str(PurePosixPath(part.model))
        _load_cuda_libraries(self._ort)
        # Of the whole process: it prints, as errors, each plan that cuDNN would not take for a convolution.
        self._ort.set_default_logger_severity(_FATAL)
        try:
            session = self._ort.InferenceSession(
                graph,
                sess_options=options,
                providers=[(PROVIDER, self._provider_options()), "CPUExecutionProvider"],
                enable_fallback=0,
            )
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise _failure(
                self._device, f"ONNX Runtime refuses {where} on {self._device.name}", error
            ) from error
        _check_provider(session, self._ort.__version__)
        if left := _cpu_nodes(session, content, self._allowed):
            names = ", ".join(left[:_MAX_LISTED])
            more = f" and {len(left) - _MAX_LISTED} more" if len(left) > _MAX_LISTED else ""
            raise BackendError(
                f"ONNX Runtime's CUDA provider leaves {len(left)} nodes of {where} to the CPU: {names}{more}"
                "; each would copy its tensors to the host and back. Rewrite the graph "
                f"({build_command(self._bundle, NAME)}), or allow the operators by name (allow_cpu_nodes)"
            )
        check_graph(session, self.spec, where)
        return _Graph(session, engine, inputs)

    def _provider_options(self) -> dict[str, str]:
        return {
            "device_id": str(self._device.facts.ordinal),
            "user_compute_stream": str(self._device.stream),
            # The search that is the default times every algorithm of every convolution, at each new shape.
            "cudnn_conv_algo_search": "HEURISTIC",
            # Doubling the arena at each growth would take twice the memory that is needed.
            "arena_extend_strategy": "kSameAsRequested",
            # fp32 means fp32: TF32 has fp16's ten bits. For convolutions "0" bars all tensor core kernels,
            # those of half precision too, where cuDNN has any other.
            "use_tf32": "0" if self._bundle.component(self.spec.name).precision == "fp32" else "1",
        }


class _Graph(NamedTuple):
    """A session.

    Attributes:
        session: An ``onnxruntime.InferenceSession``.
        engine: What its graph is of; None for the bundle's own.
        inputs: Those that it has besides the component's: matrices in memory of ours.
    """

    session: Any
    engine: Engine | None
    inputs: list[WeightInput]

    @property
    def name(self) -> str:
        """One for each graph."""
        return "" if self.engine is None else self.engine.folder.name


class _BoundCudaSession:
    """One binding; it keeps the buffers alive, since ONNX Runtime is told only their addresses."""

    def __init__(
        self,
        ort: Any,
        device: CudaDevice,
        spec: ComponentSpec,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
    ) -> None:
        self._device, self._component = device, spec.name
        self._inputs, self._outputs = dict(inputs), dict(outputs)
        self.graph: _Graph | None = None
        self._options = ort.RunOptions()
        # Without this the host waits for the GPU at the end of each run.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._dtypes = {entry.name: entry.dtype for entry in (*spec.inputs, *spec.outputs)}

    def use(self, graph: _Graph, matrices: Mapping[str, Buffer]) -> None:
        """Be of this graph from now on, and read these inputs of it besides the component's."""
        self.graph, binding = graph, graph.session.io_binding()
        self._matrices = {entry.name: matrices[entry.name] for entry in graph.inputs}
        dtypes = {**self._dtypes, **{entry.name: entry.dtype for entry in graph.inputs}}
        inputs = {**self._inputs, **self._matrices}
        for bind, buffers in ((binding.bind_input, inputs), (binding.bind_output, self._outputs)):
            for name, buffer in buffers.items():
                dtype = BFLOAT16 if dtypes[name] in ("bfloat16", "uint16") else np.dtype(dtypes[name])
                place = "cuda", self._device.facts.ordinal
                bind(name, *place, dtype, tuple(buffer.shape), buffer.address)
        self._run = partial(graph.session.run_with_iobinding, binding, self._options)

    def __call__(self) -> None:
        """Queue the component's work; see `Executor.bind`."""
        try:
            self._run()
        except Exception as error:
            raise _failure(
                self._device, f"the {self._component} failed on {self._device.name}", error
            ) from error


_PRINTING: Final = threading.Lock()  # components are loaded in threads, and there is one standard output


def _load_cuda_libraries(ort: Any) -> None:
    """Load CUDA's and cuDNN's libraries from their wheels, which the provider does not find by itself.

    onnxruntime looks beside itself; with several folders on Python's path they may be in another one.
    """
    with _PRINTING, contextlib.redirect_stdout(io.StringIO()):  # it prints what it misses; the check tells
        ort.preload_dlls()
        for entry in dict.fromkeys(sys.path):
            for folder in sorted(Path(entry).glob("nvidia/*/lib")):
                ort.preload_dlls(directory=str(folder.absolute()))


def _check_provider(session: Any, version: str) -> None:
    """ONNX Runtime goes on with the CPU where the provider's libraries do not load."""
    if PROVIDER not in session.get_providers():
        raise BackendError(
            f"the CUDA provider of onnxruntime {version} did not load, only "
            f"{', '.join(session.get_providers())}: it needs the CUDA and cuDNN libraries that it was built "
            "for: pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )


def _cpu_nodes(session: Any, graph: bytes, allowed: Collection[str]) -> list[str]:
    """Type and name of each node off the GPU, but for arithmetic on shapes and what is allowed."""
    in_graph, constants = read_graph(graph)
    own, shapes = {node.name for node in in_graph}, shape_nodes(in_graph, constants)
    return [
        f"{node.op_type} {node.name}".strip()
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != PROVIDER
        for node in part.get_nodes()
        if node.op_type not in allowed
        and node.name not in shapes
        and (node.name in own or node.op_type not in SHAPE_OPERATORS)
    ]


def _failure(device: CudaDevice, what: str, error: Exception) -> BackendError:
    reason = first_line(error)
    if not _OUT_OF_MEMORY.search(str(error)):
        return BackendError(f"{what}: {reason}")
    return DeviceMemoryError(
        f"{what}: the GPU's memory is too small ({_free_memory(device)}; {reason}); draw fewer or smaller "
        "pictures at once, or end other programs on the GPU"
    )


def _free_memory(device: CudaDevice) -> str:
    try:
        free, total = device.memory_info()
    except BackendError as error:  # the context is lost
        return str(error)
    return f"{free / 2**20:,.0f} of {total / 2**20:,.0f} MiB are free"
