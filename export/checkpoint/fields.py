"""Every field of a VAE's and a U-Net's configuration: who reads it, so that none is left out in silence.

The tables have a row for each parameter of diffusers' classes; a test compares them. ``network`` fields are
built into the network that is traced, so the exported graph has them. The others are read here or by
`sdrt.export.checkpoint.checkpoint`, or change no picture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from sdrt.export.checkpoint.families import CHECKPOINT_FAMILIES
from sdrt.runtime.errors import CheckpointError

# network: built by diffusers' class and traced. latents: between the sampler's latents and the VAE's, see
# `latent_scaling`. size: says a size that we read. arithmetic: about precision, which the export chooses.
# tiling: of large pictures in parts, which diffusers' pipelines do only where a program asks for it.
# absent: refused unless it has the class's default, since no component gives the U-Net what it takes.
Role = Literal["network", "latents", "size", "arithmetic", "tiling", "absent"]

VAE_FIELDS: Final[Mapping[str, Role]] = {
    "in_channels": "size",
    "out_channels": "size",
    "down_block_types": "network",
    "up_block_types": "network",
    "block_out_channels": "size",
    "layers_per_block": "network",
    "act_fn": "network",
    "latent_channels": "size",
    "norm_num_groups": "network",
    "sample_size": "tiling",
    "scaling_factor": "latents",
    "shift_factor": "latents",
    "latents_mean": "latents",
    "latents_std": "latents",
    "force_upcast": "arithmetic",
    "use_quant_conv": "network",
    "use_post_quant_conv": "network",
    "mid_block_add_attention": "network",
}
UNET_FIELDS: Final[Mapping[str, Role]] = {
    "sample_size": "size",
    "in_channels": "size",
    "out_channels": "size",
    "center_input_sample": "network",
    "flip_sin_to_cos": "network",
    "freq_shift": "network",
    "down_block_types": "network",
    "mid_block_type": "network",
    "up_block_types": "network",
    "only_cross_attention": "network",
    "block_out_channels": "size",
    "layers_per_block": "network",
    "downsample_padding": "network",
    "mid_block_scale_factor": "network",
    "dropout": "network",
    "act_fn": "network",
    "norm_num_groups": "network",
    "norm_eps": "network",
    "cross_attention_dim": "size",
    "transformer_layers_per_block": "network",
    "reverse_transformer_layers_per_block": "network",
    "encoder_hid_dim": "network",
    "encoder_hid_dim_type": "absent",
    "attention_head_dim": "network",
    "num_attention_heads": "network",
    "dual_cross_attention": "network",
    "use_linear_projection": "network",
    "class_embed_type": "absent",
    "addition_embed_type": "size",
    "addition_time_embed_dim": "size",
    "num_class_embeds": "absent",
    "upcast_attention": "network",
    "resnet_time_scale_shift": "network",
    "resnet_skip_time_act": "network",
    "resnet_out_scale_factor": "network",
    "time_embedding_type": "network",
    "time_embedding_dim": "network",
    "time_embedding_act_fn": "network",
    "timestep_post_act": "network",
    "time_cond_proj_dim": "size",
    "conv_in_kernel": "network",
    "conv_out_kernel": "network",
    "projection_class_embeddings_input_dim": "size",
    "attention_type": "network",
    "class_embeddings_concat": "network",
    "mid_block_only_cross_attention": "network",
    "cross_attention_norm": "network",
    "addition_embed_type_num_heads": "network",
}
FIELDS: Final = {"vae": VAE_FIELDS, "unet": UNET_FIELDS}
SCALING_FACTOR: Final = 0.18215  # AutoencoderKL's own, where the file has none
RGB: Final = 3
OLD_SAMPLE_SIZE: Final = 64


@dataclass(frozen=True, slots=True)
class LatentScaling:
    """Between a VAE's latents z and a sampler's x, as diffusers' pipelines of the family compute it.

    ``z = x / factor``, or with both others, one number for each channel, ``z = x · std / factor + mean``.
    """

    factor: float
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def latent_scaling(family: str, config: Mapping[str, Any]) -> LatentScaling:
    """Read a VAE's ``config.json``, which `check_vae` has checked.

    Only SDXL's pipelines read ``latents_mean`` and ``latents_std``, and only if both are there; none of
    Stable Diffusion's reads ``shift_factor``.
    """
    factor = float(CHECKPOINT_FAMILIES[family].vae_factor or config.get("scaling_factor", SCALING_FACTOR))
    mean, std = config.get("latents_mean"), config.get("latents_std")
    read = "latents_mean" in CHECKPOINT_FAMILIES[family].vae_fields
    if not read or mean is None or std is None:
        return LatentScaling(factor)
    return LatentScaling(factor, tuple(map(float, mean)), tuple(map(float, std)))


def check_vae(file: Path, config: Mapping[str, Any]) -> None:
    """What lies between pictures, the VAE's latents and the sampler's must be numbers that make sense.

    Raises:
        CheckpointError: It is not, or the VAE is for pictures of other channels than red, green and blue.
    """
    for key in ("in_channels", "out_channels"):
        if config.get(key, RGB) != RGB:
            raise CheckpointError(
                f"{file}: {key} is {config[key]!r}; supported are VAEs of {RGB}, red, green and blue "
                "(LDM3D's have 6: a picture and its depth)"
            )
    factor, shift = config.get("scaling_factor", SCALING_FACTOR), config.get("shift_factor")
    if not _is_finite(factor) or factor <= 0:
        raise CheckpointError(f"{file}: scaling_factor is {factor!r}; it must be a number above 0")
    if shift is not None and not _is_finite(shift):
        raise CheckpointError(f"{file}: shift_factor is {shift!r}; it must be a finite number or null")
    channels = config["latent_channels"]
    for key, least in (("latents_mean", -math.inf), ("latents_std", 0.0)):
        values = config.get(key)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != channels or not all(map(_is_finite, values)):
            raise CheckpointError(f"{file}: {key} is {values!r}; it must be {channels} finite numbers")
        if min(values) <= least:
            raise CheckpointError(f"{file}: {key} is {values!r}; each must be above {least:g}")


def with_default_size(family: str, pipeline: str, unet: Mapping[str, Any]) -> dict[str, Any]:
    """The U-Net's configuration with the size that diffusers' pipeline draws by default.

    Those of Stable Diffusion take a whole ``sample_size`` below 64 that was written before diffusers 0.9.0
    for a mistake, and 64 in its place; those of latent consistency models and of SDXL do not.
    """
    size, written = unet["sample_size"], re.match(r"(\d+)\.(\d+)", str(unet.get("_diffusers_version")))
    old = written is not None and (int(written[1]), int(written[2])) < (0, 9)
    mistaken = old and size < OLD_SAMPLE_SIZE and not pipeline.startswith("Latent")
    if CHECKPOINT_FAMILIES[family].trusts_size or not mistaken:
        return dict(unet)
    return {**unet, "sample_size": OLD_SAMPLE_SIZE}


def unread_fields(family: str, configs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """One line for each field that says something and that diffusers' pipelines leave out, as we do."""
    for name, fields in FIELDS.items():
        unknown = [key for key in configs[name] if key not in fields and not key.startswith("_")]
        if unknown:
            yield f"{name}/config.json has {', '.join(sorted(unknown))}, unknown to diffusers too: left out"
    vae = configs["vae"]
    if vae.get("shift_factor"):
        yield (
            f"vae/config.json: shift_factor is {vae['shift_factor']}, which no pipeline of Stable Diffusion "
            "reads: left out, as there"
        )
    factor, said = latent_scaling(family, vae).factor, vae.get("scaling_factor", SCALING_FACTOR)
    if factor != said:
        yield (
            f"vae/config.json: scaling_factor is {said}, and {factor} in diffusers' pipeline: drawn with that"
        )
    mean, std = vae.get("latents_mean"), vae.get("latents_std")
    if (mean or std) and latent_scaling(family, vae).mean is None:
        yield (
            "vae/config.json: latents_mean and latents_std are read by SDXL's pipelines only, and only both "
            "together: left out, as diffusers does here"
        )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
