"""A checkpoint in the diffusers folder format: found, and checked before any weights are loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sdrt.export.checkpoint_files import check_weights, described_files, find_checkpoint, read_json, reading
from sdrt.export.tokenizer_json import ClipTokenizer, open_tokenizer
from sdrt.runtime.errors import CheckpointError, UsageError
from sdrt.runtime.schedule import NoiseSchedule

SUBFOLDERS: Final = ("text_encoder", "unet", "vae")
# What an export reads of each config.json.
CONFIG_KEYS: Final = {
    "text_encoder": ("hidden_size", "max_position_embeddings", "vocab_size"),
    "unet": ("block_out_channels", "cross_attention_dim", "in_channels", "out_channels", "sample_size"),
    "vae": ("block_out_channels", "latent_channels"),
}
# The default sampler of a bundle, by the scheduler that the checkpoint came with. Others (PNDM, UniPC, …)
# get the best of ours. A scheduler's use_karras_sigmas is not kept: a manifest has no default for it.
DEFAULT_SAMPLERS: Final = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}
DEFAULT_SAMPLER: Final = "dpmpp_2m"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked diffusers folder.

    Attributes:
        path: The folder.
        source: What the user named: the folder, or the hub id.
        configs: ``config.json`` of each of text_encoder, unet, vae.
        schedule: The scheduler's configuration as a noise schedule.
        sampler: Our sampler that is nearest to the scheduler's.
        tokenizer: Its vocabulary, length and special ids.
    """

    path: Path
    source: str
    configs: dict[str, dict[str, Any]]
    schedule: NoiseSchedule
    sampler: str
    tokenizer: ClipTokenizer

    @property
    def factor(self) -> int:
        """Image pixels per latent along one side."""
        return int(2 ** (len(self.configs["vae"]["block_out_channels"]) - 1))

    @property
    def native_size(self) -> int:
        """The side in pixels that the model was trained at."""
        return int(self.configs["unet"]["sample_size"]) * self.factor

    @property
    def size_multiple(self) -> int:
        """Sizes in pixels that every level of the U-Net halves without a remainder."""
        return int(self.factor * 2 ** (len(self.configs["unet"]["block_out_channels"]) - 1))

    def sizes(self) -> dict[str, int]:
        """The checkpoint's entries for the axes that `sdrt.runtime.components` leaves open."""
        text, unet, vae = (self.configs[name] for name in SUBFOLDERS)
        return {
            "tokens": self.tokenizer.ids["max_length"],
            "text_width": int(text["hidden_size"]),
            "cross_width": int(unet["cross_attention_dim"]),
            "unet_channels": int(unet["in_channels"]),
            "latent_channels": int(vae["latent_channels"]),
        }


def open_checkpoint(model: str, *, revision: str | None = None) -> Checkpoint:
    """Find and check a checkpoint without loading weights.

    Args:
        model: A folder in the diffusers format, or a hub id ``owner/name``.
        revision: Branch, tag or commit on the hub.

    Raises:
        CheckpointError: Nothing there, the hub cannot be reached, a component or file is missing, only
            pickles are there, or the model is of a kind that is not supported.
    """
    with reading(model):
        checkpoint = _read_checkpoint(find_checkpoint(model, revision), model)
    _check_fit(checkpoint)
    return checkpoint


def _read_checkpoint(path: Path, model: str) -> Checkpoint:
    index = read_json(path / "model_index.json")
    _check_kind(path, index)
    configs = {name: read_json(path / name / "config.json") for name in SUBFOLDERS}
    for name in SUBFOLDERS:
        _check_config(path / name / "config.json", configs[name], CONFIG_KEYS[name])
        check_weights(path / name)
    _check_scaling(path / "vae" / "config.json", configs["vae"])
    if not (path / "tokenizer").is_dir():
        raise CheckpointError(f"{path} has no folder tokenizer/: the checkpoint is incomplete")
    tokenizer = open_tokenizer(path / "tokenizer", configs["text_encoder"]["max_position_embeddings"])
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    try:
        schedule = schedule_from_config(scheduler)
    except UsageError as error:
        raise CheckpointError(f"{path}/scheduler: {error}") from error
    sampler = DEFAULT_SAMPLERS.get(str(scheduler.get("_class_name")), DEFAULT_SAMPLER)
    return Checkpoint(path, model, configs, schedule, sampler, tokenizer)


