"""What a backend is: one way to run a bundle, in one file or folder with the engine library that it needs.

`sdrt.runtime.backends.registry` finds a backend by its name and imports it when it is asked for. So its
module imports little; the engine library is imported by `Backend.probe` or `Backend.load`, and no earlier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple  # dataclasses are 15 ms of `sd-run --help`

if TYPE_CHECKING:
    from sdrt.runtime.backends.executor import Executor
    from sdrt.runtime.bundle.bundle import Bundle, Verify
    from sdrt.runtime.devices.device import Device
    from sdrt.runtime.devices.gpu.discovery import Gpu

# Where each backend's record is, as ``module:attribute``, in the order in which `auto` tries them. Of the two
# for the CPU the one comes first that draws one picture sooner in a fresh process: OpenVINO takes half a
# second more to load the embedded model.
BACKENDS: Final[dict[str, str]] = {
    "tensorrt": "sdrt.runtime.backends.trt.backend:TENSORRT_BACKEND",
    "tensorrt-rtx": "sdrt.runtime.backends.trt.backend:TENSORRT_RTX_BACKEND",
    "onnxruntime-cuda": "sdrt.runtime.backends.onnxruntime_cuda.backend:BACKEND",
    "onnxruntime-cpu": "sdrt.runtime.backends.onnxruntime_cpu.backend:BACKEND",
    "openvino-cpu": "sdrt.runtime.backends.openvino_cpu.backend:BACKEND",
}


class RequestShape(NamedTuple):
    """What a call will ask of the engines.

    Attributes:
        images: Pictures drawn together.
        height: Their height in pixels.
        width: Their width in pixels.
        guided: Whether the U-Net runs on several rows for each picture.
        chunks: The chunks of the longest prompt.
        picture: Whether it starts from a picture, which the VAE's encoder has to read.
        guided_rows: How many rows those are (`sdrt.runtime.bundle.families.record.Family.guided_rows`).
    """

    images: int
    height: int
    width: int
    guided: bool = True
    chunks: int = 1
    picture: bool = False
    guided_rows: int = 2

    def axes(self, factor: int, tokens: int) -> dict[str, int]:
        """The named axes of the components; ``factor`` is pixels per latent, ``tokens`` those of a chunk."""
        return {
            "rows": self.images * (self.guided_rows if self.guided else 1),
            "batch": self.images,
            "context": self.chunks * tokens,
            "height": self.height,
            "width": self.width,
            "latent_height": self.height // factor,
            "latent_width": self.width // factor,
        }


class Backend(NamedTuple):
    """One way to run a bundle.

    Attributes:
        label: What people read of it in reports.
        extra: The extra of sdrt that installs its library: ``pip install 'sdrt[extra]'``.
        needs_gpu: Whether it runs on an NVIDIA GPU, in the memory of a CUDA device; otherwise on the host.
        probe: ``(bundle, gpu, shape) → what it would run``; raises BackendError with the reason if it cannot.
        load: ``(bundle, component, device, threads, verify) → executor``; `registry.load_executor` says what
            each is, and what may be raised.
        by_shape: Whether what it keeps from run to run is for one shape: of no use to a call with another.
    """

    label: str
    extra: str
    needs_gpu: bool
    probe: Callable[[Bundle, Gpu | None, RequestShape | None], str]
    load: Callable[[Bundle, str, Device, int | None, Verify], Executor]
    by_shape: bool = False
