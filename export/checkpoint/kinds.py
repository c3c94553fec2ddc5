"""What a file or folder is that is no pipeline in the diffusers format, and what to do with it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from sdrt.export.checkpoint.limits import MAX_CONFIG_BYTES, MAX_HEADER_BYTES
from sdrt.runtime.errors import CheckpointError
from sdrt.runtime.system.untrusted import (
    PICKLE_SUFFIXES,
    is_pickle,
    open_regular,
    parse_json,
    read_json,
    read_limited,
)

_LFS: Final = b"version https://git-lfs.github.com/spec/"
CONVERT: Final = "StableDiffusionPipeline.from_single_file(...).save_pretrained(FOLDER)"
_STEERS: Final = "it only steers a checkpoint; give that one"
_WHOLE: Final = "give the folder of the whole pipeline, which has model_index.json"


def _part(option: str) -> str:
    return f"give it beside the model that it is for (sd-export MODEL OUT {option} FILE|FOLDER)"


_PICKLE: Final = (
    "a pickle, which can run code when loaded",
    f"refused; convert it on a machine you can lose: {CONVERT}, then give FOLDER",
)

_GGUF: Final = b"GGUF"
_QUANTISED: Final = (
    "a GGUF file, whose weights are quantised",
    "not read; give the checkpoint that it was made from",
)

# What the names of a safetensors file's tensors say of it, the first that fits: what it is, what to do.
_BY_TENSORS: Final = (
    (
        re.compile(r".*(lora_(up|down|A|B|a|b|unet|te)|[._]lora\.|hada_w|lokr_w|:\d+:(up|down)).*"),
        "a LoRA alone",
        "draw with it (sd-run --lora FILE), or merge it into the checkpoint that it is for "
        "(sd-export MODEL OUT --lora FILE)",
    ),
    (
        re.compile(r"(control_model\.|controlnet_cond_embedding\.|zero_convs\.|input_hint_block\.).*"),
        "a ControlNet alone",
        _STEERS,
    ),
    (re.compile(r"model\.diffusion_model\..*"), "a single file", "give that file itself to sd-export"),
    (
        re.compile(r"(emb_params|clip_[lg]|string_to_param.*)"),
        "a textual inversion alone",
        "draw with it (sd-run --embedding FILE)",
    ),
    (
        re.compile(r"(down_blocks|mid_block|time_embedding|input_blocks)\..*"),
        "a U-Net alone",
        _part("--unet"),
    ),
    (
        re.compile(r"(text_model\.|transformer\.|model\.)?(embeddings\.)?token_embedding\.weight"),
        "a text encoder alone",
        _part("--text-encoder"),
    ),
    (re.compile(r"(decoder|encoder|first_stage_model)\.(?!layers).*"), "a VAE alone", _part("--vae")),
)
# `_class_name` or an entry of `architectures` in the config.json of a network alone.
_BY_CLASS: Final = (
    (re.compile(r".*ControlNet.*"), "a ControlNet alone", _STEERS),
    (re.compile(r".*Adapter.*"), "an adapter alone", _STEERS),
    (re.compile(r"UNet.*"), "a U-Net alone", _part("--unet")),
    (re.compile(r"AutoencoderKL"), "a VAE alone", _part("--vae")),
    (re.compile(r"(Autoencoder|Asymmetric|VQ|Consistency).*"), "a VAE alone", _WHOLE),
    (re.compile(r"CLIPTextModel.*"), "a text encoder alone", _part("--text-encoder")),
    (re.compile(r"CLIP(Vision)?Model.*"), "a CLIP encoder alone", _WHOLE),
)
_LORA_FILES: Final = ("pytorch_lora_weights.safetensors", "adapter_config.json")


def refuse_file(path: Path) -> None:
    """Say what a single file is.

    Raises:
        CheckpointError: Always.
    """
    what, todo = _kind_of_file(path)
    raise CheckpointError(f"{path} is {what}: {todo}")


def _kind_of_file(path: Path) -> tuple[str, str]:
    try:
        with open_regular(path) as stream:
            start = stream.read(64)
    except ValueError as error:
        raise CheckpointError(f"{error}; give a single file or a folder in the diffusers format") from None
    if is_lfs_pointer(start):
        return "a Git LFS pointer, not the file itself", "run `git lfs pull` where it was cloned"
    if path.suffix in PICKLE_SUFFIXES:
        return _PICKLE
    if is_pickle(start):
        return f"{_PICKLE[0]}, whatever its name says", _PICKLE[1]
    if start.startswith(_GGUF) or path.suffix == ".gguf":
        return _QUANTISED
    if path.suffix == ".onnx":
        return "an ONNX graph", "give the PyTorch checkpoint that it was made from, as a folder"
    if path.suffix == ".msgpack":
        return "a file of Flax weights", "give the checkpoint in PyTorch's format, as a folder"
    if path.suffix == ".safetensors":
        names = tensor_names(path)
        for pattern, what, todo in _BY_TENSORS:
            if any(pattern.fullmatch(name) for name in names):
                return what, todo
    return (
        "no checkpoint that is known",
        "give a single file in LDM's names (.safetensors), or a folder in the diffusers format",
    )


def refuse_other_format(path: Path, start: bytes) -> None:
    """Tell by its first bytes a file that is no safetensors file, whatever its name says.

    Raises:
        CheckpointError: It is a pickle, a GGUF file or a Git LFS pointer.
    """
    if is_lfs_pointer(start):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` where it was cloned"
        )
    if is_pickle(start):
        raise CheckpointError(f"{path} is {_PICKLE[0]}, whatever its name says: {_PICKLE[1]}")
    if start.startswith(_GGUF):
        raise CheckpointError(f"{path} is {_QUANTISED[0]}: {_QUANTISED[1]}")


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file that begins so stands for one that Git has not fetched."""
    return start.startswith(_LFS)


