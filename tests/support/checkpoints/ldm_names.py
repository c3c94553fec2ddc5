"""A diffusers folder's weights as a single file: LDM's names, spelled here and not asked of any library."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdrt.runtime.system.untrusted import read_json

if TYPE_CHECKING:
    import torch

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def unet_name(name: str, layers: int, upsampled: Mapping[int, int]) -> str:
    """One name of a U-Net.

    Args:
        name: diffusers'.
        layers: ``layers_per_block``.
        upsampled: Level on the way up → the place of its upsampler: 2 behind an attention, else 1.
    """
    module, _, end = name.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{end}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        place = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{place}.{_in_resnet(match[1], match[3])}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name)
    assert match, name
    way, level, kind, index, inner = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{end}"
    if kind == "upsamplers":
        return f"output_blocks.{level * (layers + 1) + layers}.{upsampled[level]}.conv.{end}"
    block = level * (layers + 1) + index + (1 if way == "down" else 0)
    half, part = "input" if way == "down" else "output", 0 if kind == "resnets" else 1
    return f"{half}_blocks.{block}.{part}.{_in_resnet(kind, inner)}"


def _in_resnet(kind: str, inner: str) -> str:
    module, _, end = inner.rpartition(".")
    return f"{_RESNET[module]}.{end}" if kind == "resnets" else inner


def vae_tensor(name: str, tensor: Any, levels: int) -> tuple[str, Any]:
    """Name and tensor of a VAE: the attention's matrices are 1 x 1 convolutions there."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if match := re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.*)\.(weight|bias)", name):
        turned = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        return f"{match[1]}mid.attn_1.{_VAE_ATTENTION[match[2]]}.{match[3]}", turned
    if match := re.fullmatch(r"(.*)mid_block\.resnets\.(\d)\.(.*)", name):
        return f"{match[1]}mid.block_{int(match[2]) + 1}.{match[3]}", tensor
    if match := re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d)\.(.*)", name):
        level = int(match[3]) if match[2] == "down" else levels - 1 - int(match[3])
        inner = re.sub(r"^resnets\.", "block.", match[4])
        inner = re.sub(r"^(down|up)samplers\.0\.", rf"{match[2]}sample.", inner)
        return f"{match[1]}.{match[2]}.{level}.{inner}", tensor
    return name, tensor


def open_clip_tensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """A text encoder of transformers in open_clip's names: queries, keys and values are one matrix."""
    import torch

    inner = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    for name, tensor in inner.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name)
        if name in _CLIP_ENDS:
            yield _CLIP_ENDS[name], tensor
        elif name == "text_projection.weight":
            yield "text_projection", tensor.T.contiguous()
        elif match and match[2] in _CLIP_LAYER:
            yield f"transformer.resblocks.{match[1]}.{_CLIP_LAYER[match[2]]}.{match[3]}", tensor
        elif match and match[2] == "self_attn.q_proj":
            three = [inner[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            yield f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}", torch.cat(three)
    yield "logit_scale", torch.tensor(4.6)


def ldm_tensors(
    folder: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], *, open_clip: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one network in LDM's names, without the prefix of the network.

    Args:
        folder: Of the network in diffusers' format.
        tensors: In the names of diffusers or transformers; may be on the device ``meta``.
        config: Its ``config.json``.
        open_clip: Whether a text encoder gets the names of open_clip, not those of transformers.
    """
    if folder == "unet":
        # The last level has no upsampler; one with attentions has it behind them.
        kinds = dict(enumerate(config["up_block_types"]))
        upsampled = {level: 2 if kind.startswith("Cross") else 1 for level, kind in kinds.items()}
        for name, tensor in tensors.items():
            yield unet_name(name, config["layers_per_block"], upsampled), tensor
    elif folder == "vae":
        for name, tensor in tensors.items():
            yield vae_tensor(name, tensor, len(config["block_out_channels"]))
    elif open_clip:
        yield from open_clip_tensors(tensors)
    else:
        for name, tensor in tensors.items():
            yield name if name.startswith("text_") else f"text_model.{name}", tensor


def single_file_tensors(
    checkpoint: Path, prefixes: Mapping[str, str], open_clip: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint as a single file has them.

    Args:
        checkpoint: A diffusers folder, with one file of weights for each network.
        prefixes: Folder of a network → what its tensors' names begin with.
        open_clip: The text encoders that have open_clip's names.
    """
    from safetensors.torch import load_file

    result: dict[str, torch.Tensor] = {}
    for folder, prefix in prefixes.items():
        (file,) = (checkpoint / folder).glob("*.safetensors")
        config = read_json(checkpoint / folder / "config.json")
        given = ldm_tensors(folder, load_file(file), config, open_clip=folder in open_clip)
        result |= {f"{prefix}{name}": tensor.contiguous() for name, tensor in given}
    return result


SD1 = {"unet": UNET, "vae": VAE, "text_encoder": CLIP}
SD2 = {"unet": UNET, "vae": VAE, "text_encoder": OPEN_CLIP}
REFINER = {"unet": UNET, "vae": VAE, "text_encoder_2": "conditioner.embedders.0.model."}
SDXL = {"unet": UNET, "vae": VAE, "text_encoder": XL_CLIP, "text_encoder_2": XL_OPEN_CLIP}


def write_single_file(
    file: Path,
    checkpoint: Path,
    prefixes: Mapping[str, str] = SD1,
    open_clip: tuple[str, ...] = (),
    more: Mapping[str, torch.Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint as a single file, with more tensors and metadata; gives ``file``."""
    from safetensors.torch import save_file

    tensors = {**single_file_tensors(checkpoint, prefixes, open_clip), **(more or {})}
    save_file(tensors, file, metadata=dict(metadata or {}))
    return file
