"""DLPack capsules, written and read with ctypes (dmlc/dlpack, ``dlpack.h``; the layout before 1.0)."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from sdrt.runtime.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import CapsuleType

_NAME: Final = b"dltensor"
_USED_NAME: Final = b"used_dltensor"  # must live as long as a capsule that is named so
_KINDS: Final = {"i": 0, "u": 1, "f": 2}  # DLDataTypeCode of NumPy's kinds
_KIND_OF: Final = {code: kind for kind, code in _KINDS.items()}


class _Device(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _ManagedTensor(ctypes.Structure):
    _fields_ = (
        ("tensor", _Tensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),  # void (*)(DLManagedTensor *), may be null
    )


_python = ctypes.pythonapi
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_capsule_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", _python)
)
# A capsule that is being destroyed has no references left, so it is handled as an address.
_capsule_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", _python)
)
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", _python)
)
_capsule_set_name = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_SetName", _python)
)

_exported: Final[dict[int, tuple[object, ...]]] = {}  # managed tensor's address → what it needs alive


def _forget(address: int) -> None:
    _exported.pop(address, None)


def _destroy_unread(capsule: int) -> None:
    if _capsule_is_valid(capsule, _NAME):  # otherwise somebody took the tensor and calls the deleter
        _forget(_capsule_pointer(capsule, _NAME))


_deleter = _Deleter(_forget)
_destructor = _Destructor(_destroy_unread)


def export_capsule(
    owner: object, address: int, shape: tuple[int, ...], dtype: np.dtype[Any], device: tuple[int, int]
) -> CapsuleType:
    """A capsule of C-contiguous memory.

    Args:
        owner: The object that is kept until the reader is done, or until the capsule dies unread.
        address: The address of the first element.
        shape: The number of elements along each axis.
        dtype: A signed, unsigned or floating dtype.
        device: DLPack's device type and id.

    Raises:
        BufferError: DLPack has no such dtype.
    """
    if dtype.kind not in _KINDS:
        raise BufferError(f"DLPack has no {dtype.name}")
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    strides = (ctypes.c_int64 * len(shape))(*_contiguous_strides(shape))
    managed = _ManagedTensor(
        tensor=_Tensor(
            data=address,
            device=_Device(*device),
            ndim=len(shape),
            dtype=_DataType(_KINDS[dtype.kind], dtype.itemsize * 8, 1),
            shape=sizes,
            strides=strides,
            byte_offset=0,
        ),
        manager_ctx=None,
        deleter=ctypes.cast(_deleter, ctypes.c_void_p).value,
    )
    pointer = ctypes.addressof(managed)
    _exported[pointer] = (owner, managed, sizes, strides)
    capsule: CapsuleType = _capsule_new(pointer, _NAME, ctypes.cast(_destructor, ctypes.c_void_p))
    return capsule


class Imported(NamedTuple):
    """Memory of another library: ``owner`` keeps it."""

    owner: object
    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class _Taken:
    """A tensor that was taken out of its capsule: its deleter is called when this object dies."""

    def __init__(self, pointer: int, deleter: int | None) -> None:
        self._pointer = pointer
        self._deleter = deleter

    def __del__(self) -> None:
        if self._deleter:
            _Deleter(self._deleter)(self._pointer)


def import_capsule(capsule: object) -> Imported:
    """Take the tensor out of a capsule.

    Raises:
        UsageError: Not contiguous, or a dtype that NumPy does not have. The capsule is left as it was.
    """
    address = id(capsule)  # CPython: a capsule's id is where it is
    if not _capsule_is_valid(address, _NAME):
        raise UsageError("the DLPack capsule was used before, or has a layout that was not asked for")
    pointer = _capsule_pointer(address, _NAME)
    managed = _ManagedTensor.from_address(pointer)
    tensor: _Tensor = managed.tensor
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    dtype = _numpy_dtype(tensor.dtype)
    if strides is not None and not is_contiguous(shape, strides):
        raise UsageError(f"an array of shape {list(shape)} is not C-contiguous: make it so first")
    _capsule_set_name(address, _USED_NAME)
    return Imported(_Taken(pointer, managed.deleter), (tensor.data or 0) + tensor.byte_offset, shape, dtype)


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether strides, in elements, are those of C order; of an axis of length 1 they say nothing."""
    if 0 in shape:
        return True
    expected = _contiguous_strides(shape)
    return all(size == 1 or a == b for size, a, b in zip(shape, strides, expected, strict=True))


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _numpy_dtype(dtype: _DataType) -> np.dtype[Any]:
    kind = _KIND_OF.get(dtype.code)
    if (
        kind is None
        or dtype.lanes != 1
        or dtype.bits not in (8, 16, 32, 64)
        or (kind, dtype.bits) == ("f", 8)
    ):
        raise UsageError(
            f"a DLPack array of dtype code {dtype.code}, {dtype.bits} bits: give it as float32 or float16"
        )
    return np.dtype(f"{kind}{dtype.bits // 8}")
