"""LoRA files in the forms that are about, spelled here key by key, and diffusers' own merge of them.

Factors are small multiples of 1/64, so that their product is exact in float32 in whatever order it is added
up: what diffusers merges in float32 then must be equal bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from sdrt.runtime.bundle.weight_map import CheckpointTensor, WeightMap
from sdrt.runtime.lora.file import LoraFile
from sdrt.runtime.lora.merge import changes_by_tensor, merged_tensor

Array = NDArray[Any]
NETWORKS = ("unet", "text_encoder", "text_encoder_2")
ALPHA = 1.5
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


class Factors(NamedTuple):
    """One layer's pair."""

    down: Array
    up: Array
    alpha: float


Pairs = Mapping[str, Mapping[str, Factors]]  # network → layer as the checkpoint has it → its pair


def checkpoint_map(folder: Path) -> WeightMap:
    """The weight map of a checkpoint that no bundle holds: names and shapes alone."""
    return WeightMap(
        {
            name: {
                key: CheckpointTensor("float16", shape) for key, shape in tensor_shapes(folder / name).items()
            }
            for name in NETWORKS
            if (folder / name).is_dir()
        }
    )


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(next(folder.glob("*.safetensors")), framework="numpy") as tensors:
        return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118


def layers(weights: WeightMap, network: str, *, convolutions: bool = False) -> list[str]:
    """The layers that LoRAs are usually for: attention and feed forward; with convolutions those as well."""
    ends = ("to_q", "to_k", "to_v", "to_out.0", "proj", "net.2", "proj_in", "proj_out", "fc1", "fc2")
    more = ("conv1", "conv2", "conv", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out")
    names = [name.removesuffix(".weight") for name in weights.tensors[network] if name.endswith(".weight")]
    return [
        name
        for name in names
        if name.endswith((*ends, "_proj", *(more if convolutions else ()))) and "projection" not in name
    ]


def exact(rng: np.random.Generator, *shape: int) -> Array:
    """Multiples of 1/64 of at most 1/8."""
    return rng.integers(-8, 9, shape).astype(np.float32) / 64


def pairs(
    weights: WeightMap, wanted: Mapping[str, Iterable[str]], seed: int = 0
) -> dict[str, dict[str, Factors]]:
    """A pair for each layer; ranks are 1 to 5.

    Alpha is one for all: diffusers 0.42 forgets alphas that differ by layer in text encoders of transformers
    5 and in attention.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, dict[str, Factors]] = {}
    for network, names in wanted.items():
        for name in names:
            shape = weights.tensors[network][f"{name}.weight"].shape
            rank = int(rng.integers(1, 6))
            ones = (1,) * (len(shape) - 2)
            down, up = exact(rng, rank, *shape[1:]), exact(rng, shape[0], rank, *ones)
            found.setdefault(network, {})[name] = Factors(down, up, ALPHA)
    return found


def as_kohya(pairs: Pairs, spelled: Mapping[str, str] | None = None) -> dict[str, Array]:
    """kohya's sd-scripts; ``spelled`` has another name for layers of the U-Net."""
    tensors = {}
    two = "text_encoder_2" in pairs
    for network, names in pairs.items():
        prefix = "lora_te1" if two and network == "text_encoder" else KOHYA[network]
        for name, factors in names.items():
            known = name if network == "unet" else f"text_model.{name.removeprefix('text_model.')}"
            known = (spelled or {}).get(known, known) if network == "unet" else known
            layer = f"{prefix}_{known.replace('.', '_')}"
            tensors[f"{layer}.lora_down.weight"] = factors.down
            tensors[f"{layer}.lora_up.weight"] = factors.up
            tensors[f"{layer}.alpha"] = np.array(factors.alpha, np.float32)
    return tensors


def as_diffusers(pairs: Pairs, down: str = "lora_A.weight", up: str = "lora_B.weight") -> dict[str, Array]:
    """diffusers, which says no alpha: it is the rank."""
    tensors = {}
    for network, names in pairs.items():
        for name, factors in names.items():
            tensors[f"{network}.{name}.{down}"] = factors.down
            tensors[f"{network}.{name}.{up}"] = factors.up
    return tensors


def as_attention_processors(pairs: Pairs) -> dict[str, Array]:
    """diffusers before 0.21: of attention alone, in its processors."""
    tensors = {}
    for name, factors in pairs["unet"].items():
        block, _, layer = name.removesuffix(".0").rpartition(".")
        tensors[f"unet.{block}.processor.{layer}_lora.down.weight"] = factors.down
        tensors[f"unet.{block}.processor.{layer}_lora.up.weight"] = factors.up
    return tensors


def ldm_layers(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Layer of a U-Net → what latent-diffusion calls it, found by counting its blocks from the start."""
    blocks, depth = len(config["block_out_channels"]), config["layers_per_block"]
    places: dict[str, str] = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    places |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    places |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    number = 0
    for block in range(blocks):
        for layer in range(depth):
            number += 1
            places[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{number}.0"
            places[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{number}.1"
        if block < blocks - 1:
            number += 1
            places[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
    for part, place in (("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)):
        places[f"mid_block.{part}"] = f"middle_block.{place}"
    number = 0
    for block, kind in enumerate(config["up_block_types"]):
        for layer in range(depth + 1):
            places[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{number}.0"
            places[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        last = 2 if "CrossAttn" in kind else 1
        places[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{last}.conv"
    inside = {
        **{".norm1": ".in_layers.0", ".conv1": ".in_layers.2", ".time_emb_proj": ".emb_layers.1"},
        **{".norm2": ".out_layers.0", ".conv2": ".out_layers.3", ".conv_shortcut": ".skip_connection"},
    }
    found = {}
    for name in names:
        start = next(place for place in places if name == place or name.startswith(f"{place}."))
        rest = name.removeprefix(start)
        found[name] = places[start] + (inside.get(rest, rest) if ".resnets." in f".{start}." else rest)
    return found


def write(file: Path, tensors: Mapping[str, Array], **metadata: Any) -> Path:
    """A safetensors file; metadata that is no text is written as JSON."""
    said = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    save_file({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, file, said or None)
    return file


def fused_by_diffusers(folder: Path, loras: Iterable[tuple[Path, float]]) -> dict[str, dict[str, Array]]:
    """The checkpoint's tensors in float32 with files merged by diffusers and PEFT, one after the other."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    for index, (file, weight) in enumerate(loras):
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=f"a{index}")
        pipeline.fuse_lora(adapter_names=[f"a{index}"], lora_scale=weight, components=_networks(pipeline))
        pipeline.unload_lora_weights()
    return {
        name: {key: tensor.numpy() for key, tensor in getattr(pipeline, name).state_dict().items()}
        for name in _networks(pipeline)
    }


def _networks(pipeline: Any) -> list[str]:
    return [name for name in NETWORKS if getattr(pipeline, name, None) is not None]


def merged(folder: Path, loras: Iterable[tuple[LoraFile, float]]) -> Iterator[tuple[str, str, Array]]:
    """Network, name and numbers of each tensor that files change, merged into a checkpoint's tensors."""
    for key, changes in changes_by_tensor(list(loras)).items():
        with safe_open(next((folder / key.folder).glob("*.safetensors")), framework="numpy") as tensors:
            base = tensors.get_tensor(key.tensor).astype(np.float32)
        yield key.folder, key.tensor, merged_tensor(base, changes)


def torch_product(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """``up @ down`` in float32 as PyTorch has it; where it adds up otherwise, what it has elsewhere."""
    return up @ down if adds_in_order() else _in_order(up, down)


@cache
def adds_in_order() -> bool:
    """Whether PyTorch adds up a product term after term, by fused multiply-adds: with MKL it was seen to."""
    generator = torch.Generator().manual_seed(0)
    for rows, rank, columns in ((64, 4, 576), (128, 4, 64), (320, 16, 320)):
        up, down = (torch.randn(shape, generator=generator) for shape in ((rows, rank), (rank, columns)))
        if not torch.equal(up @ down, _in_order(up, down)):
            return False
    return True


def _in_order(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """In extended precision, which holds each term, rounded after each."""
    total = np.zeros((len(up), down.shape[1]), np.float32)
    left, right = up.numpy().astype(np.longdouble), down.numpy().astype(np.longdouble)
    for index in range(len(right)):
        total = (total + np.multiply.outer(left[:, index], right[index])).astype(np.float32)
    return torch.from_numpy(total)
