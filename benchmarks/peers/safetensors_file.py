"""Safetensors files written and renamed without holding them in memory.

The format is eight bytes with the length of a header, the header as JSON, and the tensors' bytes one after
the other (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

ALIGNMENT: Final = 8
METADATA: Final = "__metadata__"


def write_float32(
    path: Path, shapes: Mapping[str, tuple[int, ...]], arrays: Iterable[NDArray[np.float32]]
) -> None:
    """Write float32 tensors; only one of them is in memory at a time.

    Args:
        path: Of the file.
        shapes: Of all tensors, in the order of ``arrays``.
        arrays: Their values.

    Raises:
        OSError: The file cannot be written.
        ValueError: A shape is not as announced, or an array is missing.
    """
    header: dict[str, Any] = {METADATA: {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    with path.open("wb") as stream:
        stream.write(_header_bytes(header))
        for (name, shape), array in zip(shapes.items(), arrays, strict=True):
            if array.shape != shape or array.dtype != np.float32:
                raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, not float32{list(shape)}")
            stream.write(np.ascontiguousarray(array).data)


def tensor_names(path: Path) -> list[str]:
    """The names of a file's tensors.

    Raises:
        OSError: The file cannot be read.
    """
    return [name for name in _read_header(path)[0] if name != METADATA]


def copy_renamed(source: Path, target: Path, rename: Callable[[str], str]) -> None:
    """Copy a file; its tensors have other names.

    Raises:
        OSError: A file cannot be read or written.
    """
    header, start = _read_header(source)
    renamed = {name if name == METADATA else rename(name): entry for name, entry in header.items()}
    with source.open("rb") as read, target.open("wb") as written:
        read.seek(start)
        written.write(_header_bytes(renamed))
        shutil.copyfileobj(read, written, 1 << 20)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length)), 8 + length


def _header_bytes(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
