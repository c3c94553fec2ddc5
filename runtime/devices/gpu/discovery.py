"""Which GPU is there, asked without opening it.

Where there is none the answer costs little: nothing is imported before the driver's library is found.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final

from sdrt.runtime.errors import BackendError

NO_DRIVER: Final = "no NVIDIA driver"  # how a reason begins where nobody would expect a GPU to be used


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that is there: its number, its name and its compute capability."""

    index: int
    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


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
