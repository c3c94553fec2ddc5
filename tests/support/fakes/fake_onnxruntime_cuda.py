"""An onnxruntime with a CUDA provider, where there is no GPU: the real one's CPU provider behind a stream.

Sessions, options and graphs are the real library's. What the CUDA provider would do is put into the recording
driver's stream, on its memory.
"""

from __future__ import annotations

import ctypes
import math
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from support.fakes.recording import RecordingDriver

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"


def fake_onnxruntime(driver: RecordingDriver) -> Any:
    """A module to put in the place of ``onnxruntime``.

    Attributes that a test may change: ``providers`` (in the build), ``loads`` (whether the provider's
    libraries do), ``on_cpu`` (``node → bool``), ``refusal`` and ``failure`` (of loading and of running).
    ``sessions`` holds what was made, ``severities`` what the
    default logger was set to.
    """
    module: Any = ModuleType("onnxruntime")
    module.__version__ = onnxruntime.__version__
    for name in ("SessionOptions", "RunOptions", "ExecutionMode"):
        setattr(module, name, getattr(onnxruntime, name))
    module.driver = driver
    module.providers = [CUDA, CPU]
    module.loads = True
    module.on_cpu = lambda node: node.op_type in ("Shape", "Size")
    module.refusal = module.failure = None
    module.sessions = []
    module.severities = []
    module.set_default_logger_severity = module.severities.append
    module.get_available_providers = lambda: list(module.providers)
    module.preload_dlls = lambda directory=None: print("what the library prints about missing files")
    module.InferenceSession = type("InferenceSession", (_Session,), {"module": module})
    return module


class _Session:
    module: Any

    def __init__(
        self,
        graph: str | bytes,
        *,
        sess_options: Any,
        providers: tuple[tuple[str, dict[str, str]], str],
        enable_fallback: int,
    ) -> None:
        if self.module.refusal:
            raise self.module.refusal
        assert enable_fallback == 0  # else a failed load is tried again on the CPU, with a print
        (name, self.provider_options), second = providers
        assert (name, second) == (CUDA, CPU)
        assert all(isinstance(value, str) for value in self.provider_options.values())
        self.graph = graph
        self.real = onnxruntime.InferenceSession(graph, sess_options=sess_options, providers=[CPU])
        self.get_inputs, self.get_outputs = self.real.get_inputs, self.real.get_outputs
        self.run_options: Any = None
        self.module.sessions.append(self)

    def get_providers(self) -> list[str]:
        return [CUDA, CPU] if self.module.loads else [CPU]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        """The real assignment, with the CUDA provider in the CPU's place for all but some nodes."""
        parts = []
        for part in self.real.get_provider_graph_assignment_info():
            nodes = part.get_nodes()
            name = CPU if any(map(self.module.on_cpu, nodes)) else CUDA
            parts.append(SimpleNamespace(ep_name=name, get_nodes=lambda nodes=nodes: nodes))
        return parts

    def io_binding(self) -> _Binding:
        return _Binding()

    def run_with_iobinding(self, binding: _Binding, options: Any) -> None:
        if self.module.failure:
            raise self.module.failure
        self.run_options = options
        stream = int(self.provider_options["user_compute_stream"])

        def compute() -> None:
            names = list(binding.outputs)
            results = self.real.run(names, {name: view() for name, view in binding.inputs.items()})
            for name, result in zip(names, results, strict=True):
                np.copyto(binding.outputs[name](), result)

        self.module.driver.enqueue(stream, compute)


class _Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}

    def bind_input(self, *arguments: Any) -> None:
        self.inputs[arguments[0]] = _view(*arguments[1:])

    def bind_output(self, *arguments: Any) -> None:
        self.outputs[arguments[0]] = _view(*arguments[1:])


def _view(device: str, index: int, dtype: np.dtype[Any], shape: tuple[int, ...], address: int) -> Any:
    assert (device, index) == ("cuda", 0)
    raw = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return lambda: np.frombuffer(memoryview(raw).cast("B"), dtype).reshape(shape)
