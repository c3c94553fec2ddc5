"""ONNX Runtime on the CPU, with inputs and outputs bound to NumPy memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from sdrt.runtime.components import ComponentSpec, TensorSpec
from sdrt.runtime.errors import BackendError, BundleError
from sdrt.runtime.executors import check_buffers, first_line

Array = NDArray[Any]


class OnnxRuntimeExecutor:
    """A component on ONNX Runtime's CPU provider."""

    capturable = False

    def __init__(self, model: Path, spec: ComponentSpec, *, threads: int | None = None) -> None:
        """Load the graph.

        Args:
            model: The ONNX file.
            spec: Its inputs and outputs.
            threads: Threads inside one operator; by default one per usable core.

        Raises:
            BackendError: onnxruntime is not installed, or it refuses the graph.
            BundleError: It is not the graph that the manifest describes.
        """
        ort = import_onnxruntime("onnxruntime-cpu", "cpu")
        options = quiet_options(ort)
        options.intra_op_num_threads = threads or usable_cores()
        try:
            self._session = ort.InferenceSession(
                str(model), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BackendError(f"ONNX Runtime refuses {model}: {first_line(error)}") from error
        self.spec = spec
        check_graph(self._session, spec, str(model))

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """See `Executor.bind`."""
        check_buffers(self.spec, inputs, outputs)
        return _BoundSession(self._session, self.spec.name, inputs, outputs)

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


def import_onnxruntime(backend: str, extra: str) -> Any:
    """The module onnxruntime.

    Raises:
        BackendError: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"the backend {backend} needs the package onnxruntime ({first_line(error)}): "
            f"pip install 'sdrt[{extra}]'"
        ) from error
    return onnxruntime


def quiet_options(ort: Any) -> Any:
    """Session options of which nothing is printed: what stands beside an exception is not for the user."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    return options


# ONNX Runtime's names of the dtypes in a manifest.
_ORT_TYPES: Final = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "int64": "tensor(int64)",
}


def check_graph(session: Any, spec: ComponentSpec, where: str) -> None:
    """The graph must be the one that the manifest describes, or buffers would be of wrong sizes.

    Raises:
        BundleError: An input or output differs; ``where`` names the graph.
    """
    for found, wanted in ((session.get_inputs(), spec.inputs), (session.get_outputs(), spec.outputs)):
        tensors = {tensor.name: tensor for tensor in found}
        for entry in wanted:
            tensor = tensors.get(entry.name)
            if tensor is None or not _same_tensor(tensor, entry):
                has = f"{tensor.type}{list(tensor.shape)}" if tensor else f"only {', '.join(tensors)}"
                raise BundleError(
                    f"{where} is not the graph that the manifest describes: {entry.name} should be "
                    f"{entry.dtype}{list(entry.shape)}, the graph has {has}; export the bundle again"
                )


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


def usable_cores() -> int:
    """Cores that this process may use: by its affinity, and by a container's quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        return cores
