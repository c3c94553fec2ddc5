"""ONNX Runtime on the CPU, with inputs and outputs bound to NumPy memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from numpy.typing import NDArray

from sdrt.runtime.backends.executor import GraphTensor, check_buffers, check_tensors, first_line, usable_cores
from sdrt.runtime.backends.libraries import import_onnxruntime
from sdrt.runtime.bundle.components import ComponentSpec
from sdrt.runtime.errors import BackendError

if TYPE_CHECKING:
    from sdrt.runtime.backends.prepared_graphs import PreparedGraph
    from sdrt.runtime.bundle.prepared_folder import Source

Array = NDArray[Any]
ROWS: Final = "rows"  # the axis of the U-Net's batch


class OnnxRuntimeExecutor:
    """A component on ONNX Runtime's CPU provider."""

    capturable = False

    def __init__(
        self,
        model: Path,
        spec: ComponentSpec,
        *,
        threads: int | None = None,
        source: Source | None = None,
    ) -> None:
        """Load the graph.

        Args:
            model: The ONNX file.
            spec: Its inputs and outputs.
            threads: Threads inside one operator; by default one per usable core.
            source: The bundle's files that the graph consists of, if they were compared. With them a graph
                is prepared for this CPU, once (`sdrt.runtime.backends.prepared_graphs`).

        Raises:
            BackendError: onnxruntime is not installed, or it refuses the graph.
            BundleError: It is not the graph that the manifest describes.
        """
        self._ort = import_onnxruntime("onnxruntime-cpu", "cpu")
        self._model, self.spec = model, spec
        self._threads = threads or usable_cores()
        self._prepared = _prepared_graph(self._ort, source)
        self._sessions: dict[int, Any] = {}
        self._second_half: ThreadPoolExecutor | None = None
        check_graph(self._session(self._threads // 2 if self._halves else self._threads), spec, str(model))

    @property
    def _halves(self) -> bool:
        """Whether an even number of rows is evaluated as two halves at once, on half of the threads each.

        Rows do not depend on each other, and half of the threads wait for each other half as much: guided
        steps take 0.8 to 0.9 of the time on two cores. It needs a session of its own, which costs next to
        nothing where both map one prepared graph, and the weights once more where they do not.
        """
        by_rows = any(entry.shape[0] == ROWS for entry in self.spec.inputs)
        return by_rows and self._prepared is not None and self._threads % 2 == 0

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """See `Executor.bind`."""
        axes = check_buffers(self.spec, inputs, outputs)
        rows = axes.get(ROWS, 1)
        if not self._halves or rows % 2:
            return _BoundSession(self._session(self._threads), self.spec.name, inputs, outputs)
        session = self._session(self._threads // 2)
        if self._second_half is None:
            self._second_half = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sdrt-half")
        first, second = (
            _BoundSession(session, self.spec.name, self._part(inputs, part), self._part(outputs, part))
            for part in (slice(0, rows // 2), slice(rows // 2, rows))
        )
        return _SideBySide(first, second, self._second_half)

    def _part(self, buffers: Mapping[str, Array], part: slice) -> dict[str, Array]:
        """Views of some rows; what is not by rows stays whole."""
        by_rows = {entry.name for entry in (*self.spec.inputs, *self.spec.outputs) if entry.shape[0] == ROWS}
        return {name: array[part] if name in by_rows else array for name, array in buffers.items()}

    def _session(self, threads: int) -> Any:
        if threads not in self._sessions:
            self._sessions[threads] = self._load(threads)
        return self._sessions[threads]

    def _load(self, threads: int) -> Any:
        session = self._prepared.load(_cpu_options(self._ort, threads)) if self._prepared else None
        if session is not None:
            return session
        try:
            return open_session(self._ort, self._model, _cpu_options(self._ort, threads))
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BackendError(f"ONNX Runtime refuses {self._model}: {first_line(error)}") from error

    def close(self) -> None:
        """See `Executor.close`; there is nothing to keep."""


class _BoundSession:
    """One binding; it keeps the arrays alive, since ONNX Runtime is told only their addresses."""

    def __init__(
        self, session: Any, component: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> None:
        self._session, self._component = session, component
        self._arrays = (dict(inputs), dict(outputs))
        self._binding = session.io_binding()
        for name, array in inputs.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def __call__(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError(f"{self._component} failed: {first_line(error)}") from error


class _SideBySide:
    """Two bound calls at the same time, the second on a thread of its own."""

    def __init__(
        self, first: Callable[[], None], second: Callable[[], None], thread: ThreadPoolExecutor
    ) -> None:
        self._first, self._second, self._thread = first, second, thread

    def __call__(self) -> None:
        other = self._thread.submit(self._second)
        try:
            self._first()
        finally:
            wait([other])  # whatever happened: until it has ended, it writes into the buffers
        other.result()


def _prepared_graph(ort: Any, source: Source | None) -> PreparedGraph | None:
    """The graph that was prepared for this CPU, prepared now if need be; None where that cannot be."""
    if source is None:
        return None
    from sdrt.runtime.backends.prepared_graphs import PreparedGraph, can_prepare

    if not can_prepare(ort):
        return None
    prepared = PreparedGraph(ort, source)
    return prepared if prepared.exists() or prepared.make() else None


def open_session(ort: Any, model: Path, options: Any) -> Any:
    """A session of a graph on the CPU provider alone; errors are ONNX Runtime's."""
    return ort.InferenceSession(str(model), sess_options=options, providers=["CPUExecutionProvider"])


def _cpu_options(ort: Any, threads: int) -> Any:
    """Session options for the CPU provider with that many threads inside one operator."""
    options = quiet_options(ort)
    options.intra_op_num_threads = threads
    # A thread that spins between two calls takes a core from whatever runs then.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # New threads spin, too, until there is something to do: by default 40 ms, which loading wants for itself.
    # Between two operators of a call there are microseconds.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
    return options


def quiet_options(ort: Any) -> Any:
    """Session options of which nothing is printed: what stands beside an exception is not for the user."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    return options


# A manifest's names of ONNX Runtime's dtypes.
_DTYPES: Final = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
}


def check_graph(session: Any, spec: ComponentSpec, where: str) -> None:
    """See `check_tensors`.

    Raises:
        BundleError: An input or output differs; ``where`` names the graph.
    """
    inputs, outputs = (
        [
            GraphTensor(tensor.name, _DTYPES.get(tensor.type, tensor.type), tuple(tensor.shape))
            for tensor in found
        ]
        for found in (session.get_inputs(), session.get_outputs())
    )
    check_tensors(inputs, outputs, spec, where)
