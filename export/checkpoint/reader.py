"""A folder in the diffusers format → a checkpoint: found, and checked before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.classes import (
    check_components,
    check_config_classes,
    left_out,
    pipeline_family,
    scheduler_class,
)
from sdrt.export.checkpoint.families import CheckpointFamily, Network
from sdrt.export.checkpoint.few_steps import few_steps, names_of, unlike_few_steps
from sdrt.export.checkpoint.fields import check_vae, unread_fields, with_default_size
from sdrt.export.checkpoint.files import (
    IMAGE_PROCESSOR,
    check_weights,
    find_checkpoint,
    read_json,
    reading,
)
from sdrt.export.checkpoint.fit import check_fit
from sdrt.export.checkpoint.image_processor import image_processor_from_config
from sdrt.export.checkpoint.kinds import refuse_folder
from sdrt.export.checkpoint.limits import MAX_CONFIG_BYTES, check_limits
from sdrt.export.checkpoint.scheduler import CheckpointScheduler, noising_schedule, read_scheduler
from sdrt.export.checkpoint.tokenizer_json import ClipTokenizer, open_tokenizer, vocabulary_from_clip
from sdrt.runtime.bundle.manifest import ImageProcessorFacts, NoisingFacts
from sdrt.runtime.errors import CheckpointError, UsageError


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


def read_checkpoint(
    path: Path, source: str, random_seed: int | None = None, names: Sequence[str] | None = None
) -> Checkpoint:
    """Read and check everything but the weights.

    Args:
        path: A folder in the diffusers format.
        source: What the user named.
        names: What the model is called; by default the folder's own names.
        random_seed: With it the folder needs neither weights nor a vocabulary: CLIP's is taken.

    Raises:
        CheckpointError: As for `open_checkpoint`.
    """
    if not (path / "model_index.json").exists():
        refuse_folder(path)
    index = read_json(path / "model_index.json", limit=MAX_CONFIG_BYTES)
    kind = pipeline_family(path, index)
    family = kind.record.name
    check_components(path, index, kind)
    _check_folders(path, kind)
    configs = {
        network.folder: _read_config(path / network.folder / "config.json", network)
        for network in kind.networks
    }
    if random_seed is None:
        for folder in kind.folders:
            check_weights(path / folder)
    check_vae(path / "vae" / "config.json", configs["vae"])
    configs["unet"] = with_default_size(family, index["_class_name"], configs["unet"])
    tokenizers = tuple(
        _read_tokenizer(path / tokenizer, configs[encoder], ships_with_weights=random_seed is None)
        for encoder, tokenizer in kind.tokenizers.items()
    )
    scheduler, written, config = _read_scheduler(path, index, family, configs)
    called = names_of(path, source, (index, configs["unet"])) if names is None else names
    few = few_steps(called, config)
    return Checkpoint(
        path=path,
        source=source,
        family=family,
        pipeline=index["_class_name"],
        configs=configs,
        schedule=scheduler.schedule,
        sampler=scheduler.sampler,
        tokenizers=tokenizers,
        image_processor=_read_image_processor(path) if "image_encoder" in kind.folders else None,
        noising=_read_noising(path, index, kind),
        # StableDiffusionXLPipeline's default is true; the pipelines of the other families have no such thing.
        force_zeros_for_empty_prompt=kind.record.zeros_for_no_text
        and bool(index.get("force_zeros_for_empty_prompt", True)),
        random_seed=random_seed,
        sampler_options=scheduler.options,
        remarks=(
            *left_out(path, index, kind),
            *unread_fields(family, configs),
            *written,
            *scheduler.remarks,
            *(unlike_few_steps(config) if few is None else ()),
        ),
        few_steps=few,
    )


def _read_config(file: Path, network: Network) -> dict[str, Any]:
    """One network's ``config.json``: of a class that is supported, within the limits, with what is read."""
    config = read_json(file, limit=MAX_CONFIG_BYTES)
    check_config_classes(file, network, config)
    check_limits(file, config)
    _check_config(file, config, network.config_keys)
    if network.folder == "unet" and config.get("time_cond_proj_dim") is not None:
        _check_config(file, config, ("time_cond_proj_dim",))
    return config


def _read_scheduler(
    path: Path, index: Mapping[str, Any], family: str, configs: Mapping[str, Mapping[str, Any]]
) -> tuple[CheckpointScheduler, list[str], dict[str, Any]]:
    """The file in ``scheduler/``, read as the class that model_index.json names; remarks; what it says."""
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
    return scheduler, remarks, {**config, "_class_name": name}


def _read_tokenizer(folder: Path, config: Mapping[str, Any], *, ships_with_weights: bool) -> ClipTokenizer:
    if not folder.is_dir():
        raise CheckpointError(f"{folder.parent} has no folder {folder.name}/: the checkpoint is incomplete")
    positions = config["max_position_embeddings"]
    return open_tokenizer(folder, positions, None if ships_with_weights else vocabulary_from_clip())


def _read_image_processor(path: Path) -> ImageProcessorFacts:
    file = path / IMAGE_PROCESSOR
    return image_processor_from_config(file, read_json(file))


def _read_noising(path: Path, index: Mapping[str, Any], kind: CheckpointFamily) -> NoisingFacts | None:
    """The scheduler that lays noise over a given picture: of its fields only the betas count."""
    if not kind.noising:
        return None
    config = read_json(path / kind.noising / "scheduler_config.json", limit=MAX_CONFIG_BYTES)
    try:
        schedule = noising_schedule(config)
    except UsageError as error:
        raise CheckpointError(f"{path / kind.noising}: {error}") from error
    most = schedule.num_train_timesteps - 1
    if kind.most_noise is not None:
        setting, usual = kind.most_noise
        given = index.get(setting, usual)
        if type(given) is not int or not 0 <= given <= most:
            raise CheckpointError(
                f"{path / 'model_index.json'}: {setting} is {given!r}; it must be a whole number from 0 to "
                f"{most}"
            )
        most = given
    return NoisingFacts(schedule, most)


def _check_folders(path: Path, family: CheckpointFamily) -> None:
    for name in family.folders:
        if not (path / name).is_dir():
            raise CheckpointError(
                f"{path} has no folder {name}/; a checkpoint has "
                f"{', '.join((*family.folders, *family.tokenizers.values()))} and scheduler"
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
