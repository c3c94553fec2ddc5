"""Every form of a LoRA file is merged as diffusers and PEFT merge it, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from support.references.lora_files import (
    adds_in_order,
    as_attention_processors,
    as_diffusers,
    as_kohya,
    checkpoint_map,
    fused_by_diffusers,
    layers,
    ldm_layers,
    merged,
    pairs,
    write,
)

from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.errors import UsageError
from sdrt.runtime.lora.file import read_lora

WEIGHT = 0.8
EMOJI = Path(__file__).parents[3] / "models" / "emoji"


def compare(folder: Path, family: str, files: Mapping[Path, str]) -> None:
    """Each file alone, and its form; and how many tensors it changed."""
    weights, untouched = checkpoint_map(folder), fused_by_diffusers(folder, [])
    for file, form in files.items():
        lora = read_lora(file, weights, FAMILIES[family])
        assert lora.format == form
        assert not lora.left_out
        wanted = fused_by_diffusers(folder, [(file, WEIGHT)])
        changed = 0
        for network, name, numbers in merged(folder, [(lora, WEIGHT)]):
            np.testing.assert_array_equal(numbers, wanted[network][name], err_msg=f"{file.name} {name}")
            changed += 1
        # And nothing else changes in diffusers.
        different = [
            (network, name)
            for network, tensors in wanted.items()
            for name, tensor in tensors.items()
            if not np.array_equal(tensor, untouched[network][name])
        ]
        assert len(different) == changed == len(lora.changes)


def test_forms_of_stable_diffusion(tiny_checkpoint: Path, tmp_path: Path) -> None:
    weights = checkpoint_map(tiny_checkpoint)
    wanted = {
        "unet": layers(weights, "unet", convolutions=True),
        "text_encoder": layers(weights, "text_encoder"),
    }
    everything = pairs(weights, wanted)
    attention = {"unet": {n: p for n, p in everything["unet"].items() if ".attn" in n}}
    compare(
        tiny_checkpoint,
        "sd",
        {
            write(tmp_path / "kohya.safetensors", as_kohya(everything)): "kohya",
            write(tmp_path / "peft.safetensors", as_diffusers(everything)): "diffusers",
            write(
                tmp_path / "old.safetensors",
                as_diffusers(attention, "lora.down.weight", "lora.up.weight"),
            ): "diffusers",
            write(tmp_path / "processors.safetensors", as_attention_processors(attention)): "diffusers",
        },
    )


def test_forms_of_sdxl(sdxl_checkpoint: Path, tmp_path: Path) -> None:
    weights = checkpoint_map(sdxl_checkpoint)
    wanted = {
        "unet": layers(weights, "unet"),
        "text_encoder": layers(weights, "text_encoder"),
        "text_encoder_2": layers(weights, "text_encoder_2"),
    }
    everything = pairs(weights, wanted)
    config = json.loads((sdxl_checkpoint / "unet" / "config.json").read_text())
    blocks = ldm_layers(config, wanted["unet"])
    compare(
        sdxl_checkpoint,
        "sdxl",
        {
            write(tmp_path / "blocks.safetensors", as_kohya(everything, blocks)): "kohya",
            write(tmp_path / "peft.safetensors", as_diffusers(everything)): "diffusers",
        },
    )


@pytest.mark.skipif(
    not adds_in_order(),
    reason="this PyTorch adds up the products of trained factors in an order of its own",
)
def test_trained_files() -> None:
    """Those of the embedded model, whose factors have all digits: attention alone, and a LoCon."""
    files = {"delft": "diffusers", "wizard": "kohya"}
    compare(EMOJI, "sd", {EMOJI / "lora" / f"{name}.safetensors": form for name, form in files.items()})


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_words_inside(tiny_checkpoint: Path, sdxl_checkpoint: Path, tmp_path: Path, family: str) -> None:
    """kohya's and OneTrainer's form; of another width they are keys without a place."""
    folder = {"sd": tiny_checkpoint, "sdxl": sdxl_checkpoint}[family]
    weights = checkpoint_map(folder)
    tensors = as_kohya(pairs(weights, {"unet": layers(weights, "unet")[:1]}))
    widths = {"string_to_param.*": 16} if family == "sd" else {"clip_g": 24, "clip_l": 16}
    vectors = {part: np.full((2, width), 0.5, np.float32) for part, width in widths.items()}
    bundled = {f"bundle_emb.my.cat.{part}": array for part, array in vectors.items()}
    lora = read_lora(write(tmp_path / "x.safetensors", tensors | bundled), weights, FAMILIES[family])
    (found,) = lora.embeddings.items()
    assert found[0] == "my.cat"
    assert [array.shape for array in found[1]] == ([(2, 16)] if family == "sd" else [(2, 16), (2, 24)])
    other = {key: array[:, :-1] for key, array in bundled.items()}
    file = write(tmp_path / "x.safetensors", tensors | other)
    with pytest.raises(UsageError, match=rf"'bundle_emb.* has no place in this model \({len(other)} such"):
        read_lora(file, weights, FAMILIES[family])
    assert not read_lora(file, weights, FAMILIES[family], partial=True).embeddings
