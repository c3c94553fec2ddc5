"""Ways to damage a checkpoint, and the message with which it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.checkpoint.weights import load_module
from sdrt.runtime.errors import CheckpointError

Break = Callable[[Path], None]
Tensors = dict[str, torch.Tensor]

WEIGHTS = {
    "text_encoder": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "image_encoder": "image_encoder/model.safetensors",
}


def open_and_load(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    for name in checkpoint.configs:
        load_module(checkpoint, name)


def message_of(folder: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_and_load(Path(folder))
    message = str(caught.value)
    assert "\n" not in message
    return message


def early_message(folder: Path) -> str:
    """Of what is said before torch is imported."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    return message


def remove(path: str) -> Break:
    def apply(folder: Path) -> None:
        target = folder / path
        if target.is_file():
            target.unlink()
        else:
            for file in target.iterdir():
                file.unlink()
            target.rmdir()

    return apply


def write(path: str, data: bytes) -> Break:
    def apply(folder: Path) -> None:
        (folder / path).write_bytes(data)

    return apply


def cut(path: str, share: float) -> Break:
    def apply(folder: Path) -> None:
        data = (folder / path).read_bytes()
        (folder / path).write_bytes(data[: int(len(data) * share)])

    return apply


def configure(path: str, **changes: Any) -> Break:
    """Set keys of a JSON file; None removes one. A scheduler's class is set in the index, too."""

    def apply(folder: Path) -> None:
        if path == SCHEDULER and (name := changes.get("_class_name")):
            configure("model_index.json", scheduler=["diffusers", name])(folder)
        document = json.loads((folder / path).read_text()) | changes
        kept = {key: value for key, value in document.items() if value is not None}
        (folder / path).write_text(json.dumps(kept))

    return apply


def null(path: str, key: str) -> Break:
    def apply(folder: Path) -> None:
        document = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps(document | {key: None}))

    return apply


def change_tensors(component: str, change: Callable[[Tensors], None]) -> Break:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS[component])
        change(tensors)
        save_file(tensors, folder / WEIGHTS[component], metadata={"format": "pt"})

    return apply


def shorten_a_matrix(tensors: Tensors) -> None:
    name = next(name for name in sorted(tensors) if tensors[name].ndim == 2)
    tensors[name] = tensors[name][:-1].contiguous()


def drop_one(tensors: Tensors) -> None:
    del tensors[sorted(tensors)[3]]


def add_one(tensors: Tensors) -> None:
    tensors["text_model.encoder.layers.7.extra.weight"] = torch.zeros(2)


def spoil(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[sorted(tensors)[3]].view(-1)[0] = value

    return change


UNET_CONFIG, TEXT_CONFIG, VAE_CONFIG = (f"{name}/config.json" for name in ("unet", "text_encoder", "vae"))
SCHEDULER = "scheduler/scheduler_config.json"
