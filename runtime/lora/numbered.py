"""The first public form of a LoRA (github.com/cloneofsimo/lora): pairs, numbered in the order of the modules.

The order is the one in which PyTorch walked the networks of late 2022: in a transformer block the feed
forward before the second attention, and of a U-Net the way down, the way up, then the middle. Only layers
within modules of the classes that the header names are counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from sdrt.runtime.bundle.weight_map import WeightMap
from sdrt.runtime.lora.names import TEXT_ENCODER, UNET, Layer

_KEY: Final = re.compile(r"(unet|text_encoder):(\d{1,5}):(up|down)")
_WAYS: Final = ("down_blocks", "up_blocks", "mid_block")
# Class of a module → the layers in it that are counted, in their order.
_ATTENTION: Final = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT: Final = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj")
_RESNET: Final = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")
_ATTENTIONS: Final = frozenset({"CrossAttention", "Attention"})  # the class was renamed
_KNOWN: Final = {
    UNET: _ATTENTIONS | {"GEGLU", "ResnetBlock2D"},
    TEXT_ENCODER: frozenset({"CLIPAttention"}),
}


def is_numbered(keys: Sequence[str]) -> bool:
    """Whether a file is of this form."""
    return any(_KEY.fullmatch(key) for key in keys)


def numbered_layers(
    keys: Sequence[str], metadata: Mapping[str, str], weights: WeightMap
) -> tuple[dict[Layer, dict[str, str]], list[str]]:
    """The layers of a file, each with its parts, and the keys that are of none.

    Args:
        keys: Of the file.
        metadata: Of its header.
        weights: The model's weight map.

    Returns:
        Layer → part (``up``, ``down``) → key; and what is left.

    Raises:
        ValueError: The header does not say which modules were counted, or names classes that are not known.
    """
    found: dict[Layer, dict[str, str]] = {}
    left = []
    orders: dict[str, list[Layer]] = {}
    for key in keys:
        match = _KEY.fullmatch(key)
        if match is None:
            left.append(key)
            continue
        network, number, part = match[1], int(match[2]), match[3]
        if network not in orders:
            orders[network] = _order(network, _classes(network, metadata), weights)
        if number < len(orders[network]):
            found.setdefault(orders[network][number], {})[part] = key
        else:
            left.append(key)
    return found, left


def _classes(network: str, metadata: Mapping[str, str]) -> frozenset[str]:
    """The classes of modules that were counted."""
    try:
        named = json.loads(metadata[network])
        classes = frozenset(map(str, named)) if isinstance(named, list) else frozenset()
    except (KeyError, TypeError, ValueError, RecursionError):
        classes = frozenset()
    if not classes or not classes <= _KNOWN[network]:
        given = ", ".join(sorted(classes - _KNOWN[network]))[:100] or "none"
        raise ValueError(
            f"its header says that the pairs of the {network} are numbered by modules of the classes "
            f"{given}; the order is known for {', '.join(sorted(_KNOWN[network]))}"
        )
    return classes


def _order(network: str, classes: frozenset[str], weights: WeightMap) -> list[Layer]:
    """The layers of a network in the order of their numbers."""
    paths = {name.rpartition(".")[0] for name in weights.tensors.get(network, {})}
    blocks: Callable[[set[str], frozenset[str]], Iterator[str]]
    blocks = _unet_layers if network == UNET else _text_layers
    return [Layer(network, path) for path in blocks(paths, classes)]


def _unet_layers(paths: set[str], classes: frozenset[str]) -> Iterator[str]:
    inner = [
        *(f"attn1.{layer}" for layer in _ATTENTION if classes & _ATTENTIONS),
        *(["ff.net.0.proj"] if "GEGLU" in classes else []),
        *(f"attn2.{layer}" for layer in _ATTENTION if classes & _ATTENTIONS),
    ]
    parts = {".attn1.to_q": inner, ".conv1": _RESNET if "ResnetBlock2D" in classes else ()}
    found = {path.removesuffix(mark): mark for path in paths for mark in parts if path.endswith(mark)}
    for block in sorted(found, key=_place):
        layers = (f"{block}.{part}" for part in parts[found[block]])
        yield from (layer for layer in layers if layer in paths)


def _text_layers(paths: set[str], _: frozenset[str]) -> Iterator[str]:
    mark = ".self_attn.k_proj"
    layers = [path.removesuffix(mark) for path in paths if path.endswith(mark)]
    layers.sort(key=lambda layer: int(layer.rpartition(".")[2]))
    yield from (f"{layer}.{part}" for layer in layers for part in _TEXT)


def _place(block: str) -> tuple[int, int, bool, list[int]]:
    """Where a block of a U-Net stands; of those side by side residual blocks come last."""
    way, _, rest = block.partition(".")
    numbers = [int(number) for number in re.findall(r"\d+", rest)]
    outer = 0 if way == _WAYS[-1] else numbers.pop(0)
    return _WAYS.index(way), outer, ".resnets." in block, numbers
