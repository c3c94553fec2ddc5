"""What the backends of NVIDIA GPUs have in common: which components a call needs, and at which sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sdrt.runtime.backends.backend import RequestShape
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.families.record import Family
from sdrt.runtime.errors import UsageError

if TYPE_CHECKING:
    from sdrt.runtime.devices.device import Device
    from sdrt.runtime.devices.gpu.device import CudaDevice


def needed_components(bundle: Bundle, shape: RequestShape | None) -> dict[str, Mapping[str, int]]:
    """The components that a call needs, and the size of each one's named axes as far as they are known."""
    axes = shape.axes(bundle.manifest.latents.factor, bundle.manifest.tokens) if shape else {}
    pictures = ("vae_encoder",) if shape is not None and shape.picture else ()
    record = bundle.manifest.record
    return {name: _axes_of(record, name, axes) for name in (*record.required, *pictures)}


def _axes_of(family: Family, component: str, axes: Mapping[str, int]) -> Mapping[str, int]:
    """Encoders work on one text or picture after the other, whatever the number of pictures."""
    if component == "vae_encoder":
        return {name: size for name, size in axes.items() if name != "batch"}
    return {} if component in {encoder.component for encoder in family.encoders} else axes


def cuda_device(device: Device, backend: str) -> CudaDevice:
    """The device, which must be a CUDA device.

    Raises:
        UsageError: It is another one.
    """
    from sdrt.runtime.devices.gpu.device import CudaDevice

    if not isinstance(device, CudaDevice):
        raise UsageError(f"the backend {backend} runs on a CUDA device, given {device.name}: see open_device")
    return device
