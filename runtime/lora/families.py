"""For which models a LoRA was made, told by what its tensors read, and by what its header says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from sdrt.runtime.bundle.weight_map import WeightMap
from sdrt.runtime.lora.content import Content
from sdrt.runtime.lora.names import TEXT_ENCODER_2, UNET

_SD1, _SD2, _SDXL = "Stable Diffusion 1.x", "Stable Diffusion 2.x", "SDXL"
# Numbers of a text embedding that cross-attention reads → whose it is.
_BY_WIDTH: Final = {768: _SD1, 1024: _SD2, 1280: "SDXL's refiner", 2048: _SDXL}
_CROSS: Final = re.compile(r".*attn2[._](?:processor[._])?to_[kv](?:_lora)?\.(.*)")
# Networks that are no U-Net of Stable Diffusion → how their layers are called.
_OTHERS: Final = {
    "Flux": re.compile(r"(?:double_blocks|single_blocks|single_transformer_blocks)[._]"),
    "Stable Diffusion 3": re.compile(r"joint_blocks[._]|^transformer\.transformer_blocks\."),
    "Stable Cascade": re.compile(r"^(?:lora_prior_|prior\.)"),
}
_SAID: Final = ("modelspec.architecture", "ss_base_model_version")
_WORDS: Final = {
    "refiner": "SDXL's refiner",
    "xl": _SDXL,
    "flux": "Flux",
    "stable-diffusion-v3": "Stable Diffusion 3",
    "sd3": "Stable Diffusion 3",
    "v2": _SD2,
    "v1": _SD1,
}


def refuse_other_family(content: Content, weights: WeightMap) -> str:
    """Why a file cannot be for a model; empty where nothing speaks against it.

    Args:
        content: The LoRA.
        weights: The model's weight map.

    Returns:
        The end of a message: for which models the file is, and what this one is.
    """
    mine, theirs = _width(weights), _read_width(content)
    if theirs and mine and theirs != mine:
        return f"is for {_title(theirs)}, this model is {_title(mine, 'one')}"
    if TEXT_ENCODER_2 not in weights.tensors and any(
        key.startswith(("lora_te2_", "text_encoder_2.")) for key in content.tensors
    ):
        return f"is for {_SDXL}, with two text encoders; this model has one"
    for title, pattern in _OTHERS.items():
        if any(pattern.search(key) for key in content.tensors):
            return f"is for {title}, this model is {_title(mine, 'one')}"
    return ""


def said_family(content: Content) -> str:
    """What a file's header calls the models that it is for; empty where it does not."""
    said = " ".join(str(content.metadata.get(key, "")) for key in _SAID).lower()
    return next((title for word, title in _WORDS.items() if word in said), "")


def _title(width: int, what: str = "a model") -> str:
    return _BY_WIDTH.get(width, f"{what} whose text embeddings have {width} numbers")


def _width(weights: WeightMap) -> int:
    tensors: Mapping[str, object] = weights.tensors.get(UNET, {})
    for name in tensors:
        if name.endswith("attn2.to_k.weight"):
            return weights.tensors[UNET][name].shape[1]
    return 0


def _read_width(content: Content) -> int:
    """Numbers of the text embedding that a file's cross-attention reads; 0 if it has none."""
    for key, tensor in content.tensors.items():
        match = _CROSS.fullmatch(key)
        if match and tensor.ndim > 1 and _is_reading(match[1]):
            return int(tensor.shape[1])
    return 0


def _is_reading(part: str) -> bool:
    """Whether a part's second axis is what the layer reads."""
    return part in ("diff", "hada_w1_b") or "down" in part or part.startswith("lora_A")
