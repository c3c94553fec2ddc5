"""The bytes of a LoRA file: safetensors alone, within limits, every tensor in float32.

bfloat16 is the upper half of a float32, and both kinds of eight bits are float16 with fewer bits behind the
point (E5M2) or with another range (E4M3), so that all of them are read exactly without a library for them.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.bundle.limits import (
    MAX_DIMENSION,
    MAX_LORA_BYTES,
    MAX_LORA_HEADER_BYTES,
    MAX_LORA_TENSORS,
    MAX_RANK,
)
from sdrt.runtime.errors import UsageError
from sdrt.runtime.system.untrusted import (
    PICKLE_SUFFIXES,
    is_pickle,
    library_errors,
    open_regular,
    parse_json,
)

_CONVERT: Final = "refused, for it can run any program when it is read; convert it to safetensors"
_PLAIN: Final = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"},
}

Tensors = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """What a file holds.

    Attributes:
        path: The file.
        sha256: Of its bytes, in hex.
        tensors: Key → numbers, all finite.
        metadata: What its header says of itself.
    """

    path: Path
    sha256: str
    tensors: Tensors
    metadata: Mapping[str, str]


def read_content(path: str | Path) -> Content:
    """Read a safetensors file.

    Raises:
        UsageError: There is none, it is a pickle, damaged or too large, or holds NaN or infinity.
    """
    file = Path(path)
    content = _bytes(file)
    metadata = _metadata(file, content)
    return Content(file, hashlib.sha256(content).hexdigest(), _tensors(file, content), metadata)


def _bytes(file: Path) -> bytes:
    if file.suffix.lower() in PICKLE_SUFFIXES:
        raise UsageError(f"{file} is a pickle: {_CONVERT}")
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > MAX_LORA_BYTES:
                raise UsageError(f"{file} has {size} bytes, a LoRA at most {MAX_LORA_BYTES}")
            content = stream.read(size)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"there is no file {file}: give a LoRA in the safetensors format") from None
    except ValueError as error:
        raise UsageError(f"{error}") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    if is_pickle(content[:9]):
        raise UsageError(f"{file} is a pickle, whatever its name: {_CONVERT}")
    return content


def _metadata(file: Path, content: bytes) -> Mapping[str, str]:
    """What a header says beside its tensors; the library that reads these does not give it from bytes."""
    try:
        (length,) = struct.unpack_from("<Q", content)
        if length > MAX_LORA_HEADER_BYTES:
            raise ValueError(f"its header would have {length} bytes, the limit is {MAX_LORA_HEADER_BYTES}")
        header = parse_json(content[8 : 8 + length])
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
    except (struct.error, ValueError) as error:
        raise UsageError(f"{file} is no safetensors file, or damaged ({error})") from None
    if len(header) > MAX_LORA_TENSORS:
        raise UsageError(f"{file} has {len(header)} tensors, a LoRA at most {MAX_LORA_TENSORS}")
    found = header.get("__metadata__", {})
    return found if isinstance(found, dict) else {}


def _tensors(file: Path, content: bytes) -> Tensors:
    import safetensors  # only who uses LoRAs waits for it

    deserialize: Callable[[bytes], list[tuple[str, Mapping[str, Any]]]] = safetensors.deserialize
    with library_errors(UsageError, f"{file} is no safetensors file, or damaged"):
        entries = deserialize(content)
    tensors = {}
    for name, entry in sorted(entries, key=lambda named: named[0]):  # the library gives no order
        numbers = _numbers(file, name, entry["dtype"], entry["data"])
        if not np.isfinite(numbers).all():
            raise UsageError(f"{file}: the tensor {name!r} holds NaN or infinity, so the LoRA cannot be used")
        shape = tuple(entry["shape"])
        if len(shape) > MAX_RANK or max(shape, default=0) > MAX_DIMENSION:  # NumPy has limits, too
            raise UsageError(
                f"{file}: the tensor {name!r} has {len(shape)} axes of up to {max(shape, default=0)}, of a "
                f"LoRA it is at most {MAX_RANK} of {MAX_DIMENSION}"
            )
        tensors[name] = numbers.reshape(shape)
    return tensors


def _numbers(file: Path, name: str, kind: str, data: Any) -> NDArray[np.float32]:
    """The numbers of a tensor, one after the other."""
    if kind == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if kind == "F8_E5M2":
        return (np.frombuffer(data, "u1").astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    if kind == "F8_E4M3":
        return _from_e4m3(np.frombuffer(data, "u1").astype(np.uint16))
    if kind not in _PLAIN:
        raise UsageError(
            f"{file}: the tensor {name!r} is {kind}; a LoRA is F32, F16, BF16, F64, F8_E4M3 or F8_E5M2"
        )
    with np.errstate(over="ignore"):  # beyond float32: infinity, which is refused
        return np.frombuffer(data, _PLAIN[kind]).astype(np.float32)


def _from_e4m3(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Four bits of exponent with a bias of 7 where float16 has 15, no infinity, one NaN of each sign."""
    halves = ((bits & 0x80) << 8 | (bits & 0x7F) << 7).view(np.float16)
    numbers = halves.astype(np.float32) * np.float32(2**8)
    numbers[bits & 0x7F == 0x7F] = np.nan
    return numbers
