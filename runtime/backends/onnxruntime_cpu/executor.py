"""ONNX Runtime on the CPU, with inputs and outputs bound to NumPy memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from sdrt.runtime.backends.batch_parts import PARTS, Array, batch_parts, parts_of
from sdrt.runtime.backends.executor import check_buffers, first_line, usable_cores
from sdrt.runtime.backends.onnxruntime_cpu.library import import_onnxruntime
from sdrt.runtime.backends.onnxruntime_sessions import check_graph, cpu_options, open_on_cpu
from sdrt.runtime.bundle.families.record import ComponentSpec
from sdrt.runtime.errors import BackendError

if TYPE_CHECKING:
    from sdrt.runtime.backends.onnxruntime_cpu.prepared_graphs import PreparedGraph
    from sdrt.runtime.backends.onnxruntime_cpu.replaced_weights import ReplaceableWeights, ReplacedWeights
    from sdrt.runtime.bundle.prepared_folder import Source

ROWS: Final = "rows"  # the axis of the U-Net's batch


class OnnxRuntimeExecutor:
    """A component on ONNX Runtime's CPU provider."""

    capturable = False
    generation = 0

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
            spec: The component's inputs and outputs.
            threads: The threads that work on one operator; by default one per usable core.
            source: The bundle's files that the graph consists of, if they were compared. With them a graph
                is prepared for this CPU, once (`sdrt.runtime.backends.onnxruntime_cpu.prepared_graphs`).

        Raises:
            BackendError: onnxruntime is not installed, or it refuses the graph.
            BundleError: It is not the graph that the manifest describes.
        """
        self._ort = import_onnxruntime()
        self._model, self.spec = model, spec
        self._threads = threads or usable_cores()
        self._prepared = _prepared_graph(self._ort, source)
        self._sessions: dict[int, Any] = {}  # by their threads, with the weights of now
        self._own_sessions = self._sessions  # with the graph's own
        self._replaced: ReplacedWeights | None = None
        self._bound: WeakSet[_BoundSession] = WeakSet()
        self._other_thread: ThreadPoolExecutor | None = None
        check_graph(self._session(self._threads // self._parts(rows=PARTS)), spec, str(model))

    def _parts(self, rows: int) -> int:
        """Into how many parts that many rows are cut.

        Parts need a session of their own, which costs next to nothing where both map one prepared graph, and
        the weights once more where they do not.
        """
        by_rows = any(entry.shape[0] == ROWS for entry in self.spec.inputs)
        return parts_of(rows, self._threads) if by_rows and self._prepared is not None else 1

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """See `Executor.bind`."""
        axes = check_buffers(self.spec, inputs, outputs)
        parts = self._parts(axes.get(ROWS, 1))
        threads = self._threads // parts
        first, *others = (
            _BoundSession(threads, self.spec.name, *arrays)
            for arrays in batch_parts(self.spec, inputs, outputs, (ROWS,), parts)
        )
        for bound in (first, *others):
            bound.use(self._session(threads), self._replaced)
            self._bound.add(bound)
        if not others:
            return first
        if self._other_thread is None:
            self._other_thread = ThreadPoolExecutor(max_workers=PARTS - 1, thread_name_prefix="sdrt-half")
        return _BoundParts(first, others, self._other_thread)

    def replace_weights(self, weights: Mapping[str, Array]) -> None:
        """See `Executor.replace_weights`.

        On a prepared graph this takes about as long as loading it. Without one, the bundle's graph is loaded
        anew, which takes as long as at the start.
        """
        replaced = self._replaceable.with_weights(weights) if weights else None
        sessions = {} if replaced else self._own_sessions
        # Whatever fails does so before anything changes.
        for threads in self._sessions.keys() - sessions.keys():
            sessions[threads] = replaced.load(threads) if replaced else self._load(threads)
        self._replaced, self._sessions = replaced, sessions
        if self._prepared is None and replaced is not None:
            self._own_sessions = {}  # all weights once more, which a prepared graph only maps
        for bound in self._bound:
            bound.use(self._session(bound.threads), self._replaced)

    @cached_property
    def _replaceable(self) -> ReplaceableWeights:
        from sdrt.runtime.backends.onnxruntime_cpu.replaced_weights import ReplaceableWeights

        return ReplaceableWeights(self._ort, self._model, self._prepared)

    def _session(self, threads: int) -> Any:
        if threads not in self._sessions:
            load = self._load if self._replaced is None else self._replaced.load
            self._sessions[threads] = load(threads)
        return self._sessions[threads]

    def _load(self, threads: int) -> Any:
        session = self._prepared.load(cpu_options(self._ort, threads)) if self._prepared else None
        if session is not None:
            return session
        try:
            return open_on_cpu(self._ort, self._model, cpu_options(self._ort, threads))
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BackendError(f"ONNX Runtime refuses {self._model}: {first_line(error)}") from error

    def close(self) -> None:
        """See `Executor.close`; there is nothing to keep."""


class _BoundSession:
    """One binding; it keeps the arrays alive, since ONNX Runtime is told only their addresses."""

    def __init__(
        self, threads: int, component: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> None:
        self.threads, self._component = threads, component
        self._inputs, self._outputs = dict(inputs), dict(outputs)

    def use(self, session: Any, weights: ReplacedWeights | None) -> None:
        """Be of this session from now on, which reads these weights where they are."""
        self._session, self._binding, self._weights = session, session.io_binding(), weights
        for name, array in self._inputs.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in self._outputs.items():
            self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def __call__(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError(f"{self._component} failed: {first_line(error)}") from error


class _BoundParts:
    """The parts' calls at the same time, all but the first on threads of their own."""

    def __init__(
        self, first: _BoundSession, others: Sequence[_BoundSession], threads: ThreadPoolExecutor
    ) -> None:
        self._first, self._others, self._threads = first, tuple(others), threads

    def __call__(self) -> None:
        others = [self._threads.submit(other) for other in self._others]
        try:
            self._first()
        finally:
            wait(others)  # whatever happened: until they have ended, they write into the buffers
        for other in others:
            other.result()


def _prepared_graph(ort: Any, source: Source | None) -> PreparedGraph | None:
    """The graph that was prepared for this CPU, prepared now if need be; None where that cannot be."""
    if source is None:
        return None
    from sdrt.runtime.backends.onnxruntime_cpu.prepared_graphs import PreparedGraph, can_prepare

    if not can_prepare(ort):
        return None
    prepared = PreparedGraph(ort, source)
    return prepared if prepared.exists() or prepared.make() else None
