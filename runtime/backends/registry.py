"""Backends: which engine libraries can run a bundle here, which one is taken, and why.

Asking costs little where there is no GPU: nothing is imported before the driver's library is found.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from sdrt.runtime.backends.executor import Executor
from sdrt.runtime.bundle.bundle import ALWAYS, Bundle, Verify
from sdrt.runtime.bundle.components import required_components
from sdrt.runtime.bundle.prepared_folder import Source
from sdrt.runtime.devices.device import Device, HostDevice
from sdrt.runtime.errors import BackendError, UsageError

if TYPE_CHECKING:
    from sdrt.runtime.bundle.engine_search import Capability, Engine
    from sdrt.runtime.devices.gpu.device import CudaDevice

AUTO: Final = "auto"
NO_DRIVER: Final = "no NVIDIA driver"  # how a reason begins where nobody would expect a GPU to be used
CpuExecutor = Callable[..., Executor]  # ``(model, spec, *, threads, source) → executor``
# What TensorRT may say of an engine that no other size or setting will mend.
UNFIT: Final = frozenset({"UNSUPPORTED_CC", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME"})
# Components whose plain fp32 graphs write group normalisation out as ONNX Runtime's CPU provider wants it.
WITH_GROUP_NORMS: Final = frozenset({"unet", "vae_decoder", "vae_encoder"})


@dataclass(frozen=True, slots=True)
class RequestShape:
    """What a call will ask of the engines.

    Attributes:
        images: Pictures drawn together.
        height: Pixels.
        width: Pixels.
        guided: Whether the U-Net runs on two rows for each picture.
        chunks: Of the longest prompt.
        picture: Whether it starts from a picture, which the VAE's encoder has to read.
    """

    images: int
    height: int
    width: int
    guided: bool = True
    chunks: int = 1
    picture: bool = False

    def axes(self, factor: int, tokens: int) -> dict[str, int]:
        """The named axes of the components; ``factor`` is pixels per latent, ``tokens`` those of a chunk."""
        return {
            "rows": self.images * (2 if self.guided else 1),
            "batch": self.images,
            "context": self.chunks * tokens,
            "height": self.height,
            "width": self.width,
            "latent_height": self.height // factor,
            "latent_width": self.width // factor,
        }


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that is there: its number, its name and its compute capability."""

    index: int
    name: str
    capability: Capability

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that was taken.

    Attributes:
        name: A name in `BACKENDS`.
        reasons: What speaks for it, and before that what speaks against each backend that comes before it.
        gpu: The GPU it runs on; None on the CPU.
    """

    name: str
    reasons: tuple[str, ...]
    gpu: Gpu | None = None


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to run a bundle.

    Attributes:
        needs_gpu: Whether it runs on an NVIDIA GPU.
        probe: ``(bundle, gpu, shape) → what it would run``; raises BackendError with the reason if it cannot.
        load: ``(bundle, component, device, threads, verify) → executor``.
        by_shape: Whether what it keeps from run to run is for one shape: of no use to a call with another.
    """

    needs_gpu: bool
    probe: Callable[[Bundle, Gpu | None, RequestShape | None], str]
    load: Callable[[Bundle, str, Device, int | None, Verify], Executor]
    by_shape: bool = False


def choose_backend(
    bundle: Bundle, name: str = AUTO, request_shape: RequestShape | None = None, *, device: int = 0
) -> Choice:
    """The backend to use: the one that was asked for, or the first of `BACKENDS` that can run the bundle.

    Args:
        bundle: Opened.
        name: A name in `BACKENDS`, or ``auto``.
        request_shape: What will be asked for; engines must admit it. By default any engine will do.
        device: Number of the GPU.

    Raises:
        UsageError: No backend of that name.
        BackendError: It cannot run here (with ``auto``: none can); the message says why and what to do.
    """
    if name != AUTO and name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}; there is {AUTO}, {', '.join(BACKENDS)}")
    wanted = list(BACKENDS) if name == AUTO else [name]
    gpu, no_gpu = _find_gpu(device) if any(BACKENDS[entry].needs_gpu for entry in wanted) else (None, "")
    against: list[str] = []
    if no_gpu:
        left_out = [entry for entry in wanted if BACKENDS[entry].needs_gpu]
        against.append(f"{', '.join(left_out)}: {no_gpu}")
        wanted = [entry for entry in wanted if entry not in left_out]
    for entry in wanted:
        backend = BACKENDS[entry]
        try:
            reason = backend.probe(bundle, gpu if backend.needs_gpu else None, request_shape)
        except BackendError as error:
            against.append(f"{entry}: {error}")
        else:
            return Choice(entry, (*against, f"{entry}: {reason}"), gpu if backend.needs_gpu else None)
    if name != AUTO:
        raise BackendError(f"the backend {name} cannot run here: {against[0].removeprefix(f'{name}: ')}")
    raise BackendError(f"no backend can run this bundle here: {' | '.join(against)}")


