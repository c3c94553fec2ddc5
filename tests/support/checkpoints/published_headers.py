"""Single files of published models at their full size, as far as their headers: no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.checkpoints.ldm_names import REFINER, SD1, SD2, SDXL, ldm_tensors
from support.checkpoints.published import CONFIGS

if TYPE_CHECKING:
    import torch

DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "U8": 1}
Shapes = dict[str, tuple[int, ...]]
LAYER_24 = "cond_stage_model.model.transformer.resblocks.23.ln_1.weight"  # which SD 2 does not read
# SDXL's refiner, as published; all else of it is the base's.
REFINER_UNET = json.dumps(
    {
        "block_out_channels": [384, 768, 1536, 1536],
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
        "attention_head_dim": [6, 12, 24, 24],
        "transformer_layers_per_block": 4,
        "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 2560,
    }
)


def write_header(
    file: Path,
    tensors: Mapping[str, tuple[int, ...]],
    dtype: str = "F16",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A safetensors file of zeros, which take no room on the disk; gives ``file``."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in tensors.items():
        size = DTYPES[dtype]
        for axis in shape:
            size *= axis
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return file


@cache
def network_shapes(name: str, folder: str, changes: str = "{}") -> Shapes:
    """Name → shape of a published model's network, in diffusers' or transformers' names.

    Args:
        name: A key of `CONFIGS`.
        folder: Of the network.
        changes: Fields of its configuration that are others, as JSON.
    """
    import torch

    from sdrt.export.checkpoint.random_weights import network_from_config

    config = {**CONFIGS[name][f"{folder}/config.json"], **json.loads(changes)}
    with torch.device("meta"):
        module = network_from_config(_class_of(folder), config)
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def ldm_shapes(name: str, folder: str, changes: str = "{}", *, open_clip: bool = False) -> Shapes:
    """The same in LDM's names, without the prefix of the network."""
    config = {**CONFIGS[name][f"{folder}/config.json"], **json.loads(changes)}
    tensors = {key: _meta(shape) for key, shape in network_shapes(name, folder, changes).items()}
    turned = ldm_tensors(folder, tensors, config, open_clip=open_clip)
    return {key: tuple(tensor.shape) for key, tensor in turned}


def shapes_of(published: str, unet: str = "{}") -> Shapes:
    """A published model's tensors in LDM's names."""
    open_clip: tuple[str, ...]
    if unet == REFINER_UNET:
        prefixes, open_clip = REFINER, ("text_encoder_2",)
    elif "text_encoder_2/config.json" in CONFIGS[published]:
        prefixes, open_clip = SDXL, ("text_encoder_2",)
    elif published.startswith("sd-2"):
        prefixes, open_clip = SD2, ("text_encoder",)
    else:
        prefixes, open_clip = SD1, ()
    result = {
        f"{prefix}{name}": shape
        for folder, prefix in prefixes.items()
        for name, shape in ldm_shapes(
            published, folder, unet if folder == "unet" else "{}", open_clip=folder in open_clip
        ).items()
    }
    return result | ({LAYER_24: (1024,)} if prefixes is SD2 else {})


def _meta(shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.empty(shape, device="meta")


def _class_of(folder: str) -> Any:
    import diffusers
    import transformers

    return {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }[folder]
