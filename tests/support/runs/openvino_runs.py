"""Components on OpenVINO and on ONNX Runtime, on the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from sdrt.runtime.backends.onnxruntime_cpu.executor import OnnxRuntimeExecutor
from sdrt.runtime.backends.openvino_cpu.executor import OpenVinoExecutor
from sdrt.runtime.bundle.bundle import Bundle
from tolerances import GRAPH_FP32

Arrays = dict[str, Any]
AXES = {
    "rows": 2,
    "batch": 1,
    "latent_height": 8,
    "latent_width": 16,
    "height": 16,
    "width": 32,
    "context": 77,
}


def load(kind: type[Any], bundle: Bundle, component: str = "unet", **options: Any) -> Any:
    part = bundle.component(component)
    return kind(bundle.path / part.model, part.spec, **options)


def openvino(bundle: Bundle, component: str = "unet", **options: Any) -> OpenVinoExecutor:
    executor: OpenVinoExecutor = load(OpenVinoExecutor, bundle, component, **options)
    return executor


def buffers(bundle: Bundle, component: str = "unet", seed: int = 0, **axes: int) -> tuple[Arrays, Arrays]:
    """Random inputs and empty outputs."""
    spec, sizes = bundle.component(component).spec, {**AXES, **axes}
    generator = np.random.default_rng(seed)
    inputs = {
        entry.name: np.zeros(entry.concrete(sizes), entry.dtype)
        if entry.name == "clip_skip"
        else generator.integers(0, 500, entry.concrete(sizes)).astype(entry.dtype)
        if entry.name in ("input_ids", "timestep")
        else generator.standard_normal(entry.concrete(sizes)).astype(entry.dtype)
        for entry in spec.inputs
    }
    return inputs, {entry.name: np.zeros(entry.concrete(sizes), entry.dtype) for entry in spec.outputs}


def expected(bundle: Bundle, inputs: Arrays, outputs: Arrays, component: str = "unet") -> Arrays:
    """What ONNX Runtime makes of the same inputs."""
    results = {name: np.zeros_like(array) for name, array in outputs.items()}
    load(OnnxRuntimeExecutor, bundle, component).bind(inputs, results)()
    return results


def assert_close(found: Arrays, wanted: Arrays, tolerance: float = 2 * GRAPH_FP32) -> None:
    """Relative L2. In float32 both are within GRAPH_FP32 of the reference."""
    for name, array in wanted.items():
        error = np.linalg.norm(np.float32(found[name]) - array) / np.linalg.norm(np.float32(array))
        assert error < tolerance, f"{name}: {error}"
