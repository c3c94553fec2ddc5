"""The backend ``onnxruntime-cuda``: ONNX Runtime's CUDA provider, on graphs that were rewritten for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sdrt.runtime.backends.backend import Backend, RequestShape
from sdrt.runtime.backends.cuda_backends import cuda_device, needed_components
from sdrt.runtime.backends.onnxruntime_cuda.library import EXTRA, NAME, import_with_cuda
from sdrt.runtime.errors import BackendError

if TYPE_CHECKING:
    from sdrt.runtime.backends.executor import Executor
    from sdrt.runtime.bundle.bundle import Bundle, Verify
    from sdrt.runtime.devices.device import Device
    from sdrt.runtime.devices.gpu.discovery import Gpu

# Components whose plain fp32 graphs write group normalisation out as ONNX Runtime's CPU provider wants it.
WITH_GROUP_NORMS: Final = frozenset({"unet", "vae_decoder", "vae_encoder"})


def probe(bundle: Bundle, gpu: Gpu | None, shape: RequestShape | None) -> str:
    """See `Backend.probe`."""
    version = import_with_cuda().__version__
    from sdrt.runtime.backends.onnxruntime_cuda.executor import find_graph

    graphs = []
    for name, axes in needed_components(bundle, shape).items():
        engine, about = find_graph(bundle, name, version, axes)
        if engine is None and name in WITH_GROUP_NORMS and bundle.component(name).precision == "fp32":
            raise BackendError(f"{about}; in fp32 that has operators which its CUDA provider lacks")
        graphs.append(about)
    return f"onnxruntime {version} runs on {gpu}: {'; '.join(graphs)}"


def load(bundle: Bundle, component: str, device: Device, _threads: int | None, verify: Verify) -> Executor:
    """See `Backend.load`."""
    from sdrt.runtime.backends.onnxruntime_cuda.executor import OnnxRuntimeCudaExecutor

    return OnnxRuntimeCudaExecutor(bundle, component, cuda_device(device, NAME), verify=bool(verify))


BACKEND = Backend("ONNX Runtime (CUDA)", EXTRA, needs_gpu=True, probe=probe, load=load)