def tensor_names(file: Path) -> tuple[str, ...]:
    """The names in a safetensors file's header; none where it is damaged."""
    try:
        with open_regular(file) as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = parse_json(stream.read(length)) if length <= MAX_HEADER_BYTES else {}
    except (OSError, ValueError):
        return ()
    return tuple(header) if isinstance(header, dict) else ()


def snapshot_of(folder: Path) -> Path:
    """The checkpoint inside a folder of the hub's cache, ``models--owner--name``; any other folder itself.

    Raises:
        CheckpointError: None of its snapshots is the main branch's; the message names those that are there.
    """
    snapshots = folder / "snapshots"
    if not folder.resolve().name.startswith("models--") or not snapshots.is_dir():
        return folder
    found = sorted(entry for entry in snapshots.iterdir() if entry.is_dir())
    main = folder / "refs" / "main"
    with contextlib.suppress(OSError, ValueError):
        commit = read_limited(main, MAX_CONFIG_BYTES).decode("utf-8", errors="replace").strip()
        found = [entry for entry in found if entry.name == commit] or found
    if len(found) == 1:
        return found[0]
    listed = ", ".join(str(entry) for entry in found[:3]) or "none"
    raise CheckpointError(f"{folder} is a folder of the hub's cache; give one of its snapshots: {listed}")


def refuse_folder(folder: Path) -> None:
    """Say what a folder without ``model_index.json`` is.

    Raises:
        CheckpointError: Always.
    """
    file = folder / "model_index.json"
    what, todo = next(_kinds_of_folder(folder), ("no checkpoint, or an incomplete one", _WHOLE))
    raise CheckpointError(f"{file} is missing; {folder} is {what}: {todo}")


def _kinds_of_folder(folder: Path) -> Iterator[tuple[str, str]]:
    """What speaks for a kind, the clearest first."""
    files = sorted(entry.name for entry in folder.iterdir())
    if (folder.resolve().parent / "model_index.json").is_file():
        yield "one part of a checkpoint", f"give {folder.resolve().parent}"
    if "manifest.json" in files:
        yield (
            "a bundle, exported already",
            "draw with it (sd-run --bundle), or give the checkpoint it was made from",
        )
    inside = [name for name in files if (folder / name / "model_index.json").is_file()]
    if inside:
        yield "a folder around checkpoints", f"give {folder / inside[0]}"
    if any(name in files for name in _LORA_FILES):
        _, what, todo = _BY_TENSORS[0]
        yield what, todo
    yield from _kinds_by_class(folder)
    for name in files:
        if name.endswith((".safetensors", ".gguf", ".onnx", ".msgpack", *PICKLE_SUFFIXES)):
            what, todo = _kind_of_file(folder / name)
            yield f"no pipeline, but holds {name}, {what}", todo
    if any(folder.glob("*/*.onnx")):
        yield "an ONNX export", "give the PyTorch checkpoint that it was made from"


def _kinds_by_class(folder: Path) -> Iterator[tuple[str, str]]:
    try:
        config = read_json(folder / "config.json", limit=MAX_CONFIG_BYTES)
    except (OSError, ValueError):
        return
    if not isinstance(config, Mapping):
        return
    listed = config.get("architectures")
    names = [config.get("_class_name"), *(listed if isinstance(listed, list) else ())]
    for name in names:
        for pattern, what, todo in _BY_CLASS:
            if isinstance(name, str) and pattern.fullmatch(name):
                yield f"{what} ({name})", todo
