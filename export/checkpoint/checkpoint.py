"""A checkpoint in the diffusers folder format: found, and checked before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sdrt.export.checkpoint.classes import (
    check_components,
    check_config_classes,
    left_out,
    pipeline_family,
    scheduler_class,
)
from sdrt.export.checkpoint.fields import (
    LatentScaling,
    check_vae,
    latent_scaling,
    unread_fields,
    with_default_size,
)
from sdrt.export.checkpoint.files import (
    IMAGE_PROCESSOR,
    TOKENIZERS,
    check_weights,
    find_checkpoint,
    read_json,
    reading,
)
from sdrt.export.checkpoint.fit import check_fit
from sdrt.export.checkpoint.image_processor import image_processor_from_config
from sdrt.export.checkpoint.kinds import refuse_folder
from sdrt.export.checkpoint.limits import MAX_CONFIG_BYTES, check_limits
from sdrt.export.checkpoint.scheduler import CheckpointScheduler, read_scheduler
from sdrt.export.checkpoint.tokenizer_json import ClipTokenizer, open_tokenizer, vocabulary_from_clip
from sdrt.runtime.bundle.manifest import ImageProcessorFacts
from sdrt.runtime.errors import CheckpointError, UsageError
from sdrt.runtime.samplers.schedule import NoiseSchedule
from sdrt.runtime.samplers.table import NO_OPTIONS, SamplerOptions

SUBFOLDERS: Final = ("text_encoder", "unet", "vae")  # of Stable Diffusion 1.x and 2.x
SUBFOLDERS_OF: Final = {
    "sd": SUBFOLDERS,
    "sdxl": ("text_encoder", "text_encoder_2", "unet", "vae"),
    "image-variations": ("image_encoder", "unet", "vae"),
}
# What an export reads of each config.json.
CONFIG_KEYS: Final = {
    "text_encoder": ("hidden_size", "max_position_embeddings", "num_hidden_layers", "vocab_size"),
    "text_encoder_2": (
        *("hidden_size", "max_position_embeddings", "num_hidden_layers", "projection_dim", "vocab_size"),
    ),
    "image_encoder": ("image_size", "projection_dim"),
    "unet": ("block_out_channels", "cross_attention_dim", "in_channels", "out_channels", "sample_size"),
    "vae": ("block_out_channels", "latent_channels"),
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked diffusers folder, or the configurations of one and a seed in place of its weights.

    Attributes:
        path: The folder.
        source: What the user named: the folder, the hub id, or the architecture.
        family: ``sd``, ``sdxl`` or ``image-variations``.
        pipeline: diffusers' class that the checkpoint names.
        configs: ``config.json`` of each network, in the order of `SUBFOLDERS_OF`.
        schedule: The scheduler's configuration as a noise schedule.
        sampler: Our sampler that is the scheduler's equal, or the nearest one.
        sampler_options: What the scheduler's configuration says for this sampler, or for others.
        tokenizers: One for each text encoder: vocabulary, length and special ids.
        image_processor: Of the image encoder; None where there is none.
        force_zeros_for_empty_prompt: See `sdrt.runtime.bundle.manifest.Manifest`.
        random_seed: Of random weights; None where the folder holds weights.
        remarks: What whoever exports must know, one line each: what is left out or drawn otherwise.
    """

    path: Path
    source: str
    family: str
    pipeline: str
    configs: dict[str, dict[str, Any]]
    schedule: NoiseSchedule
    sampler: str
    tokenizers: tuple[ClipTokenizer, ...]
    image_processor: ImageProcessorFacts | None = None
    force_zeros_for_empty_prompt: bool = False
    random_seed: int | None = None
    sampler_options: SamplerOptions = NO_OPTIONS
    remarks: tuple[str, ...] = ()

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

    @property
    def distilled_guidance(self) -> bool:
        """Whether the U-Net is told the guidance scale, as that of a latent consistency model is."""
        return self.configs["unet"].get("time_cond_proj_dim") is not None

    @property
    def decoded(self) -> LatentScaling:
        """What the VAE's decoder is given for a sampler's latents."""
        return latent_scaling(self.family, self.configs["vae"])

    @property
    def encoded(self) -> LatentScaling:
        """What a sampler is given for the latents of the VAE's encoder.

        StableDiffusionXLInpaintPipeline reads ``latents_mean`` and ``latents_std`` only to decode, and its
        U-Net has learned from that.
        """
        return LatentScaling(self.decoded.factor) if "inpainting_channels" in self.sizes() else self.decoded

    def sizes(self) -> dict[str, int]:
        """The checkpoint's entries for the axes that `sdrt.runtime.bundle.components` leaves open."""
        unet, vae = self.configs["unet"], self.configs["vae"]
        latent_channels, unet_channels = int(vae["latent_channels"]), int(unet["in_channels"])
        sizes = {"cross_width": int(unet["cross_attention_dim"]), "latent_channels": latent_channels}
        # Beside the noisy latents an inpainting U-Net takes the mask and the masked picture's latents.
        if unet_channels == 2 * latent_channels + 1:
            sizes["inpainting_channels"] = unet_channels - latent_channels
        sizes["unet_channels"] = unet_channels - sizes.get("inpainting_channels", 0)
        if self.distilled_guidance:
            sizes["guidance_width"] = int(unet["time_cond_proj_dim"])
        if text := self.configs.get("text_encoder"):
            sizes |= {"tokens": self.tokenizer.ids["max_length"], "text_width": int(text["hidden_size"])}
            sizes["skips"] = 1
        if image := self.configs.get("image_encoder"):
            sizes["encoder_size"] = int(image["image_size"])
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
    if not (path / "model_index.json").exists():
        refuse_folder(path)
    index = read_json(path / "model_index.json", limit=MAX_CONFIG_BYTES)
    family = pipeline_family(path, index)
    subfolders = SUBFOLDERS_OF[family]
    check_components(path, index, subfolders)
    _check_folders(path, subfolders)
    configs = {name: _read_config(path / name / "config.json", name) for name in subfolders}
    if random_seed is None:
        for name in subfolders:
            check_weights(path / name)
    check_vae(path / "vae" / "config.json", configs["vae"])
    configs["unet"] = with_default_size(family, index["_class_name"], configs["unet"])
    tokenizers = tuple(
        _read_tokenizer(path / TOKENIZERS[name], configs[name], ships_with_weights=random_seed is None)
        for name in subfolders
        if name in TOKENIZERS
    )
    scheduler, written = _read_scheduler(path, index, family, configs)
    return Checkpoint(
        path=path,
        source=source,
        family=family,
        pipeline=index["_class_name"],
        configs=configs,
        schedule=scheduler.schedule,
        sampler=scheduler.sampler,
        tokenizers=tokenizers,
        image_processor=_read_image_processor(path) if "image_encoder" in configs else None,
        # StableDiffusionXLPipeline's default is true; the pipelines of the other family have no such thing.
        force_zeros_for_empty_prompt=family == "sdxl"
        and bool(index.get("force_zeros_for_empty_prompt", True)),
        random_seed=random_seed,
        sampler_options=scheduler.options,
        remarks=(
            *left_out(path, index, subfolders),
            *unread_fields(family, configs),
            *written,
            *scheduler.remarks,
        ),
    )


