"""Where a safetensors file holds which network, and the tensors' names that diffusers has for them.

LDM's names are those of the original code of Stable Diffusion and of SDXL, which nearly all single files
have. They are turned into diffusers' by diffusers' own functions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any, Final

from sdrt.runtime.errors import CheckpointError

UNET: Final = "model.diffusion_model."
EMA: Final = "model_ema."
TOLD: Final = f"{UNET}time_embed.cond_proj.weight"  # of the guidance scale
# Folder of a network → what its tensors' names begin with in a file that holds several.
PREFIXES: Final[Mapping[str, tuple[str, ...]]] = {
    "unet": (UNET,),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
_TEXT_MARK: Final = re.compile(
    r"(model\.)?token_embedding\.weight|(.*\.)?embeddings\.token_embedding\.weight"
)
# Folder → a tensor that it has under some form of its names, without the prefix.
_MARKS: Final = {
    "unet": re.compile(r"input_blocks\.0\.0\.weight|conv_in\.weight"),
    "vae": re.compile(r"decoder\.conv_in\.weight"),
    "text_encoder": _TEXT_MARK,
    "text_encoder_2": _TEXT_MARK,
}
# Folder → how names begin that are diffusers' already.
_DIFFUSERS: Final = {"unet": "down_blocks.", "vae": "encoder.down_blocks."}
# What lies beside a network's tensors and is none of them: what training needed, positions, masks.
_BESIDE: Final = re.compile(r"loss\..*|model_ema\..*|(.*\.)?(position_ids|logit_scale|attn_mask)")
_OPEN_CLIP: Final = "transformer.resblocks."
_LAYER: Final = re.compile(r"transformer\.resblocks\.(\d+)\..*")


def names_in(
    names: Collection[str], folder: str, folders: Collection[str] = (), *, alone: bool = False
) -> dict[str, str]:
    """The tensors of one network in a file.

    Args:
        names: Of all its tensors.
        folder: Of the network in diffusers' format.
        folders: Of all networks of its family. SDXL's refiner has its only text encoder in the place of the
            base's first one.
        alone: Whether the file may be the network's own, whose names have no prefix.

    Returns:
        Name without the prefix → name; empty where the network is not there.
    """
    only = folder == "text_encoder_2" and bool(folders) and "text_encoder" not in folders
    for prefix in (*PREFIXES.get("text_encoder" if only else folder, ()), *([""] if alone else [])):
        inner = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
        if folder in _MARKS and any(_MARKS[folder].fullmatch(name) for name in inner):
            return {short: name for short, name in inner.items() if not _BESIDE.fullmatch(short)}
    return {}


def renamed(
    folder: str, tensors: Mapping[str, Any], config: Mapping[str, Any], place: object
) -> dict[str, Any]:
    """One network's tensors under the names that diffusers and transformers have for them.

    Args:
        folder: Of the network in diffusers' format.
        tensors: Under names of `names_in`; may be on the device ``meta``.
        config: ``config.json`` of the network.
        place: The file, for messages.

    Raises:
        CheckpointError: A tensor of the U-Net or the VAE has no place in such a network.
    """
    if folder.startswith("text_encoder"):
        return _text_encoder(folder, tensors, config)
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    if any(name.startswith(_DIFFUSERS.get(folder, ())) for name in tensors):
        return dict(tensors)
    try:
        if folder == "vae":
            result: dict[str, Any] = convert_ldm_vae_checkpoint(dict(tensors), config)
        else:
            result = convert_ldm_unet_checkpoint({UNET + name: it for name, it in tensors.items()}, config)
            told = TOLD.removeprefix(UNET)
            if told in tensors:  # which diffusers' function does not know
                result["time_embedding.cond_proj.weight"] = tensors[told]
    except KeyError as error:
        raise CheckpointError(f"{place}: the tensor {error.args[0]} is missing") from error
    _refuse_lost(place, tensors, result)
    return result


def _refuse_lost(place: object, given: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """diffusers' functions leave out what they do not know; the network would be another one without it."""
    used = {_place(tensor) for tensor in result.values()}
    lost = sorted(name for name, tensor in given.items() if _place(tensor) not in used)
    if lost:
        raise CheckpointError(
            f"{place}: the tensor {lost[0]} has no place in the network that its configuration describes "
            f"({len(lost)} such in all)"
        )


def _place(tensor: Any) -> tuple[int, int]:
    """Where a tensor's numbers lie, which it shares with its views; also on the device ``meta``."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def _text_encoder(folder: str, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    if any(_OPEN_CLIP in name for name in tensors):
        from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

        inner = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        # Stable Diffusion 2 reads the state before the last layer: diffusers' text encoder has one less.
        last = str(config.get("num_hidden_layers")) if folder == "text_encoder" else ""
        kept = {
            name: tensor
            for name, tensor in inner.items()
            if not ((layer := _LAYER.fullmatch(name)) and layer[1] == last)
        }
        width = SimpleNamespace(config=SimpleNamespace(hidden_size=config.get("hidden_size")))
        result: dict[str, Any] = convert_open_clip_checkpoint(width, kept, prefix="")
    else:
        result = {_with_text_model(name.removeprefix("transformer.")): it for name, it in tensors.items()}
    if folder == "text_encoder":
        result.pop("text_projection.weight", None)  # a CLIPTextModel has none
    return result


def _with_text_model(name: str) -> str:
    """Old files lack ``text_model.``, and transformers 4 then draws random weights in silence."""
    inner = name.startswith(("embeddings.", "encoder.", "final_layer_norm."))
    return f"text_model.{name}" if inner else name
