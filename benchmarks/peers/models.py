"""One checkpoint in the form that each peer reads, made once and kept.

The forms:

* ``diffusers``: a folder in diffusers' format; a checkpoint is one, an architecture's random weights are
  written once;
* ``diffusers-classic``: the same with the text encoder's tensors named as transformers named them before its
  version 5 (``text_model.…``): older versions and stable-diffusion.cpp find no others, and some draw random
  ones in silence;
* ``optimum-onnx``, ``openvino``: made of that by the peers' own exporters in their environments.

They lie under ``peer-models`` in `sdrt.kernels.cache.cache_folder`, by the checkpoint's fingerprint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.benchmarks.peers import environments as peer_environments
from sdrt.benchmarks.peers import registry as peers
from sdrt.benchmarks.peers.environments import OFFLINE, Progress, locked, run_logged
from sdrt.benchmarks.peers.safetensors_file import copy_renamed, tensor_names, write_float32
from sdrt.export.checkpoint.architectures import ARCHITECTURES, open_architecture
from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.families import DIFFUSERS, TRANSFORMERS
from sdrt.export.checkpoint.files import WEIGHT_NAMES, read_json, weight_files
from sdrt.export.checkpoint.fingerprint import fingerprint
from sdrt.export.checkpoint.random_weights import random_tensors
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.checkpoint.tokenizer_json import write_tokenizer_folder
from sdrt.export.checkpoint.weights import meta_module
from sdrt.kernels.cache import cache_folder, private_folder
from sdrt.runtime.bundle.families.sdxl import SDXL
from sdrt.runtime.bundle.families.stable_diffusion import STABLE_DIFFUSION
from sdrt.runtime.errors import BackendError, UsageError
from sdrt.runtime.system.files import new_folder, writing

KIND: Final = "peer-models"  # of cache
CLASSIC_PREFIX: Final = "text_model."
TEXT_ENCODER: Final = "text_encoder"
LINKED: Final = ("model_index.json", "scheduler", "tokenizer", "unet", "vae")
# Exporter of a form → its words before the model and the place for the result.
EXPORTERS: Final = {
    "optimum-onnx": ("-m", "optimum.exporters.onnx", "--task", "text-to-image", "--model"),
    "openvino": (
        *("-m", "optimum.commands.optimum_cli", "export", "openvino"),
        *("--task", "text-to-image", "--weight-format", "fp32", "--model"),
    ),
}


def prepare(name: str, model: str, progress: Progress = lambda _: None) -> Path:
    """The folder that a peer's worker loads a checkpoint from; made if it is not there.

    Args:
        name: A key of `sdrt.benchmarks.peers.registry.PEERS`.
        model: A folder in diffusers' format, a hub id, or the name of an architecture.
        progress: Told a line at a time what takes long.

    Raises:
        UsageError: No such peer, or the model does not draw from a prompt alone as those do that it knows.
        CheckpointError: The model is missing or damaged.
        BackendError: The peer's exporter failed; the message has its last words and names its log.
        OutputError: The cache folder cannot be written.
    """
    peer = peers.get(name)
    checkpoint = open_architecture(model) if model in ARCHITECTURES else open_checkpoint(model)
    families = (STABLE_DIFFUSION, SDXL) if peer.form == "diffusers" else (STABLE_DIFFUSION,)
    if checkpoint.record not in families or "inpainting_channels" in checkpoint.sizes():
        known = "1.x, 2.x and XL" if len(families) > 1 else "1.x and 2.x"
        raise UsageError(f"{model}: the worker of {name} draws with Stable Diffusion {known} alone")
    return model_in_form(peer.form, peer.converter, checkpoint, progress)


def model_in_form(form: str, converter: str, checkpoint: Checkpoint, progress: Progress) -> Path:
    """A checkpoint in one of the forms; errors as `prepare`.

    Args:
        form: See above.
        converter: The environment that makes it of ``diffusers-classic``; not read for other forms.
        checkpoint: Of a family that the peer knows.
        progress: Told a line at a time what takes long.
    """
    place = cache_folder(KIND) / fingerprint(checkpoint)[:16]
    if form == "diffusers" and checkpoint.random_seed is None:
        return checkpoint.path
    if form in ("diffusers", "diffusers-classic"):
        if checkpoint.random_seed is not None:
            return _made(
                place / "diffusers", lambda folder: _write_random(checkpoint, folder, progress), progress
            )
        names = tensor_names(_text_weights(checkpoint.path))
        if any(tensor.startswith(CLASSIC_PREFIX) for tensor in names):
            return checkpoint.path
        return _made(place / "diffusers-classic", lambda folder: _write_classic(checkpoint, folder), progress)
    source = model_in_form("diffusers-classic", "", checkpoint, progress)
    key = peer_environments.environment_key(peer_environments.ENVIRONMENTS[converter])
    target = place / f"{form}-{key}"
    return _made(target, lambda folder: _export(form, converter, source, folder, progress), progress)


def _made(target: Path, make: Callable[[Path], None], progress: Progress) -> Path:
    """The folder ``target``, which ``make`` fills under another name if it is not there."""
    with writing(target):
        private_folder(KIND)
        target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f"{target.name}.lock")):
        # A link is broken when the checkpoint was moved.
        if not target.is_dir() or not all(entry.exists() for entry in target.iterdir()):
            progress(f"making {target}")
            with new_folder(target, replace=True) as folder, writing(target):
                make(folder)
    return target


def _index(checkpoint: Checkpoint) -> dict[str, Any]:
    """The ``model_index.json`` of an architecture, whose own names no classes."""
    kind, none = checkpoint.kind, [None, None]
    index: dict[str, Any] = {"_class_name": kind.draws, "feature_extractor": none, "image_encoder": none}
    index |= {name: none if value is None else value for name, value in kind.settings.items()}
    for network in kind.networks:
        index[network.folder] = [network.library, network.kind]
        index |= {folder: [TRANSFORMERS, classes[0]] for folder, classes in network.beside.items()}
    return index


def _write_random(checkpoint: Checkpoint, folder: Path, progress: Progress) -> None:
    """An architecture with its random weights in fp32, of which one tensor is in memory at a time."""
    scheduler = read_json(checkpoint.path / "scheduler" / "scheduler_config.json")["_class_name"]
    index = {**_index(checkpoint), "scheduler": [DIFFUSERS, scheduler]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    shutil.copytree(checkpoint.path / "scheduler", folder / "scheduler")
    for subfolder, tokenizer in zip(checkpoint.kind.tokenizers.values(), checkpoint.tokenizers, strict=True):
        ids = tokenizer.vocabulary.ids
        pad = next(token for token, number in ids.items() if number == tokenizer.ids["pad"])
        write_tokenizer_folder(folder / subfolder, pad=pad)
    for name in checkpoint.configs:
        progress(f"{name}: writing random weights")
        part = folder / name
        part.mkdir()
        shutil.copy(checkpoint.path / name / "config.json", part)
        module: Any = meta_module(checkpoint, name)
        prefix = CLASSIC_PREFIX if name == TEXT_ENCODER else ""
        shapes = {
            key if key.startswith(prefix) else prefix + key: tuple(tensor.shape)
            for key, tensor in module.state_dict().items()
        }
        write_float32(
            part / f"{WEIGHT_NAMES[name]}.safetensors", shapes, _random_arrays(checkpoint, module, name)
        )


def _random_arrays(checkpoint: Checkpoint, module: Any, name: str) -> Iterator[NDArray[np.float32]]:
    assert checkpoint.random_seed is not None
    for _, tensor in random_tensors(module, checkpoint.random_seed, name):
        yield tensor.float().numpy()


def _write_classic(checkpoint: Checkpoint, folder: Path) -> None:
    """Links to the checkpoint, but for its text encoder, whose tensors get their older names."""
    for entry in sorted(checkpoint.path.resolve().iterdir()):
        if entry.name in LINKED:
            (folder / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    part = folder / TEXT_ENCODER
    part.mkdir()
    shutil.copy(checkpoint.path / TEXT_ENCODER / "config.json", part)
    copy_renamed(
        _text_weights(checkpoint.path),
        part / f"{WEIGHT_NAMES[TEXT_ENCODER]}.safetensors",
        lambda name: name if name.startswith(CLASSIC_PREFIX) else CLASSIC_PREFIX + name,
    )


def _text_weights(path: Path) -> Path:
    files = weight_files(path / TEXT_ENCODER)
    if len(files) != 1:
        raise UsageError(
            f"{path / TEXT_ENCODER} is sharded, which peers' models are not made of: save it whole"
        )
    return files[0]


def _export(form: str, converter: str, source: Path, folder: Path, progress: Progress) -> None:
    """Let a peer's exporter write its form of ``source`` into ``folder``."""
    found = peer_environments.find(converter)
    if found is None:
        raise BackendError(
            f"the environment {converter}, which makes models for {form}, is not installed: "
            f"`sd-bench peers install {form}`"
        )
    log = folder.parent / f"{form}.log"
    log.unlink(missing_ok=True)
    command = [str(found.python), *EXPORTERS[form], str(source), str(folder)]
    run_logged(command, log, lambda line: progress(f"{form}: {line}"), OFFLINE)
