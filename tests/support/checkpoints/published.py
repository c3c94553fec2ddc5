"""Checkpoints with the configurations of published models, their widths shrunk, and random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from support.checkpoints.tiny_variants import write_json

MERGES: Final = 200
VOCABULARY: Final = 512 + MERGES + 2
CONFIGS: Final[Mapping[str, Mapping[str, dict[str, Any]]]] = json.loads(
    Path(__file__).with_name("published_configs.json").read_text(encoding="utf-8")
)
WIDTHS: Final = {320: 32, 640: 32, 1280: 64, 128: 32, 256: 32, 512: 64}
HEADS: Final = {5: 2, 10: 2, 20: 4}
TEXT_WIDTH, SECOND_WIDTH, PROJECTION, TIME_WIDTH = 32, 48, 16, 8


def write_published_checkpoint(folder: Path, name: str) -> None:
    """A checkpoint whose files say what those of a published model say, but for widths and depths.

    Args:
        folder: To be made.
        name: A key of ``published_configs.json``.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    from sdrt.export.checkpoint.tokenizer_json import write_tokenizer_folder

    torch.manual_seed(0)
    files = CONFIGS[name]
    loaders: dict[str, tuple[Any, Callable[..., dict[str, Any]]]] = {
        "unet": (UNet2DConditionModel, _small_unet),
        "vae": (AutoencoderKL, _small_vae),
        "text_encoder": (CLIPTextModel, _small_text),
        "text_encoder_2": (CLIPTextModelWithProjection, _small_text),
        "image_encoder": (CLIPVisionModelWithProjection, _small_vision),
    }
    for file, content in files.items():
        part = Path(file).parent.name
        if part.startswith("tokenizer") and file.endswith("tokenizer_config.json"):
            write_tokenizer_folder(folder / part, MERGES)
        (folder / part).mkdir(parents=True, exist_ok=True)
        document = content
        if part in loaders:
            kind, shrink = loaders[part]
            document = shrink(content, part, is_sdxl="text_encoder_2/config.json" in files)
            built = (
                kind(kind.config_class.from_dict(document))
                if hasattr(kind, "config_class")
                else kind.from_config(document)
            )
            built.half().save_pretrained(folder / part, safe_serialization=True)
        write_json(folder / file, json.loads(_of_small_vocabulary(document)))


def _of_small_vocabulary(document: Mapping[str, Any]) -> str:
    """The ids of CLIP's two special tokens are those of the small vocabulary."""
    text = json.dumps(document)
    return text.replace('"49406"', f'"{VOCABULARY - 2}"').replace('"49407"', f'"{VOCABULARY - 1}"')


def _small_unet(config: dict[str, Any], _part: str, *, is_sdxl: bool) -> dict[str, Any]:
    heads = config["attention_head_dim"]
    small = {
        **config,
        "block_out_channels": [WIDTHS[width] for width in config["block_out_channels"]],
        "attention_head_dim": [HEADS[number] for number in heads] if isinstance(heads, list) else heads,
        "layers_per_block": 1,
        "cross_attention_dim": TEXT_WIDTH + (SECOND_WIDTH if is_sdxl else 0),
    }
    if is_sdxl:
        small |= {
            "transformer_layers_per_block": [1, 1, 2],
            "addition_time_embed_dim": TIME_WIDTH,
            "projection_class_embeddings_input_dim": PROJECTION + 6 * TIME_WIDTH,
        }
    return small


def _small_vae(config: dict[str, Any], _part: str, *, is_sdxl: bool) -> dict[str, Any]:
    widths = [WIDTHS[width] for width in config["block_out_channels"]]
    return {**config, "block_out_channels": widths, "layers_per_block": 1}


def _small_text(config: dict[str, Any], part: str, *, is_sdxl: bool) -> dict[str, Any]:
    width = SECOND_WIDTH if part.endswith("_2") else TEXT_WIDTH
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": PROJECTION}
    return {**config, **sizes, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": VOCABULARY}


def _small_vision(config: dict[str, Any], _part: str, *, is_sdxl: bool) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": TEXT_WIDTH, "patch_size": 56}
    return {**config, **sizes, "num_attention_heads": 2, "num_hidden_layers": 2}
