"""The backends ``tensorrt`` and ``tensorrt-rtx``: engines that were built for the bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sdrt.runtime.backends.backend import Backend, RequestShape
from sdrt.runtime.backends.cuda_backends import cuda_device, needed_components
from sdrt.runtime.backends.trt.library import EXTRAS, RTX, TENSORRT, import_tensorrt
from sdrt.runtime.errors import BackendError

if TYPE_CHECKING:
    from sdrt.runtime.backends.executor import Executor
    from sdrt.runtime.bundle.bundle import Bundle, Verify
    from sdrt.runtime.bundle.engine_search import Engine
    from sdrt.runtime.devices.device import Device
    from sdrt.runtime.devices.gpu.discovery import Gpu

# What TensorRT may say of an engine that no other size or setting will mend.
UNFIT: Final = frozenset({"UNSUPPORTED_CC", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME"})


def _backend(flavour: str, label: str) -> Backend:
    def probe(bundle: Bundle, gpu: Gpu | None, shape: RequestShape | None) -> str:
        assert gpu is not None
        return _probe(flavour, bundle, gpu, shape)

    def load(
        bundle: Bundle, component: str, device: Device, _threads: int | None, verify: Verify
    ) -> Executor:
        from sdrt.runtime.backends.trt.executor import TensorRTExecutor

        return TensorRTExecutor(bundle, component, cuda_device(device, flavour), flavour, verify=bool(verify))

    return Backend(label, EXTRAS[flavour], needs_gpu=True, probe=probe, load=load)


def _probe(flavour: str, bundle: Bundle, gpu: Gpu, shape: RequestShape | None) -> str:
    from sdrt.runtime.bundle.engine_search import find_engine  # 10 ms that a CPU need not spend

    trt = import_tensorrt(flavour)
    version = trt.__version__
    for name, axes in needed_components(bundle, shape).items():
        engine = find_engine(bundle, name, flavour, version, gpu.capability, axes)
        _refuse_unfit(trt, engine, name, gpu)
    return f"{flavour} {version} has an engine of every component for {gpu}"


def _refuse_unfit(trt: Any, engine: Engine, component: str, gpu: Gpu) -> None:
    """TensorRT for RTX knows which GPUs and drivers its engines run on: 8.0+ need not be all of them."""
    from sdrt.runtime.backends.trt.engine import invalid_because
    from sdrt.runtime.backends.trt.errors import ErrorLog

    if gpu.index != 0:  # it speaks of the current GPU, which is the first until a device is opened
        return
    runtime = trt.Runtime(ErrorLog(trt).logger)
    header = engine.read_header(getattr(runtime, "engine_header_size", 0))
    if wrong := UNFIT.intersection(invalid_because(trt, runtime, header)):
        raise BackendError(
            f"TensorRT says that the engine of the {component} does not run on {gpu}: "
            f"{', '.join(sorted(wrong))}; its targets are {', '.join(engine.manifest.key.targets)}"
        )


TENSORRT_BACKEND = _backend(TENSORRT, "TensorRT")
TENSORRT_RTX_BACKEND = _backend(RTX, "TensorRT for RTX")
