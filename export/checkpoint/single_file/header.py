"""What a safetensors file holds, from its header: no weights are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from sdrt.export.checkpoint.files import file_tensors
from sdrt.runtime.errors import CheckpointError

# safetensors' names of the dtypes that are read, as people call them.
DTYPES: Final = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
FP8: Final = ("F8_E4M3", "F8_E5M2")  # storage alone: fp16 holds each of their numbers
# Beside quantised weights: their scales, in the names that programs give them.
_SCALES: Final = ("scaled_fp8", "scale_weight", "weight_scale", "comfy_quant", "input_scale")


@dataclass(frozen=True, slots=True)
class Header:
    """A safetensors file: its tensors' dtypes (safetensors' names) and shapes, and its metadata."""

    path: Path
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    metadata: Mapping[str, str]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; empty where there is none of that name, or it is a scalar."""
        return self.tensors[name][1] if name in self.tensors else ()

    def dtype_of(self, names: Iterable[str]) -> str:
        """The dtype that most numbers of these tensors have, in safetensors' words."""
        numbers: Counter[str] = Counter()
        for name in names:
            dtype, shape = self.tensors[name]
            numbers[dtype] += prod(shape)
        return numbers.most_common(1)[0][0] if numbers else ""


def read_header(file: Path) -> Header:
    """Read the header of a file.

    Raises:
        CheckpointError: It is a pickle (by its bytes, whatever its name is), or no whole safetensors file.
    """
    tensors, metadata = file_tensors(file)
    return Header(file, tensors, metadata)


def check_storage(header: Header, names: Iterable[str]) -> None:
    """Refuse weights that are not plain floating point numbers.

    Raises:
        CheckpointError: They are quantised, by their dtypes or by the scales beside them.
    """
    for name in header.tensors:
        if name.rpartition(".")[2] in _SCALES:
            raise CheckpointError(
                f"{header.path} has the tensor {name}: its weights are quantised, with scales beside them; "
                "give the checkpoint that it was made from (plain fp8 is read)"
            )
    for name in names:
        dtype = header.tensors[name][0]
        if dtype not in DTYPES and dtype not in FP8 and not name.endswith("position_ids"):
            raise CheckpointError(
                f"{header.path}: the tensor {name} is {dtype}; read are {', '.join(DTYPES.values())} and "
                "fp8, not quantised weights: give the checkpoint that it was made from"
            )


def load_tensors(header: Header, names: Iterable[str], *, meta: bool) -> Iterator[tuple[str, Any]]:
    """Tensors of a file as PyTorch's, fp8 widened to fp16, which holds each of its numbers.

    Args:
        header: Of the file.
        names: Which.
        meta: Without their numbers: of the same shapes and dtypes on the device ``meta``.
    """
    import torch
    from safetensors import safe_open

    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if meta:
        for name in names:
            dtype, shape = header.tensors[name]
            yield name, torch.empty(shape, dtype=kinds.get(dtype, torch.float16), device="meta")
        return
    with safe_open(header.path, framework="pt") as opened:
        for name in names:
            tensor = opened.get_tensor(name)
            yield name, tensor.half() if header.tensors[name][0] in FP8 else tensor
