"""The backend ``onnxruntime-cpu``: ONNX Runtime's CPU provider on the bundle's graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdrt.runtime.backends.backend import Backend, RequestShape
from sdrt.runtime.backends.cpu_backends import load_on_cpu, probe_on_cpu
from sdrt.runtime.backends.onnxruntime_cpu.library import EXTRA, PACKAGE

if TYPE_CHECKING:
    from sdrt.runtime.backends.executor import Executor
    from sdrt.runtime.bundle.bundle import Bundle, Verify
    from sdrt.runtime.devices.device import Device
    from sdrt.runtime.devices.gpu.discovery import Gpu


def probe(bundle: Bundle, _gpu: Gpu | None, _shape: RequestShape | None) -> str:
    """See `Backend.probe`."""
    return probe_on_cpu(bundle, PACKAGE, EXTRA)


def load(bundle: Bundle, component: str, _device: Device, threads: int | None, verify: Verify) -> Executor:
    """See `Backend.load`."""
    from sdrt.runtime.backends.onnxruntime_cpu.executor import OnnxRuntimeExecutor

    return load_on_cpu(OnnxRuntimeExecutor, bundle, component, threads, verify)


BACKEND = Backend("ONNX Runtime (CPU)", EXTRA, needs_gpu=False, probe=probe, load=load)
