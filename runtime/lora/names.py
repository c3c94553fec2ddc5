"""Names of layers: what each kind of file calls a layer of the checkpoint, found in the weight map.

Files write a network's name before the layer's, and the layer's as diffusers has it, or as the first
implementation had it (latent-diffusion, "LDM"), with points or with underscores. The names are not taken
apart: each layer of the model at hand is spelled in every way, and looked up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from sdrt.runtime.bundle.weight_map import WeightMap

UNET, TEXT_ENCODER, TEXT_ENCODER_2 = "unet", "text_encoder", "text_encoder_2"
NETWORKS: Final = (UNET, TEXT_ENCODER, TEXT_ENCODER_2)
# What stands before a layer's name, longest first → the networks that may be meant.
_PREFIXES: Final[Mapping[str, tuple[str, ...]]] = {
    "base_model.model.": NETWORKS,
    "model.diffusion_model.": (UNET,),
    "diffusion_model.": (UNET,),
    "lora_te2_": (TEXT_ENCODER_2,),
    "lora_te1_": (TEXT_ENCODER,),
    "lora_te_": (TEXT_ENCODER,),
    "lora_unet_": (UNET,),
    "lycoris_": NETWORKS,
    "text_encoder_2.": (TEXT_ENCODER_2,),
    "text_encoder.": (TEXT_ENCODER,),
    "unet.": (UNET,),
    "": NETWORKS,
}
# transformers 5 saves text encoders without it, and files for LoRA may have it or not.
_TEXT_MODEL: Final = re.compile(r"^text_model[._]")
_PROCESSOR: Final = re.compile(r"\.processor\.to_")  # diffusers before 0.21
_OLD_TEXT: Final = re.compile(r"(?<=\.self_attn)\.to_(q|k|v|out)$")  # diffusers 0.17


class TensorKey(NamedTuple):
    """A tensor as the weight map has it.

    Attributes:
        folder: The network's, such as ``unet``.
        tensor: Its name there, such as ``conv_in.weight``.
    """

    folder: str
    tensor: str


class Layer(NamedTuple):
    """A layer of a network: what ``.weight`` and ``.bias`` come after."""

    folder: str
    path: str

    def tensor(self, name: str) -> TensorKey:
        """Its tensor of that name."""
        return TensorKey(self.folder, f"{self.path}.{name}")


class Layers:
    """The layers of a model under all of their names."""

    def __init__(self, weights: WeightMap) -> None:
        """Spell them.

        Args:
            weights: The model's weight map.
        """
        self._by_name: dict[str, dict[str, Layer]] = {}
        for folder in NETWORKS:
            names = self._by_name[folder] = {}
            paths = dict.fromkeys(name.rpartition(".")[0] for name in weights.tensors.get(folder, {}))
            depth = _resnets_per_block(paths)
            for path in paths:
                known = _TEXT_MODEL.sub("", path)
                spellings = [known] if folder != UNET else [known, *_ldm_names(known, depth)]
                for name in spellings:
                    names.setdefault(name, Layer(folder, path))
                    names.setdefault(name.replace(".", "_"), Layer(folder, path))

    def find(self, name: str) -> Layer | None:
        """The layer that a file means.

        Args:
            name: With the network's before it, as the file has it.
        """
        for prefix, folders in _PREFIXES.items():
            if name.startswith(prefix):
                rest = _TEXT_MODEL.sub("", _modern(name.removeprefix(prefix)))
                for folder in folders:
                    if found := self._by_name[folder].get(rest):
                        return found
                if prefix != "base_model.model.":  # PEFT wraps whatever it is given, a pipeline's parts too
                    return None
                name = name.removeprefix(prefix)
        return None


def _modern(name: str) -> str:
    """A layer's name as diffusers has it by now."""
    name = _PROCESSOR.sub(".to_", name)
    name = _OLD_TEXT.sub(r".\1_proj", name)
    return f"{name}.0" if name.endswith(".to_out") else name


def _resnets_per_block(paths: Mapping[str, None]) -> int:
    """How many residual blocks each block of a U-Net's way down has; 0 if it is no such U-Net."""
    return len({path.split(".")[3] for path in paths if path.startswith("down_blocks.0.resnets.")})


_LDM: Final = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_LDM_RESNET: Final = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK: Final = re.compile(
    r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)"
)
_MIDDLE: Final = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)")


def _ldm_names(path: str, depth: int) -> list[str]:
    """What LDM calls a layer of a U-Net: one name, or two where it depends on what else the block has.

    Args:
        path: As diffusers has it.
        depth: Residual blocks of each block on the way down.
    """
    if path in _LDM:
        return [_LDM[path]]
    if match := _MIDDLE.fullmatch(path):
        kind, index, rest = match[1], int(match[2]), match[3]
        place = 1 if kind == "attentions" else 2 * index
        return [f"middle_block.{place}.{_inside(kind, rest)}"]
    match = _BLOCK.fullmatch(path)
    if match is None or not depth:
        return []
    way, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return [f"input_blocks.{(block + 1) * (depth + 1)}.0.op"]
    if kind == "upsamplers":
        last = block * (depth + 1) + depth
        return [f"output_blocks.{last}.{place}.conv" for place in (1, 2)]  # behind an attention or not
    place = 0 if kind == "resnets" else 1
    first = block * (depth + 1) + index
    number = first + 1 if way == "down" else first
    return [f"{'input' if way == 'down' else 'output'}_blocks.{number}.{place}.{_inside(kind, rest)}"]


def _inside(kind: str, rest: str) -> str:
    return _LDM_RESNET.get(rest, rest) if kind == "resnets" else rest
