"""What is no pipeline in the diffusers format: each is named, with what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints.checkpoint_damage import WEIGHTS, early_message

from sdrt.export.checkpoint.reader import open_checkpoint


def tensors(*names: str) -> Callable[[Path], None]:
    def make(file: Path) -> None:
        save_file({name: torch.zeros(1) for name in names}, file)

    return make


def holding(files: Mapping[str, Any]) -> Callable[[Path], None]:
    """A folder with these files: JSON, or bytes."""

    def make(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            (folder / name).write_bytes(data)

    return make


NO_PIPELINES: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...]]] = {
    "LoRA": (
        "a.safetensors",
        tensors("unet.x.lora_A.weight"),
        ("a LoRA alone", "sd-run --lora FILE", "sd-export MODEL OUT --lora FILE"),
    ),
    "old LoRA": ("b.safetensors", tensors("lora_unet_x.lora_down.weight"), ("a LoRA alone",)),
    "first LoRA": ("u.safetensors", tensors("unet:0:up"), ("a LoRA alone",)),
    "LoRA of attention": ("v.safetensors", tensors("x.processor.to_q_lora.down.weight"), ("a LoRA alone",)),
    "textual inversion": ("w.safetensors", tensors("emb_params"), ("sd-run --embedding FILE",)),
    "ControlNet": (
        "c.safetensors",
        tensors("controlnet_cond_embedding.conv_in.weight"),
        ("a ControlNet alone",),
    ),
    "U-Net": (
        "d.safetensors",
        tensors("down_blocks.0.x", "conv_in.bias"),
        ("a U-Net alone", "--unet FILE"),
    ),
    "VAE": ("e.safetensors", tensors("decoder.conv_in.weight"), ("a VAE alone", "--vae FILE")),
    "text encoder": (
        "t.safetensors",
        tensors("text_model.embeddings.token_embedding.weight"),
        ("a text encoder alone", "--text-encoder FILE"),
    ),
    "single file": (
        "f.safetensors",
        tensors("model.diffusion_model.x"),
        ("a single file", "to sd-export"),
    ),
    "GGUF": (
        "g.gguf",
        lambda file: holding({file.name: b"GGUF\x03"})(file.parent),
        ("a GGUF file", "quantised"),
    ),
    "ONNX": ("h.onnx", lambda file: holding({file.name: b"\x08"})(file.parent), ("an ONNX graph",)),
    "LFS": (
        "i.safetensors",
        lambda file: holding({file.name: b"version https://git-lfs.github.com/spec/v1\n"})(file.parent),
        ("a Git LFS pointer", "git lfs pull"),
    ),
    "pipe": ("j.safetensors", os.mkfifo, ("is a pipe: a regular file is wanted",)),
    "U-Net folder": (
        "k",
        holding({"config.json": {"_class_name": "UNet2DConditionModel"}}),
        ("a U-Net alone", "--unet FILE"),
    ),
    "ControlNet folder": (
        "l",
        holding({"config.json": {"_class_name": "ControlNetModel"}}),
        ("a ControlNet alone (ControlNetModel)", "only steers"),
    ),
    "LoRA folder": ("m", holding({"pytorch_lora_weights.safetensors": b""}), ("a LoRA alone",)),
    "part": (
        "n/unet",
        lambda folder: holding({"../model_index.json": {}, "x": b""})(folder),
        ("give ", "/n"),
    ),
    "around": ("o", holding({"inner/model_index.json": {}}), ("a folder around checkpoints", "o/inner")),
    "bundle": ("p", holding({"manifest.json": {}}), ("a bundle, exported already",)),
    "ONNX folder": ("q", holding({"unet/model.onnx": b""}), ("an ONNX export",)),
    "file in a folder": ("r", holding({"x.gguf": b"GGUF"}), ("holds x.gguf, a GGUF file",)),
    "cache of none": (
        "models--a--b",
        holding({"snapshots/x/y": b"", "snapshots/z/y": b""}),
        ("hub's cache", "/x"),
    ),
    "empty": ("s", holding({"x": b""}), ("model_index.json is missing", "no checkpoint")),
}


@pytest.mark.parametrize("what", NO_PIPELINES)
def test_what_is_no_pipeline_is_named_with_what_to_do(tmp_path: Path, what: str) -> None:
    name, make, words = NO_PIPELINES[what]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if not path.suffix:
        path.mkdir(parents=True)
    make(path)
    message = early_message(path)
    for word in words:
        assert word in message


def test_the_snapshot_in_a_folder_of_the_hubs_cache_is_found(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--name"
    for commit in ("0123", "4567"):
        (folder / "snapshots").mkdir(parents=True, exist_ok=True)
        (folder / "snapshots" / commit).symlink_to(tiny_checkpoint)
    holding({"refs/main": b"4567"})(folder)
    assert open_checkpoint(str(folder)).path == folder / "snapshots" / "4567"


NAME = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({f"unet/{NAME}-00001-of-00002.safetensors": b""}, ("shards", f"no {NAME}.safetensors.index.json")),
        ({"unet/diffusion_flax_model.msgpack": b""}, ("Flax", "PyTorch's format")),
        ({"unet/model.onnx": b""}, ("ONNX",)),
    ],
)
def test_weights_in_other_formats_are_named(
    checkpoint_copy: Path, files: Mapping[str, bytes], words: tuple[str, ...]
) -> None:
    (checkpoint_copy / WEIGHTS["unet"]).unlink()
    holding(files)(checkpoint_copy)
    message = early_message(checkpoint_copy)
    for word in words:
        assert word in message