def open_device(choice: Choice, stream: Any = None) -> Device:
    """The device that a backend's executors run on.

    Args:
        choice: From `choose_backend`.
        stream: A caller's CUDA stream to work in: an object with ``__cuda_stream__``, or a handle; by default
            a private one.

    Raises:
        UsageError: A stream for a backend that runs on the CPU.
        BackendError: The GPU cannot be used.
    """
    if choice.gpu is None:
        if stream is not None:
            raise UsageError(f"the backend {choice.name} runs on the CPU and takes no CUDA stream")
        return HostDevice()
    from sdrt.runtime.devices.gpu.device import CudaDevice

    return CudaDevice(choice.gpu.index if stream is None else None, stream=stream)


def load_executor(
    bundle: Bundle,
    component: str,
    *,
    backend: str,
    device: Device,
    threads: int | None = None,
    verify: Verify = True,
) -> Executor:
    """Load one component of a bundle on a backend.

    Args:
        bundle: Opened.
        component: Its name.
        backend: A name in `BACKENDS`, as `choose_backend` gives it.
        device: From `open_device`.
        threads: On the CPU, threads that work at once; by default one per usable core.
        verify: Compare the SHA-256 of an engine's plan with its manifest; otherwise only the size. The
            bundle's own files must have been compared by the caller then. ``"always"``: also what was
            prepared of them, where that was compared before.

    Raises:
        UsageError: No backend of that name.
        BackendError: It is not installed, or cannot run this component.
        BundleError: An engine that was chosen is damaged.
    """
    try:
        chosen = BACKENDS[backend]
    except KeyError:
        raise UsageError(f"unknown backend {backend!r}; there is {', '.join(BACKENDS)}") from None
    if not (chosen.needs_gpu or bundle.embedded):
        from sdrt.runtime.admission.records import admit  # what sdrt ships need not wait for it

        admit(bundle, [component], backend, verify=bool(verify))
    return chosen.load(bundle, component, device, threads, verify)


