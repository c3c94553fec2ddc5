"""LoRA files of random numbers for a bundle: kohya's names, over the attentions of U-Net and text encoder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.weight_map import read_weight_map

RANK: Final = 2
_ATTENTION: Final = re.compile(r".*(attn\d\.to_(q|k|v|out\.0)|self_attn\.(q|k|v|out)_proj)\.weight")
_PREFIXES: Final = {"unet": "lora_unet", "text_encoder": "lora_te"}


def write_kohya_lora(
    path: Path,
    bundle: Path,
    seed: int,
    *,
    folders: tuple[str, ...] = ("unet", "text_encoder"),
    size: float = 0.3,
) -> Path:
    """Write a file whose changes are ``size`` large beside weights of unit variance; gives the path back."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, NDArray[np.float32]] = {}
    tensors = read_weight_map(Bundle.open(bundle, verify=False)).tensors
    for folder in folders:
        for name, tensor in tensors[folder].items():
            if not _ATTENTION.fullmatch(name):
                continue
            layer = f"{_PREFIXES[folder]}_{name.removesuffix('.weight').replace('.', '_')}"
            outputs, inputs = tensor.shape[:2]
            deviation = np.sqrt(size / np.sqrt(inputs * RANK))
            arrays[f"{layer}.lora_down.weight"] = rng.normal(0, deviation, (RANK, inputs)).astype(np.float32)
            arrays[f"{layer}.lora_up.weight"] = rng.normal(0, deviation, (outputs, RANK)).astype(np.float32)
            arrays[f"{layer}.alpha"] = np.array(RANK, np.float32)
    assert arrays
    save_file(arrays, path)
    return path
