"""A checkpoint in the diffusers folder format: found, checked, loaded as PyTorch modules.

Only safetensors are read. A pickle (``.bin``, ``.ckpt``, ``.pt``) can run code when it is loaded, so it is
refused with the way to convert it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from sdrt.runtime.errors import CheckpointError, UsageError
from sdrt.runtime.schedule import NoiseSchedule

PICKLE_SUFFIXES: Final = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
SUBFOLDERS: Final = ("text_encoder", "unet", "vae")
# What an export reads of each config.json.
CONFIG_KEYS: Final = {
    "text_encoder": ("hidden_size", "max_position_embeddings", "vocab_size"),
    "unet": ("block_out_channels", "cross_attention_dim", "in_channels", "out_channels", "sample_size"),
    "vae": ("block_out_channels", "latent_channels"),
}
HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
HUB_PATTERNS: Final = ("*.json", "*.txt", "*/*.json", "*/*.txt", "*/*.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked diffusers folder.

    Attributes:
        path: The folder.
        source: What the user named: the folder, or the hub id.
        configs: ``config.json`` of each of text_encoder, unet, vae.
        schedule: The scheduler's configuration as a noise schedule.
    """

    path: Path
    source: str
    configs: dict[str, dict[str, Any]]
    schedule: NoiseSchedule

    @property
    def factor(self) -> int:
        """Image pixels per latent along one side."""
        return int(2 ** (len(self.configs["vae"]["block_out_channels"]) - 1))

    @property
    def size_multiple(self) -> int:
        """Sizes in pixels that every level of the U-Net halves without a remainder."""
        return int(self.factor * 2 ** (len(self.configs["unet"]["block_out_channels"]) - 1))

    def sizes(self) -> dict[str, int]:
        """The checkpoint's entries for the axes that `sdrt.runtime.components` leaves open."""
        text, unet, vae = (self.configs[name] for name in SUBFOLDERS)
        return {
            "tokens": int(text["max_position_embeddings"]),
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
    path = Path(model)
    if path.is_file():
        _refuse_file(path)
    if not path.is_dir():
        path = _download(model, revision)
    index = _read_json(path / "model_index.json")
    _check_kind(path, index)
    configs = {name: _read_json(path / name / "config.json") for name in SUBFOLDERS}
    for name in SUBFOLDERS:
        _check_config(path / name / "config.json", configs[name], CONFIG_KEYS[name])
        _check_weights(path / name)
    if not (path / "tokenizer").is_dir():
        raise CheckpointError(f"{path} has no folder tokenizer/: the checkpoint is incomplete")
    scheduler = _read_json(path / "scheduler" / "scheduler_config.json")
    try:
        schedule = schedule_from_config(scheduler)
    except UsageError as error:
        raise CheckpointError(f"{path}/scheduler: {error}") from error
    checkpoint = Checkpoint(path, model, configs, schedule)
    _check_fit(checkpoint)
    return checkpoint


def _refuse_file(path: Path) -> None:
    if path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when loaded: refused; convert it on a machine you "
            "can lose: StableDiffusionPipeline.from_single_file(...).save_pretrained(FOLDER), then "
            "give FOLDER"
        )
    raise CheckpointError(
        f"{path} is a single file; give a folder in the diffusers format "
        "(StableDiffusionPipeline.from_single_file(...).save_pretrained(FOLDER) makes one)"
    )


def _download(model: str, revision: str | None) -> Path:
    """Fetch the files that an export needs from the hub; never a pickle."""
    if not HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model!r} is neither a folder nor a hub id of the form owner/name")
    from huggingface_hub import snapshot_download  # 0.3 s to import, needed only here

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(HUB_PATTERNS)))
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model!r} is no folder here, and the hub could not give it ({reason}); "
            "download the checkpoint on a machine with a network and give the folder"
        ) from error


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


def _check_weights(folder: Path) -> None:
    """Refuse pickles, and find a damaged file before minutes are spent on the other networks."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file} is truncated or damaged ({error}): download or save it again"
            ) from error
    if files:
        return
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder} has only a pickle ({', '.join(pickles)}), which can run code when loaded: "
            "refused; convert it: load it once with diffusers where that is safe and call "
            "save_pretrained(FOLDER, safe_serialization=True)"
        )
    raise CheckpointError(f"{folder} has no .safetensors file: the checkpoint is incomplete")


def _check_fit(checkpoint: Checkpoint) -> None:
    """The three networks must agree about the sizes that they hand to each other."""
    sizes = checkpoint.sizes()
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


def _read_json(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: the checkpoint is incomplete") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return document


def load_module(checkpoint: Checkpoint, name: str) -> torch.nn.Module:
    """Load one network in float32 on the CPU, in evaluation mode.

    Args:
        checkpoint: The checked folder.
        name: ``text_encoder``, ``unet`` or ``vae``.

    Raises:
        CheckpointError: A tensor is missing, has a wrong shape, or holds NaN or infinity.
    """
    folder = checkpoint.path / name
    try:
        module, report = _loader(name).from_pretrained(
            folder,
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            ignore_mismatched_sizes=True,  # reported, and refused by name below
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise CheckpointError(f"{folder} cannot be loaded: {first.strip()}") from error
    _check_report(folder, report)
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{folder}: the tensor {key} holds NaN or infinity")
    loaded: torch.nn.Module = module.eval().requires_grad_(False)
    return loaded


def _loader(name: str) -> Any:
    """The class that reads one subfolder; the imports take seconds, so only what is asked for."""
    if name == "text_encoder":
        from transformers import CLIPTextModel

        return CLIPTextModel
    from diffusers import AutoencoderKL, UNet2DConditionModel

    return UNet2DConditionModel if name == "unet" else AutoencoderKL


def _check_report(folder: Path, report: dict[str, Any]) -> None:
    """Turn a loader's silent re-initialisations into errors."""
    if mismatched := sorted(report.get("mismatched_keys") or ()):
        key, given, wanted = mismatched[0]
        raise CheckpointError(
            f"{folder}: {key} has the shape {list(given)}, by config.json it is {list(wanted)} "
            f"({len(mismatched)} of wrong shape in all)"
        )
    missing = sorted(key for key in report.get("missing_keys") or () if not str(key).endswith("position_ids"))
    if missing:
        raise CheckpointError(f"{folder}: the tensor {missing[0]} is missing ({len(missing)} missing in all)")


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over the names and contents of the weight and configuration files, in hex."""
    digest = hashlib.sha256()
    for folder in (*SUBFOLDERS, "tokenizer", "scheduler"):
        for file in sorted((checkpoint.path / folder).iterdir()):
            if file.suffix in (".json", ".txt", ".safetensors"):
                digest.update(f"{folder}/{file.name}\0".encode())
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
