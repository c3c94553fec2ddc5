"""ONNX Runtime's sessions, on the CPU and on a GPU: their options, and the check of what they load."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from sdrt.runtime.backends.executor import GraphTensor, check_tensors
from sdrt.runtime.bundle.families.record import ComponentSpec

# A manifest's names of ONNX Runtime's dtypes.
_DTYPES: Final = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
}


def quiet_options(ort: Any) -> Any:
    """Session options of which nothing is printed: what stands beside an exception is not for the user.

    Args:
        ort: The module onnxruntime.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    return options


def cpu_options(ort: Any, threads: int) -> Any:
    """Session options for the CPU provider with that many threads inside one operator."""
    options = quiet_options(ort)
    options.intra_op_num_threads = threads
    # A thread that spins between two calls takes a core from whatever runs then.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # New threads spin, too, until there is something to do: by default 40 ms, which loading wants for itself.
    # Between two operators of a call there are microseconds.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
    return options


def open_on_cpu(ort: Any, model: Path, options: Any) -> Any:
    """A session of a graph on the CPU provider alone; errors are ONNX Runtime's."""
    return ort.InferenceSession(str(model), sess_options=options, providers=["CPUExecutionProvider"])


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