def _read_config(file: Path, name: str) -> dict[str, Any]:
    """One network's ``config.json``: of a class that is supported, within the limits, with what is read."""
    config = read_json(file, limit=MAX_CONFIG_BYTES)
    check_config_classes(file, name, config)
    check_limits(file, config)
    _check_config(file, config, CONFIG_KEYS[name])
    if name == "unet" and config.get("time_cond_proj_dim") is not None:
        _check_config(file, config, ("time_cond_proj_dim",))
    return config


def _read_scheduler(
    path: Path, index: Mapping[str, Any], family: str, configs: Mapping[str, Mapping[str, Any]]
) -> tuple[CheckpointScheduler, list[str]]:
    """The file in ``scheduler/``, read as the class that model_index.json names, and what to remark on."""
    config = read_json(path / "scheduler" / "scheduler_config.json", limit=MAX_CONFIG_BYTES)
    written_by, name = config.get("_class_name"), scheduler_class(path, index, config)
    remarks = []
    if written_by not in (None, name):
        remarks.append(
            f"model_index.json says that {name} reads scheduler_config.json, which "
            f"{str(written_by)[:60]} wrote: drawn with the former, as diffusers does"
        )
    unet, vae = configs["unet"], configs["vae"]
    try:
        scheduler = read_scheduler(
            {**config, "_class_name": name},
            family,
            inpainting=unet["in_channels"] == 2 * vae["latent_channels"] + 1,
            distilled=unet.get("time_cond_proj_dim") is not None,
        )
    except UsageError as error:
        raise CheckpointError(f"{path}/scheduler: {error}") from error
    return scheduler, remarks


def _read_tokenizer(folder: Path, config: Mapping[str, Any], *, ships_with_weights: bool) -> ClipTokenizer:
    if not folder.is_dir():
        raise CheckpointError(f"{folder.parent} has no folder {folder.name}/: the checkpoint is incomplete")
    positions = config["max_position_embeddings"]
    return open_tokenizer(folder, positions, None if ships_with_weights else vocabulary_from_clip())


def _read_image_processor(path: Path) -> ImageProcessorFacts:
    file = path / IMAGE_PROCESSOR
    return image_processor_from_config(file, read_json(file))


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
