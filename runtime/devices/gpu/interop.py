"""Streams and arrays of other libraries, by the protocols that they share."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from sdrt.runtime.devices.gpu.arrays import DeviceArray
from sdrt.runtime.devices.gpu.dlpack import import_capsule, is_contiguous
from sdrt.runtime.devices.gpu.driver import LEGACY_STREAM, PER_THREAD_STREAM
from sdrt.runtime.devices.gpu.stream import Stream
from sdrt.runtime.errors import UsageError

_HANDLES: Final = ("handle", "cuda_stream", "ptr")  # PyCUDA and cuda.core; PyTorch; CuPy
_MANAGED_TYPE: Final = 13  # DLPack's kDLCUDAManaged


def stream_handle(stream: object) -> int:
    """The driver's handle of a caller's stream.

    Args:
        stream: An object with ``__cuda_stream__`` (cuda.core's protocol, version 0), a stream of PyCUDA, CuPy
            or PyTorch, or the handle as an integer.

    Raises:
        UsageError: Something else, or a default stream: it cannot be captured into a graph.
    """
    handle = _handle(stream)
    if handle in (0, LEGACY_STREAM, PER_THREAD_STREAM):
        raise UsageError(
            "the stream is a default stream, which cannot be captured into a graph: create one of your own "
            "(pycuda.driver.Stream(), torch.cuda.Stream(), cupy.cuda.Stream(non_blocking=True)), or give "
            "none and the pipeline has its own"
        )
    return handle


def _handle(stream: object) -> int:
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        version, handle = protocol() if callable(protocol) else protocol
        if version != 0:
            raise UsageError(f"the stream speaks version {version} of __cuda_stream__: 0 is known")
        return int(handle)
    if isinstance(stream, int) and not isinstance(stream, bool):
        if stream < 0:
            raise UsageError(f"the stream is {stream}: a handle is positive")
        return stream
    for name in _HANDLES:
        handle = getattr(stream, name, None)
        if handle is not None:
            return int(handle)
    raise UsageError(
        f"the stream is a {type(stream).__name__}: give an object with __cuda_stream__, a stream of PyCUDA, "
        "CuPy or PyTorch, or its handle as an integer"
    )


def foreign_array(stream: Stream, array: Any) -> DeviceArray:
    """Another library's array as ours, with our stream behind what it has queued.

    DLPack is preferred, since with it the other library orders the streams itself.

    Raises:
        UsageError: As `sdrt.runtime.devices.device.Device.from_cuda_array`.
    """
    if isinstance(array, DeviceArray):
        return _from_interface(stream, array)
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return _from_dlpack(stream, array)
    if hasattr(array, "__cuda_array_interface__"):
        return _from_interface(stream, array)
    raise UsageError(
        f"a {type(array).__name__} was given: an array on the GPU is wanted, with __dlpack__ or "
        "__cuda_array_interface__"
    )


def _from_dlpack(stream: Stream, array: Any) -> DeviceArray:
    driver = stream.driver
    kind, ordinal = (int(part) for part in array.__dlpack_device__())
    if kind not in (driver.dlpack_device_type, _MANAGED_TYPE):
        raise UsageError(
            f"a {type(array).__name__} in DLPack's memory of type {kind} was given: it must be on the "
            f"GPU {driver.facts.ordinal} (type {driver.dlpack_device_type}); give what is on the host "
            "as a NumPy array"
        )
    if ordinal != driver.facts.ordinal:
        raise UsageError(
            f"an array on GPU {ordinal} was given, but the pipeline is on {driver.facts.ordinal}"
        )
    try:
        capsule = array.__dlpack__(stream=stream.handle)
    except (BufferError, RuntimeError) as error:  # such as a tensor that needs gradients
        raise UsageError(f"a {type(array).__name__} cannot be taken: {error}") from error
    owner, address, shape, dtype = import_capsule(capsule)
    return DeviceArray(stream, owner, address, shape, dtype)


def _from_interface(stream: Stream, array: Any) -> DeviceArray:
    interface = array.__cuda_array_interface__
    shape = tuple(int(size) for size in interface["shape"])
    dtype = np.dtype(interface["typestr"])
    address, _read_only = interface["data"]
    strides = interface.get("strides")
    if strides is not None:
        steps = tuple(stride // dtype.itemsize for stride in strides)
        if not is_contiguous(shape, steps):
            raise UsageError(f"an array of shape {list(shape)} is not C-contiguous: make it so first")
    _check_context(stream, int(address))
    producer = interface.get("stream")
    if producer == 0:
        raise UsageError("the array names stream 0, which the protocol forbids: 1 is the default stream")
    # Without a stream (version 2, and PyCUDA) nothing is known: what is in the default stream comes first.
    stream.order_behind(LEGACY_STREAM if producer is None else int(producer))
    return DeviceArray(stream, array, int(address), shape, dtype)


def _check_context(stream: Stream, address: int) -> None:
    context = stream.driver.context_of(address) if address else None
    if context is not None and not stream.driver.is_own_context(context):
        raise UsageError(
            "the array belongs to another CUDA context: load the pipeline with stream=, a stream of that "
            "context, or let the other library use the GPU's primary context (import pycuda.autoprimaryctx)"
        )
