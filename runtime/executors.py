"""Executors: each runs one compiled component on buffers that the caller owns.

``onnxruntime-cpu`` is the backend of this version. A backend that was asked for and is not there is an
error; nothing falls back to another one in silence.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.bundle import Bundle
from sdrt.runtime.components import ComponentSpec, TensorSpec
from sdrt.runtime.errors import BackendError, BundleError, UsageError

Array = NDArray[Any]


class Executor(Protocol):
    """One compiled component, which runs on buffers that it is bound to once."""

    spec: ComponentSpec

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """Bind buffers and return the call that evaluates the component on them.

        The call reads and writes the buffers in place and allocates no results; the buffers must not be
        moved while it is in use.

        Args:
            inputs: A C-contiguous array for every input of ``spec``, of its dtype.
            outputs: Likewise for the outputs that are wanted.

        Raises:
            UsageError: A buffer does not fit the spec.
            BackendError: The backend refused or failed (also from the call).
        """
        ...


class OnnxRuntimeExecutor:
    """A component on ONNX Runtime's CPU provider, with inputs and outputs bound to NumPy memory."""

    def __init__(self, model: Path, spec: ComponentSpec, *, threads: int | None = None) -> None:
        """Load the graph.

        Args:
            model: The ONNX file.
            spec: Its inputs and outputs.
            threads: Threads inside one operator; by default one per usable core.

        Raises:
            BackendError: onnxruntime is not installed, or it refuses the graph.
        """
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what it prints beside an exception is not for the user
        options.intra_op_num_threads = threads or usable_cores()
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        try:
            self._session = ort.InferenceSession(
                str(model), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BackendError(f"ONNX Runtime refuses {model}: {_first_line(error)}") from error
        self.spec = spec
        self._check_graph(model)

    def _check_graph(self, model: Path) -> None:
        """The graph must be the one that the manifest describes, or buffers would be of wrong sizes."""
        session = self._session
        for found, wanted in (
            (session.get_inputs(), self.spec.inputs),
            (session.get_outputs(), self.spec.outputs),
        ):
            tensors = {tensor.name: tensor for tensor in found}
            for entry in wanted:
                tensor = tensors.get(entry.name)
                if tensor is None or not _same_tensor(tensor, entry):
                    has = f"{tensor.type}{list(tensor.shape)}" if tensor else f"only {', '.join(tensors)}"
                    raise BundleError(
                        f"{model} is not the graph that the manifest describes: {entry.name} should be "
                        f"{entry.dtype}{list(entry.shape)}, the graph has {has}; export the bundle again"
                    )

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """See `Executor.bind`."""
        for entries, arrays in ((self.spec.inputs, inputs), (self.spec.outputs, outputs)):
            specs = {entry.name: entry for entry in entries}
            for name, array in arrays.items():
                check_buffer(self.spec.name, specs[name], array)
        return _BoundSession(self._session, self.spec.name, inputs, outputs)


class _BoundSession:
    """One binding; it keeps the arrays alive, since ONNX Runtime is told only their addresses."""

    def __init__(
        self, session: Any, component: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> None:
        self._session, self._component = session, component
        self._arrays = (inputs, outputs)
        self._binding = session.io_binding()
        for name, array in inputs.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def __call__(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError(f"{self._component} failed: {_first_line(error)}") from error


# ONNX Runtime's names of the dtypes in a manifest.
_ORT_TYPES: Final = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "int64": "tensor(int64)",
}


def _same_tensor(tensor: Any, spec: TensorSpec) -> bool:
    """Whether dtype, rank and every size that both know agree; a fixed export has sizes for named axes."""
    return (
        tensor.type == _ORT_TYPES.get(spec.dtype)
        and len(tensor.shape) == len(spec.shape)
        and all(
            got == want
            for got, want in zip(tensor.shape, spec.shape, strict=True)
            if isinstance(got, int) and isinstance(want, int)
        )
    )


def check_buffer(component: str, spec: TensorSpec, array: Array) -> None:
    """Refuse a buffer whose dtype, rank or layout is not the spec's: backends read it as raw memory."""
    if array.dtype != np.dtype(spec.dtype) or array.ndim != len(spec.shape):
        raise UsageError(
            f"{component}.{spec.name} is {spec.dtype}{list(spec.shape)}, "
            f"given {array.dtype}{list(array.shape)}"
        )
    for axis, (want, got) in enumerate(zip(spec.shape, array.shape, strict=True)):
        if isinstance(want, int) and want != got:
            raise UsageError(f"{component}.{spec.name}: axis {axis} is {want}, given {got}")
    if not array.flags.c_contiguous:
        raise UsageError(f"{component}.{spec.name}: the buffer must be C-contiguous")


def usable_cores() -> int:
    """Cores that this process may use: by its affinity, and by a container's quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "the backend onnxruntime-cpu needs the package onnxruntime: pip install 'sdrt[cpu]'"
        ) from error
    return onnxruntime


def _load_onnxruntime_cpu(bundle: Bundle, name: str, threads: int | None) -> Executor:
    component = bundle.component(name)
    if component.precision == "bf16":
        raise BackendError(
            "ONNX Runtime has no bfloat16 arithmetic on the CPU; export with --dtype fp32 to draw here"
        )
    entry = next(entry for entry in component.files if entry.path == component.model)
    return OnnxRuntimeExecutor(bundle.file(entry), component.spec, threads=threads)


DEFAULT_BACKEND: Final = "onnxruntime-cpu"
BACKENDS: Final[dict[str, Callable[[Bundle, str, int | None], Executor]]] = {
    DEFAULT_BACKEND: _load_onnxruntime_cpu,
}


def load_executor(bundle: Bundle, component: str, *, backend: str, threads: int | None = None) -> Executor:
    """Load one component of a bundle on a named backend.

    Raises:
        UsageError: No backend of that name.
        BackendError: It is not installed, or cannot run this component.
    """
    try:
        load = BACKENDS[backend]
    except KeyError:
        raise UsageError(f"unknown backend {backend!r}; there is {', '.join(BACKENDS)}") from None
    return load(bundle, component, threads)
