"""LoRAs that are merged for good: a checkpoint's tensors are edited on their way into a folder of its own.

The arithmetic is the runtime's (`sdrt.runtime.lora`), in float32; what is written stays float32, and the
export rounds it once to the precision of the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from sdrt.export.checkpoint.assembly import Assembly
from sdrt.export.checkpoint.part import Edit
from sdrt.runtime.bundle.weight_map import CheckpointTensor, WeightMap
from sdrt.runtime.errors import UsageError
from sdrt.runtime.lora.file import LoraFile, read_lora
from sdrt.runtime.lora.merge import Changes, changes_by_tensor, merged_tensor
from sdrt.runtime.lora.names import NETWORKS, TensorKey
from sdrt.runtime.lora.weights import checked_weights, short_name

_MERGED: Final = "float32"  # the dtype of tensors that were


@dataclass(frozen=True, slots=True)
class MergedLoras:
    """LoRA files that were read for a checkpoint.

    Attributes:
        files: Each with its weight.
    """

    files: tuple[tuple[LoraFile, float], ...]

    @property
    def provenance(self) -> list[dict[str, Any]]:
        """As a bundle's manifest names them: name, weight and SHA-256 of each."""
        return [
            {"name": short_name(file.path.name), "weight": weight, "sha256": file.sha256}
            for file, weight in self.files
        ]

    @property
    def lines(self) -> list[str]:
        """What is merged, a line for each."""
        return [
            f"LoRA {file.path}, weight {weight:g} ({file.format}, {len(file.changes)} tensors"
            + (f", {len(file.left_out)} keys left out" if file.left_out else "")
            + (f", {len(file.embeddings)} embeddings left out" if file.embeddings else "")
            + ")"
            for file, weight in self.files
        ]

    def edits(self) -> dict[str, Edit]:
        """Folder of each network that changes → what merges them into its tensors."""
        changes = changes_by_tensor(self.files)
        return {folder: _edit_of(folder, changes) for folder in {key.folder for key in changes}}


def read_loras(assembly: Assembly, given: Mapping[str, float], *, partial: bool) -> MergedLoras:
    """Read LoRAs for a checkpoint that is put together; none of its weights is read yet.

    Args:
        assembly: The checkpoint.
        given: File → weight.
        partial: Leave out what has no place in the checkpoint.

    Raises:
        UsageError: A file cannot be used (see `sdrt.runtime.lora.file.read_lora`), or a weight is none.
    """
    weights = WeightMap(
        {
            folder: {
                name: CheckpointTensor(_MERGED, shape) for name, shape in assembly.tensors(folder).items()
            }
            for folder in NETWORKS
            if folder in assembly.parts
        }
    )
    family = assembly.family.record
    return MergedLoras(
        tuple(
            (read_lora(file, weights, family, partial=partial), checked_weights(Path(file).name, weight).unet)
            for file, weight in given.items()
        )
    )


def _edit_of(folder: str, changes: Mapping[TensorKey, Changes]) -> Edit:
    def edit(name: str, tensor: torch.Tensor) -> torch.Tensor:
        its = changes.get(TensorKey(folder, name))
        if its is None:
            return tensor
        merged = merged_tensor(tensor.float().numpy(), its)
        if not np.isfinite(merged).all():
            raise UsageError(f"with this LoRA {name} of the {folder} overflows: give it a smaller weight")
        return torch.from_numpy(merged)

    return edit
