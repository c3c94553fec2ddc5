"""The files of a checkpoint: where they are, which are read, and what is refused.

Only safetensors are read. A pickle (``.bin``, ``.ckpt``, ``.pt``) can run code when it is loaded, so it is
refused with the way to convert it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from sdrt.export.checkpoint.families import CHECKPOINT_FAMILIES
from sdrt.export.checkpoint.kinds import refuse_file, refuse_other_format, snapshot_of
from sdrt.export.checkpoint.limits import MAX_HEADER_BYTES
from sdrt.runtime.errors import CheckpointError
from sdrt.runtime.system.untrusted import MAX_JSON_BYTES, PICKLE_SUFFIXES, open_regular
from sdrt.runtime.system.untrusted import read_json as read_untrusted_json

_NETWORKS: Final = [network for family in CHECKPOINT_FAMILIES.values() for network in family.networks]
# Folder → the name of its weights without ``.safetensors``.
WEIGHT_NAMES: Final = {network.folder: network.weights for network in _NETWORKS}
_TOKENIZERS: Final = {
    folder: None for family in CHECKPOINT_FAMILIES.values() for folder in family.tokenizers.values()
}
_NOISING: Final = tuple(family.noising for family in CHECKPOINT_FAMILIES.values() if family.noising)
# Names of variants, what is taken first of several: the nearest to what was trained.
VARIANTS: Final = ("fp32", "bf16", "fp16", "non_ema")
IMAGE_PROCESSOR: Final = "feature_extractor/preprocessor_config.json"
HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
# What an export reads, and nothing else: a repository often holds every network three times more, as
# variants, in older formats and as pickles.
HUB_PATTERNS: Final = (
    "README.md",
    "model_index.json",
    *(f"{folder}/scheduler_config.json" for folder in ("scheduler", *_NOISING)),
    *(f"{folder}/*.{ending}" for folder in _TOKENIZERS for ending in ("json", "txt")),
    IMAGE_PROCESSOR,
    *(
        f"{folder}/{file}"
        for folder, name in WEIGHT_NAMES.items()
        for file in (
            "config.json",
            f"{name}.safetensors",
            f"{name}.safetensors.index.json",
            f"{name}-?????-of-?????.safetensors",
        )
    ),
)


@contextlib.contextmanager
def reading(place: object) -> Iterator[None]:
    """Inside, an error of the operating system (name too long, loop of links, …) is a CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise CheckpointError(f"{str(place)[:200]} cannot be read: {reason}") from error


def find_checkpoint(model: str, revision: str | None) -> Path:
    """The folder that ``model`` names, fetched from the hub if it is none here.

    Raises:
        CheckpointError: Empty, a single file, neither a folder nor a hub id, or the hub cannot be reached.
    """
    if not model.strip():
        raise CheckpointError(
            "MODEL is empty: give a single file, a folder in the diffusers format or a hub id owner/name"
        )
    path = Path(model)
    if path.exists() and not path.is_dir():
        refuse_file(path)
    return snapshot_of(path) if path.is_dir() else _download(model, revision)


def _download(model: str, revision: str | None) -> Path:
    if not HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model!r} is no file or folder here, and no hub id of the form owner/name")
    from huggingface_hub import snapshot_download  # 0.3 s to import, needed only here

    try:
        path = Path(snapshot_download(model, revision=revision, allow_patterns=list(HUB_PATTERNS)))
        for variant in VARIANTS:
            if lacking := [folder for folder in WEIGHT_NAMES if _has_no_weights(path / folder)]:
                patterns = [*HUB_PATTERNS, *_variant_patterns(lacking, variant)]
                snapshot_download(model, revision=revision, allow_patterns=patterns)
        return path
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model!r} is no folder here, and the hub could not give it ({reason}); "
            "download the checkpoint on a machine with a network and give the folder"
        ) from error


def _has_no_weights(folder: Path) -> bool:
    """Whether a network's folder is there, without weights of any kind."""
    stem = WEIGHT_NAMES[folder.name]
    return (folder / "config.json").is_file() and not any(folder.glob(f"{stem}*.safetensors*"))


def _variant_patterns(folders: Iterable[str], variant: str) -> Iterator[str]:
    """What is fetched of a variant: its file, or its shards and their index."""
    for folder in folders:
        stem = WEIGHT_NAMES[folder]
        yield from (f"{folder}/{stem}.{variant}{ending}.safetensors" for ending in ("", "-?????-of-?????"))
        yield f"{folder}/{stem}.safetensors.index.{variant}.json"