def _check_kind(path: Path, index: dict[str, Any]) -> None:
    if "text_encoder_2" in index or (path / "text_encoder_2").is_dir():
        raise CheckpointError(
            f"{path} has two text encoders (SDXL); this version exports Stable Diffusion 1.x and 2.x"
        )
    if "transformer" in index:
        raise CheckpointError(f"{path} has a transformer in place of a U-Net: not supported")
    for name in SUBFOLDERS:
        if not (path / name).is_dir():
            raise CheckpointError(
                f"{path} has no folder {name}/; a checkpoint has "
                "text_encoder, tokenizer, unet, vae and scheduler"
            )


def _check_config(file: Path, config: Mapping[str, Any], keys: Sequence[str]) -> None:
    """What the export reads must be there and whole numbers; the loaders check the rest."""
    for key in keys:
        value = config.get(key)
        numbers = value if isinstance(value, list) and key == "block_out_channels" else [value]
        if not numbers or not all(type(number) is int and number > 0 for number in numbers):
            given = f"{key} is {value!r}" if key in config else f"{key} is missing"
            raise CheckpointError(
                f"{file}: {given}; it must be a whole number (or a list of them for blocks)"
            )


def _check_scaling(file: Path, config: Mapping[str, Any]) -> None:
    """The two numbers between the VAE's latents and the sampler's; a VAE need not name them."""
    factor, shift = config.get("scaling_factor", 1.0), config.get("shift_factor")
    if not _is_finite(factor) or factor <= 0:
        raise CheckpointError(f"{file}: scaling_factor is {factor!r}; it must be a number above 0")
    if shift is not None and not _is_finite(shift):
        raise CheckpointError(f"{file}: shift_factor is {shift!r}; it must be a finite number or null")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_fit(checkpoint: Checkpoint) -> None:
    """The parts must agree about the sizes that they hand to each other."""
    sizes = checkpoint.sizes()
    largest, entries = max(checkpoint.tokenizer.vocabulary.ids.values()), checkpoint.configs["text_encoder"]
    if largest >= entries["vocab_size"]:
        raise CheckpointError(
            f"the tokenizer has ids up to {largest}, the text encoder embeds {entries['vocab_size']}: "
            "tokenizer and text_encoder are not of one model"
        )
    if sizes["text_width"] != sizes["cross_width"]:
        raise CheckpointError(
            f"the text encoder gives {sizes['text_width']} features, the U-Net's cross-attention "
            f"takes {sizes['cross_width']}: text_encoder and unet are not of one model"
        )
    out_channels = int(checkpoint.configs["unet"]["out_channels"])
    if not out_channels == sizes["latent_channels"] == sizes["unet_channels"]:
        raise CheckpointError(
            f"the U-Net takes {sizes['unet_channels']} and gives {out_channels} channels, the VAE has "
            f"{sizes['latent_channels']}: only plain text-to-image checkpoints are supported"
        )


def schedule_from_config(config: Mapping[str, Any]) -> NoiseSchedule:
    """A diffusers scheduler's configuration as a noise schedule.

    It is read as diffusers' StableDiffusionPipeline with a DDIMScheduler reads it, whatever class wrote it:
    what is missing has DDIMScheduler's default.

    Raises:
        UsageError: A value is not supported or out of range, or the configuration asks for something that
            would change the picture and is not implemented.
    """
    for option in ("rescale_betas_zero_snr", "thresholding"):
        if config.get(option):
            raise UsageError(f"{option} is set: not supported")
    names = {field.name for field in dataclasses.fields(NoiseSchedule)}
    defaults = {
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "set_alpha_to_one": True,
    }
    given = {key: value for key, value in config.items() if key in names and value is not None}
    if isinstance(given.get("trained_betas"), list):
        given["trained_betas"] = tuple(given["trained_betas"])
    # StableDiffusionPipeline sets the offset to 1 whatever the file says.
    return NoiseSchedule(**{**defaults, **given, "steps_offset": 1})


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over the names and contents of the files that an export reads, in hex."""
    digest = hashlib.sha256()
    for folder in (*SUBFOLDERS, "tokenizer", "scheduler"):
        for file in described_files(checkpoint.path / folder):
            digest.update(f"{folder}/{file.name}\0".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
