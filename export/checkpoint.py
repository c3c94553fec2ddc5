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
from sdrt.export.random_weights import SCHEME
from sdrt.export.tokenizer_json import ClipTokenizer, open_tokenizer, vocabulary_from_clip
from sdrt.runtime.errors import CheckpointError, UsageError
from sdrt.runtime.schedule import NoiseSchedule

SUBFOLDERS: Final = ("text_encoder", "unet", "vae")  # of Stable Diffusion 1.x and 2.x
SDXL_SUBFOLDERS: Final = ("text_encoder", "text_encoder_2", "unet", "vae")
TOKENIZERS: Final = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
# What an export reads of each config.json.
CONFIG_KEYS: Final = {
    "text_encoder": ("hidden_size", "max_position_embeddings", "num_hidden_layers", "vocab_size"),
    "text_encoder_2": (
        *("hidden_size", "max_position_embeddings", "num_hidden_layers", "projection_dim", "vocab_size"),
    ),
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
    """A checked diffusers folder, or the configurations of one and a seed in place of its weights.

    Attributes:
        path: The folder.
        source: What the user named: the folder, the hub id, or the architecture.
        family: ``sd`` or ``sdxl``.
        configs: ``config.json`` of each network: text_encoder, (text_encoder_2,) unet, vae.
        schedule: The scheduler's configuration as a noise schedule.
        sampler: Our sampler that is nearest to the scheduler's.
        tokenizers: One for each text encoder: vocabulary, length and special ids.
        force_zeros_for_empty_prompt: See `sdrt.runtime.manifest.Manifest`.
        random_seed: Of random weights; None where the folder holds weights.
    """

    path: Path
    source: str
    family: str
    configs: dict[str, dict[str, Any]]
    schedule: NoiseSchedule
    sampler: str
    tokenizers: tuple[ClipTokenizer, ...]
    force_zeros_for_empty_prompt: bool = False
    random_seed: int | None = None

    @property
    def tokenizer(self) -> ClipTokenizer:
        """Of the (first) text encoder."""
        return self.tokenizers[0]

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

    def text_layers(self, name: str) -> int:
        """The layers of one text encoder."""
        return int(self.configs[name]["num_hidden_layers"])

    @property
    def max_clip_skip(self) -> int:
        """The layers that can be left out, so that each text encoder still has a penultimate state."""
        return min((self.text_layers(name) for name in self.configs if name in TOKENIZERS), default=1) - 1

    def sizes(self) -> dict[str, int]:
        """The checkpoint's entries for the axes that `sdrt.runtime.components` leaves open."""
        text, unet, vae = (self.configs[name] for name in SUBFOLDERS)
        sizes = {
            "tokens": self.tokenizer.ids["max_length"],
            "text_width": int(text["hidden_size"]),
            "skips": 1,
            "cross_width": int(unet["cross_attention_dim"]),
            "unet_channels": int(unet["in_channels"]),
            "latent_channels": int(vae["latent_channels"]),
        }
        if second := self.configs.get("text_encoder_2"):
            sizes["text_width_2"] = int(second["hidden_size"])
            sizes["projection_width"] = int(second["projection_dim"])
        return sizes


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
        checkpoint = read_checkpoint(find_checkpoint(model, revision), model)
    check_fit(checkpoint)
    return checkpoint


def read_checkpoint(path: Path, source: str, random_seed: int | None = None) -> Checkpoint:
    """Read and check everything but the weights.

    Args:
        path: A folder in the diffusers format.
        source: What the user named.
        random_seed: With it the folder needs neither weights nor a vocabulary: CLIP's is taken.

    Raises:
        CheckpointError: As for `open_checkpoint`.
    """
    index = read_json(path / "model_index.json")
    family = _family(path, index)
    subfolders = SDXL_SUBFOLDERS if family == "sdxl" else SUBFOLDERS
    _check_folders(path, subfolders)
    configs = {name: read_json(path / name / "config.json") for name in subfolders}
    for name in subfolders:
        _check_config(path / name / "config.json", configs[name], CONFIG_KEYS[name])
        if random_seed is None:
            check_weights(path / name)
    _check_scaling(path / "vae" / "config.json", configs["vae"])
    tokenizers = tuple(
        _read_tokenizer(path / TOKENIZERS[name], configs[name], ships_with_weights=random_seed is None)
        for name in subfolders
        if name in TOKENIZERS
    )
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    try:
        schedule = schedule_from_config(scheduler, family)
    except UsageError as error:
        raise CheckpointError(f"{path}/scheduler: {error}") from error
    return Checkpoint(
        path=path,
        source=source,
        family=family,
        configs=configs,
        schedule=schedule,
        sampler=DEFAULT_SAMPLERS.get(str(scheduler.get("_class_name")), DEFAULT_SAMPLER),
        tokenizers=tokenizers,
        # StableDiffusionXLPipeline's default is true; the pipelines of the other family have no such thing.
        force_zeros_for_empty_prompt=family == "sdxl"
        and index.get("force_zeros_for_empty_prompt", True) is not False,
        random_seed=random_seed,
    )


def _read_tokenizer(folder: Path, config: Mapping[str, Any], *, ships_with_weights: bool) -> ClipTokenizer:
    if not folder.is_dir():
        raise CheckpointError(f"{folder.parent} has no folder {folder.name}/: the checkpoint is incomplete")
    positions = config["max_position_embeddings"]
    return open_tokenizer(folder, positions, None if ships_with_weights else vocabulary_from_clip())


def _family(path: Path, index: dict[str, Any]) -> str:
    if "transformer" in index:
        raise CheckpointError(f"{path} has a transformer in place of a U-Net: not supported")
    named = "StableDiffusionXL" in str(index.get("_class_name"))
    second = "text_encoder_2" in index or (path / "text_encoder_2").is_dir()
    return "sdxl" if named or second else "sd"


def _check_folders(path: Path, subfolders: Sequence[str]) -> None:
    tokenizers = [TOKENIZERS[name] for name in subfolders if name in TOKENIZERS]
    for name in subfolders:
        if not (path / name).is_dir():
            raise CheckpointError(
                f"{path} has no folder {name}/; a checkpoint has "
                f"{', '.join((*subfolders, *tokenizers))} and scheduler"
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


def check_fit(checkpoint: Checkpoint) -> None:
    """The parts must agree about the sizes that they hand to each other.

    Raises:
        CheckpointError: Two of them do not, or the U-Net is of a kind that is not supported.
    """
    sizes = checkpoint.sizes()
    encoders = [name for name in checkpoint.configs if name in TOKENIZERS]
    for name, tokenizer in zip(encoders, checkpoint.tokenizers, strict=True):
        largest, entries = max(tokenizer.vocabulary.ids.values()), checkpoint.configs[name]["vocab_size"]
        if largest >= entries:
            raise CheckpointError(
                f"the {TOKENIZERS[name]} has ids up to {largest}, {name} embeds "
                f"{entries}: {TOKENIZERS[name]} and {name} are not of one model"
            )
    given = sizes["text_width"] + sizes.get("text_width_2", 0)
    if given != sizes["cross_width"]:
        raise CheckpointError(
            f"the text encoder{'s give' if len(encoders) > 1 else ' gives'} {given} features, the U-Net's "
            f"cross-attention takes {sizes['cross_width']}: text_encoder and unet are not of one model"
        )
    out_channels = int(checkpoint.configs["unet"]["out_channels"])
    if not out_channels == sizes["latent_channels"] == sizes["unet_channels"]:
        raise CheckpointError(
            f"the U-Net takes {sizes['unet_channels']} and gives {out_channels} channels, the VAE has "
            f"{sizes['latent_channels']}: only plain text-to-image checkpoints are supported"
        )
    if checkpoint.family == "sdxl":
        _check_sdxl_fit(checkpoint, sizes)


def _check_sdxl_fit(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> None:
    """SDXL's U-Net takes the pooled text and six numbers, each as a sinusoidal embedding."""
    unet = checkpoint.configs["unet"]
    if unet.get("addition_embed_type") != "text_time":
        raise CheckpointError(
            f"the U-Net's addition_embed_type is {unet.get('addition_embed_type')!r}; of the models with two "
            "text encoders only SDXL's, with text_time, is supported"
        )
    takes, width = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim")
    gives = sizes["projection_width"] + 6 * (width if isinstance(width, int) else 0)
    if takes != gives:
        raise CheckpointError(
            f"the U-Net's projection_class_embeddings_input_dim is {takes}, text_encoder_2 and six time ids "
            f"give {gives}: text_encoder_2 and unet are not of one model (or it is a refiner)"
        )
    lengths = [tokenizer.ids["max_length"] for tokenizer in checkpoint.tokenizers]
    if len(set(lengths)) > 1:
        raise CheckpointError(
            f"the tokenizers give {lengths[0]} and {lengths[1]} tokens; the U-Net reads them side by side"
        )


def schedule_from_config(config: Mapping[str, Any], family: str = "sd") -> NoiseSchedule:
    """A diffusers scheduler's configuration as a noise schedule.

    It is read as diffusers' pipeline of the family with a DDIMScheduler reads it, whatever class wrote it:
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
        "steps_offset": 0,
    }
    given = {key: value for key, value in config.items() if key in names and value is not None}
    if isinstance(given.get("trained_betas"), list):
        given["trained_betas"] = tuple(given["trained_betas"])
    # StableDiffusionPipeline sets the offset to 1 whatever the file says; StableDiffusionXLPipeline does not.
    forced = {"steps_offset": 1} if family == "sd" else {}
    return NoiseSchedule(**{**defaults, **given, **forced})


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over the names and contents of the files that an export reads, in hex.

    Random weights are known by their seed and the scheme that makes them.
    """
    digest = hashlib.sha256()
    if checkpoint.random_seed is not None:
        digest.update(f"random weights, scheme {SCHEME}, seed {checkpoint.random_seed}\0".encode())
    tokenizers = [TOKENIZERS[name] for name in checkpoint.configs if name in TOKENIZERS]
    for folder in (*checkpoint.configs, *tokenizers, "scheduler"):
        for file in described_files(checkpoint.path / folder, weights=checkpoint.random_seed is None):
            digest.update(f"{folder}/{file.name}\0".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