def read_json(file: Path, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object of at most ``limit`` bytes.

    Raises:
        CheckpointError: Missing, unreadable, no regular file, too large or deep, or something else than an
            object.
    """
    try:
        document = read_untrusted_json(file, limit=limit)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: the checkpoint is incomplete") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return document


def weight_files(folder: Path, stem: str | None = None) -> tuple[Path, ...]:
    """The files that a loader takes the weights of one network from: one file, or an index and its shards.

    Args:
        folder: Of one network.
        stem: The name of its weights without ``.safetensors``; by default what `WEIGHT_NAMES` has for the
            folder's name.

    Raises:
        CheckpointError: There is none: only a variant (``.fp16.``, ``.non_ema.``), only a pickle, or nothing.
    """
    stem = WEIGHT_NAMES[folder.name] if stem is None else stem
    name = f"{stem}.safetensors"
    whole, index = folder / name, folder / f"{name}.index.json"
    # Where both are there, diffusers takes the shards and transformers the whole file.
    if whole.is_file() and (stem == "model" or not index.is_file()):
        return (whole,)
    if index.is_file():
        return (index, *_shards(index))
    raise CheckpointError(_no_weights(folder, stem))


def variant_of(folder: Path, stem: str) -> tuple[str, dict[str, Path]]:
    """A variant of a network's weights, for a folder that has no others.

    Args:
        folder: Of one network.
        stem: The name of its weights without ``.safetensors``.

    Returns:
        The variant, such as ``fp16``, and the name that its file or index would have without it → where it
        is; both empty where the weights have no variant, or are there without one. Of several the first of
        `VARIANTS` is taken, else the first by name.
    """
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    if f"{stem}.safetensors" in names or f"{stem}.safetensors.index.json" in names:
        return "", {}
    pattern = re.compile(
        rf"{re.escape(stem)}\.(?:(\w+)\.safetensors(?:\.index\.json)?|safetensors\.index\.(\w+)\.json)"
    )
    found = {match[1] or match[2]: name for name in names if (match := pattern.fullmatch(name))}
    if not found:
        return "", {}
    variant = next((name for name in VARIANTS if name in found), min(found))
    plain = f"{stem}.safetensors{'.index.json' if found[variant].endswith('.json') else ''}"
    return variant, {plain: folder / found[variant]}


def _shards(index: Path) -> Iterator[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index} has no weight_map: it names no weights")
    for name in sorted({str(name) for name in names.values()}):
        shard = index.parent / name
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}, which is no safetensors file beside it: refused")
        if not shard.is_file():
            raise CheckpointError(f"{shard} is missing, {index.name} names it: the checkpoint is incomplete")
        yield shard


def _no_weights(folder: Path, stem: str) -> str:
    name = f"{stem}.safetensors"
    files = sorted(file.name for file in folder.iterdir() if not file.name.startswith("._"))
    shards = re.compile(rf"{re.escape(stem)}(\.\w+)?-\d+-of-\d+\.safetensors")
    if shard := next(filter(None, map(shards.fullmatch, files)), None):
        index = f"{name}.index{shard[1] or ''}.json"
        return (
            f"{folder} has shards of its weights but no {index}, which says what is in which: download it "
            "too (it is a small file beside them)"
        )
    other = [file for file in files if file.endswith((".msgpack", ".onnx", ".gguf"))]
    if other:
        return (
            f"{folder} has no {name} but {other[0]}: weights of Flax, ONNX and GGUF are not read; give the "
            "checkpoint in PyTorch's format with safetensors"
        )
    variants = [file for file in files if file.startswith(stem) and file.endswith(".safetensors")]
    if variants:
        return (
            f"{folder} has no {name}, only a variant ({', '.join(variants[:3])}): load it with "
            "diffusers' variant=... and save it again without (save_pretrained(FOLDER))"
        )
    pickles = [file for file in files if file.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return (
            f"{folder} has only a pickle ({', '.join(pickles[:3])}), which can run code when loaded: "
            "refused; convert it: load it once with diffusers where that is safe and call "
            "save_pretrained(FOLDER, safe_serialization=True)"
        )
    return f"{folder} has no {name}: the checkpoint is incomplete (pickles are not fetched from the hub)"


def check_weights(folder: Path) -> None:
    """Find missing and damaged weights before minutes are spent on the other networks.

    Raises:
        CheckpointError: As for `weight_files` and `tensor_shapes`, or a PEFT adapter lies beside them, which
            transformers would load in their place.
    """
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds a PEFT adapter (adapter_config.json), not a network: merge it into the "
            "checkpoint that it is for and save that one"
        )
    tensor_shapes(folder)


def tensor_shapes(folder: Path, stem: str | None = None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → dtype as safetensors writes it, and shape, of one network's tensors, from the files' headers.

    Args:
        folder: Of one network.
        stem: As for `weight_files`.

    Raises:
        CheckpointError: As for `weight_files`, or a file is truncated, no safetensors file, or has a header
            above the limit.
    """
    tensors = {}
    for file in weight_files(folder, stem):
        if file.suffix == ".safetensors":
            tensors.update(file_tensors(file)[0])
    return tensors


def file_tensors(file: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """What the header of one safetensors file says: name → dtype and shape, and its metadata.

    Raises:
        CheckpointError: As for `tensor_shapes`.
    """
    try:
        with open_regular(file) as stream:
            start = stream.read(64)
    except ValueError as error:  # which names the file
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    refuse_other_format(file, start)
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file} is truncated or damaged: its header would have {length} bytes, more than the limit of "
            f"{MAX_HEADER_BYTES}"
        )
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  no mapping
            tensors = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            return tensors, dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} is truncated or damaged ({error}): download or save it again"
        ) from error


def described_files(folder: Path, *, weights: bool = True) -> Iterator[Path]:
    """What an export reads of one subfolder, by name: configuration, vocabulary and, if wanted, weights."""
    loaded = weight_files(folder) if weights and folder.name in WEIGHT_NAMES else ()
    for file in sorted(folder.iterdir()):
        text = file.suffix in (".json", ".txt") and not file.name.endswith(".index.json")
        if file in loaded or (text and file.is_file() and not file.name.startswith("._")):
            yield file
