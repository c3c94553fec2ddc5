"""Executors: each runs one compiled component on buffers that the caller owns.

``onnxruntime-cpu`` is the backend of this version. A backend that was asked for and is not there is an
error; nothing falls back to another one in silence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.bundle import Bundle
from sdrt.runtime.components import ComponentSpec, TensorSpec
from sdrt.runtime.errors import BackendError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

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
        options.log_severity_level = 3  # errors only: its warnings are about its own optimiser
        options.intra_op_num_threads = threads or usable_cores()
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        try:
            self._session = ort.InferenceSession(
                str(model), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BackendError(f"ONNX Runtime refuses {model}: {_first_line(error)}") from error
        self.spec = spec
        self._inputs = {entry.name: entry for entry in spec.inputs}
        self._outputs = {entry.name: entry for entry in spec.outputs}

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """See `Executor.bind`."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            check_buffer(self.spec.name, self._inputs[name], array)
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            check_buffer(self.spec.name, self._outputs[name], array)
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        held = (inputs, outputs)  # the binding knows addresses only; this keeps the memory alive

        def evaluate() -> None:
            assert held
            try:
                self._session.run_with_iobinding(binding)
            except Exception as error:
                raise BackendError(f"{self.spec.name} failed: {_first_line(error)}") from error

        return evaluate


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
    """Cores that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


BACKENDS: Final[dict[str, Callable[[Bundle, str, int | None], Executor]]] = {
    "onnxruntime-cpu": _load_onnxruntime_cpu,
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