def find_gpu(index: int = 0) -> Gpu:
    """The GPU that would be used, without opening it.

    Raises:
        BackendError: No driver, a driver too old, or no GPU.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError(
            f"{NO_DRIVER}: {error}; install the driver, or give the container the GPU (docker run --gpus all)"
        ) from None
    from sdrt.runtime.devices.gpu.bindings import load_bindings

    api = load_bindings()
    attribute = api.CUdevice_attribute
    major = attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    minor = attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
    results = []
    for function, arguments in (
        ("cuDeviceGet", (index,)),
        ("cuDeviceGetName", (256, index)),
        ("cuDeviceGetAttribute", (major, index)),
        ("cuDeviceGetAttribute", (minor, index)),
    ):
        status, result = getattr(api, function)(*arguments)
        if status:
            raise BackendError(f"no NVIDIA GPU number {index} can be used: {function} says {status.name}")
        results.append(result)
    return Gpu(index, results[1].split(b"\0")[0].decode(), (int(results[2]), int(results[3])))


def _find_gpu(index: int) -> tuple[Gpu | None, str]:
    try:
        return find_gpu(index), ""
    except BackendError as error:
        return None, str(error)


def _probe_cpu(package: str, extra: str) -> Callable[[Bundle, Gpu | None, RequestShape | None], str]:
    def probe(bundle: Bundle, _gpu: Gpu | None, _shape: RequestShape | None) -> str:
        if find_spec(package) is None:
            raise BackendError(f"the package {package} is not installed: pip install 'sdrt[{extra}]'")
        for name in required_components(bundle.manifest.family):
            _refuse_bfloat16(bundle, name)
        return f"{package} is installed"

    return probe


def _refuse_bfloat16(bundle: Bundle, component: str) -> None:
    if bundle.component(component).precision == "bf16":
        raise BackendError(
            "sdrt has no bfloat16 arithmetic on the CPU; export with --dtype fp32 to draw here"
        )


def _load_cpu(import_executor: Callable[[], CpuExecutor]) -> Callable[..., Executor]:
    def load(
        bundle: Bundle, component: str, _device: Device, threads: int | None, verify: Verify
    ) -> Executor:
        executor = import_executor()
        _refuse_bfloat16(bundle, component)
        part = bundle.component(component)
        model = bundle.file(part.model_entry)
        # What was prepared of unaltered files must not stand in for altered ones.
        compared = verify or bundle.is_verified(part.files)
        source = Source(bundle.path, part.model, part.files, verify == ALWAYS) if compared else None
        return executor(model, part.spec, threads=threads, source=source)

    return load


def _onnxruntime_executor() -> CpuExecutor:
    from sdrt.runtime.backends.onnxruntime_cpu import OnnxRuntimeExecutor

    return OnnxRuntimeExecutor


def _openvino_executor() -> CpuExecutor:
    from sdrt.runtime.backends.openvino_cpu.executor import OpenVinoExecutor

    return OpenVinoExecutor


def _probe_tensorrt(flavour: str) -> Callable[[Bundle, Gpu | None, RequestShape | None], str]:
    def probe(bundle: Bundle, gpu: Gpu | None, shape: RequestShape | None) -> str:
        from sdrt.runtime.backends.libraries import import_tensorrt
        from sdrt.runtime.bundle.engine_search import find_engine  # 10 ms that a CPU need not spend

        assert gpu is not None
        trt = import_tensorrt(flavour)
        version = trt.__version__
        axes = shape.axes(bundle.manifest.latents.factor, bundle.manifest.tokens) if shape else {}
        for name in _needed(bundle, shape):
            engine = find_engine(bundle, name, flavour, version, gpu.capability, _axes_of(name, axes))
            _refuse_unfit(trt, engine, name, gpu)
        return f"{flavour} {version} has an engine of every component for {gpu}"

    return probe


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


def _axes_of(component: str, axes: Mapping[str, int]) -> Mapping[str, int]:
    """Encoders work on one text or picture after the other, whatever the number of pictures."""
    if component == "vae_encoder":
        return {name: size for name, size in axes.items() if name != "batch"}
    return {} if component.startswith(("text_encoder", "image_encoder")) else axes


def _needed(bundle: Bundle, shape: RequestShape | None) -> tuple[str, ...]:
    """The components that a request needs."""
    pictures = ("vae_encoder",) if shape is not None and shape.picture else ()
    return (*required_components(bundle.manifest.family), *pictures)


def _probe_onnxruntime_cuda(bundle: Bundle, gpu: Gpu | None, shape: RequestShape | None) -> str:
    from sdrt.runtime.backends.onnxruntime_cuda import find_graph, import_with_cuda

    version = import_with_cuda().__version__
    axes = shape.axes(bundle.manifest.latents.factor, bundle.manifest.tokens) if shape else {}
    graphs = []
    for name in _needed(bundle, shape):
        engine, about = find_graph(bundle, name, version, _axes_of(name, axes))
        if engine is None and name in WITH_GROUP_NORMS and bundle.component(name).precision == "fp32":
            raise BackendError(f"{about}; in fp32 that has operators which its CUDA provider lacks")
        graphs.append(about)
    return f"onnxruntime {version} runs on {gpu}: {'; '.join(graphs)}"


def _load_tensorrt(flavour: str) -> Callable[[Bundle, str, Device, int | None, Verify], Executor]:
    def load(
        bundle: Bundle, component: str, device: Device, _threads: int | None, verify: Verify
    ) -> Executor:
        from sdrt.runtime.backends.trt.executor import TensorRTExecutor

        return TensorRTExecutor(bundle, component, _cuda(device, flavour), flavour, verify=bool(verify))

    return load


def _load_onnxruntime_cuda(
    bundle: Bundle, component: str, device: Device, _threads: int | None, verify: Verify
) -> Executor:
    from sdrt.runtime.backends.onnxruntime_cuda import BACKEND, OnnxRuntimeCudaExecutor

    return OnnxRuntimeCudaExecutor(bundle, component, _cuda(device, BACKEND), verify=bool(verify))


def _cuda(device: Device, backend: str) -> CudaDevice:
    from sdrt.runtime.devices.gpu.device import CudaDevice

    if not isinstance(device, CudaDevice):
        raise UsageError(f"the backend {backend} runs on a CUDA device, given {device.name}: see open_device")
    return device


# In the order in which `auto` tries them. Of the two for the CPU the one comes first that draws one picture
# sooner in a fresh process: OpenVINO takes half a second more to load the embedded model.
BACKENDS: Final[Mapping[str, Backend]] = {
    "tensorrt": Backend(True, _probe_tensorrt("tensorrt"), _load_tensorrt("tensorrt")),
    "tensorrt-rtx": Backend(True, _probe_tensorrt("tensorrt-rtx"), _load_tensorrt("tensorrt-rtx")),
    "onnxruntime-cuda": Backend(True, _probe_onnxruntime_cuda, _load_onnxruntime_cuda),
    "onnxruntime-cpu": Backend(False, _probe_cpu("onnxruntime", "cpu"), _load_cpu(_onnxruntime_executor)),
    "openvino-cpu": Backend(
        False, _probe_cpu("openvino", "openvino"), _load_cpu(_openvino_executor), by_shape=True
    ),
}
