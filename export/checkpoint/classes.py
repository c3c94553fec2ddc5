"""The classes that a checkpoint names: those whose pictures an export draws, and what the others are.

Nothing of what a checkpoint names is ever imported: names are looked up in these tables, and the classes that
load the networks stand in `sdrt.export.checkpoint.weights`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from sdrt.export.checkpoint.families import (
    CHECKPOINT_FAMILIES,
    DIFFUSERS,
    PIPELINES,
    STABLE_DIFFUSION_PARTS,
    SUPPORTED,
    TRANSFORMERS,
    CheckpointFamily,
    Network,
)
from sdrt.runtime.errors import CheckpointError

_AS_PLAIN: Final = 'to export what its networks draw without it, set _class_name in model_index.json to "{}"'
# The other pipelines by name, the first that fits: what one draws, and whether a plain pipeline over the
# same networks is worth having.
_OTHERS: Final = (
    ("Flax.*", "its weights are Flax's; convert it with the diffusers that saved it (from_flax=True)", False),
    ("(Onnx|ORT|OV|Neuron).*", "it is an export already; give the checkpoint it was made from", False),
    (".*Onnx.*", "it is an export already; give the checkpoint it was made from", False),
    ("Kolors.*", "its text encoder is ChatGLM", False),
    (".*(Upscale|UnCLIP|PaintByExample|Zero123).*", "its U-Net takes more than text", False),
    (".*(Marigold|LDM3D).*", "it draws depths or normals, not pictures", False),
    (".*(ControlNet|Adapter|GLIGEN).*", "it draws with a network that steers the U-Net", True),
    (".*(AnimateDiff|PIA|Video).*", "it draws films", False),
    (
        ".*(PAG|SAG|Panorama|AttendAndExcite|DiffEdit|LEdits|Semantic|Safe|ModelEditing|Pix2PixZero|Legacy).*",
        "it draws with Stable Diffusion's networks in another way",
        True,
    ),
)

# Other classes of networks, the first that fits: what one is, and what to do.
_OTHER_NETWORKS: Final = (
    ("AutoencoderTiny", "a small decoder for previews: put the model's own AutoencoderKL in its place"),
    (
        "Asymmetric.*|VQModel|Consistency.*|Autoencoder(?!KL$).*",
        "another kind of VAE: put the model's AutoencoderKL in its place",
    ),
    ("UNet(Motion|3D|Spatio).*", "a U-Net for films"),
    (".*ControlNet.*", "a ControlNet, which only steers a U-Net"),
)
LIBRARIES: Final = (DIFFUSERS, TRANSFORMERS, STABLE_DIFFUSION_PARTS)
# Entries that change no picture here: what checks a finished picture, and its own preparation.
_SILENT: Final = frozenset({"safety_checker", "feature_extractor", "scheduler"})
# Entries that make of the given picture what may be given, too.
_GUESSES: Final = {"depth_estimator": "depth maps are given as pictures (sd-run --depth FILE)"}
# Settings of pipelines: read by `sdrt.export.checkpoint.reader`, or about the safety checker.
_SETTINGS: Final = frozenset(
    {
        "add_watermarker",
        "force_zeros_for_empty_prompt",
        "requires_aesthetics_score",
        "requires_safety_checker",
        "max_noise_level",
    }
)
# Folders that change the picture where a program loads them.
_STEERING: Final = re.compile(r".*(controlnet|adapter|lora|prior).*|image_encoder")
_SECOND_PASS: Final = (
    " (of SDXL's refiner model_index.json says requires_aesthetics_score and names "
    "StableDiffusionXLImg2ImgPipeline)"
)
# Keys of any configuration by which a library would fetch or import what the file names, or rewrite weights.
_CODE: Final = {
    "auto_map": "code of its own, which is never run",
    "custom_pipeline": "code of its own, which is never run",
    "quantization_config": "quantised weights: save the checkpoint in fp16 or fp32",
    "adapter_config": "an adapter: merge it and save the checkpoint again",
}
_ATTENTION_KEYS: Final = ("attn_implementation", "attn_implementation_internal")
_ATTENTIONS: Final = (None, "eager", "sdpa")


def pipeline_family(path: Path, index: Mapping[str, Any]) -> CheckpointFamily:
    """The family of the pipeline that ``model_index.json`` names.

    Raises:
        CheckpointError: It names none, or one whose pictures an export does not draw.
    """
    file, name = path / "model_index.json", index.get("_class_name")
    if name is None:
        raise CheckpointError(
            f"{file} has no _class_name, so it does not say what draws with these networks: set it to the "
            f"pipeline's class ({', '.join(PIPELINES)})"
        )
    if isinstance(name, str) and name in PIPELINES:
        if index.get("is_cosxl_edit"):
            raise CheckpointError(
                f"{path} is CosXL Edit (is_cosxl_edit), whose U-Net reads scaled latents: not supported"
            )
        families = CHECKPOINT_FAMILIES.values()
        marked = (one for one in families if index.get(one.marker) and name in one.pipelines)
        return next(marked, PIPELINES[name])
    if "transformer" in index:
        raise CheckpointError(
            f"{path} is a {_shown(name)} with a transformer in place of a U-Net: not supported"
        )
    for pattern, words, plain in _OTHERS:
        if isinstance(name, str) and re.fullmatch(pattern, name):
            kind = "StableDiffusionXLPipeline" if "XL" in name else "StableDiffusionPipeline"
            remedy = "; " + _AS_PLAIN.format(kind) if plain else ""
            raise CheckpointError(f"{path} is a {name}, not supported: {words}{remedy}")
    raise CheckpointError(f"{file} names the pipeline {_shown(name)}, which is not supported: {SUPPORTED}")


def check_components(path: Path, index: Mapping[str, Any], family: CheckpointFamily) -> None:
    """Look at the classes that ``model_index.json`` gives the networks and tokenizers of a family.

    Raises:
        CheckpointError: One is of another class than the family has, or of a library that is not known.
    """
    file = path / "model_index.json"
    wanted: dict[str, tuple[str, ...]] = {network.folder: (network.kind,) for network in family.networks}
    for network in family.networks:
        wanted |= network.beside
    for key, allowed in wanted.items():
        entry = index.get(key)
        if entry is None:
            continue
        library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, entry)
        if library is None and name is None:
            raise CheckpointError(
                f"{file}: {key} is null, the pipeline was saved without it: give a checkpoint that has all "
                f"parts{_SECOND_PASS if key.startswith('text_encoder') else ''}"
            )
        if library not in LIBRARIES or name not in allowed:
            raise CheckpointError(
                f"{file}: {key} is {_shown(entry)}{_what_network(name)}; supported is {' or '.join(allowed)}"
            )


def scheduler_class(path: Path, index: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The class that reads ``scheduler_config.json``: that of ``model_index.json``, as diffusers takes it.

    Raises:
        CheckpointError: It is of another library, or no file names one.
    """
    entry = index.get("scheduler")
    library, name = entry if isinstance(entry, list) and len(entry) == 2 else ("diffusers", entry)
    name = name or config.get("_class_name")
    if library != "diffusers" or not isinstance(name, str):
        raise CheckpointError(
            f"{path / 'model_index.json'}: scheduler is {_shown(entry or name)}; it must be one of "
            "diffusers' classes"
        )
    return name


def check_config_classes(file: Path, network: Network, config: Mapping[str, Any]) -> None:
    """Look at what a network's ``config.json`` calls itself, and for what would fetch or run anything.

    Raises:
        CheckpointError: It is of another class, names code or a kernel, or has quantised weights.
    """
    for key, words in _CODE.items():
        if config.get(key) is not None:
            raise CheckpointError(f"{file}: {key} names {words}: not supported")
    for key, value in config.items():
        if key.lstrip("_") in _ATTENTION_KEYS and value not in _ATTENTIONS:
            raise CheckpointError(
                f"{file}: {key} is {_shown(value)}, and kernels are never fetched: remove it, or take "
                "eager or sdpa"
            )
    listed = config.get("architectures")
    given = listed if isinstance(listed, list) else [listed]
    if "_class_name" in config:
        given = [*given, config["_class_name"]]
    for entry in given:
        if entry is not None and entry not in network.config_kinds:
            raise CheckpointError(
                f"{file} is of the class {_shown(entry)}{_what_network(entry)}; supported is {network.kind}"
            )
    kind = network.model_type
    if kind and config.get("model_type", kind) != kind:
        raise CheckpointError(
            f"{file}: model_type is {_shown(config['model_type'])}; supported is {kind} (of a whole CLIP "
            f"model save the part as {network.kind})"
        )


def left_out(path: Path, index: Mapping[str, Any], family: CheckpointFamily) -> Iterator[str]:
    """One line for each part and setting of a checkpoint that an export leaves out."""
    known = {
        *family.folders,
        family.noising,
        *_SILENT,
        *(part for network in family.networks for part in network.beside),
    }
    for key, entry in index.items():
        if key.startswith("_") or key in known or key in _SETTINGS:
            continue
        parts = entry if isinstance(entry, list) else [entry]
        if key in _GUESSES and parts[-1] is not None:
            yield f"{key} ({_shown(parts[-1])}) of model_index.json is left out: {_GUESSES[key]}"
            continue
        if any(part is not None for part in parts):
            shown = parts[-1] if isinstance(entry, list) else entry
            yield f"{key} ({_shown(shown)}) of model_index.json is left out: pictures are drawn without it"
    if index.get("add_watermarker"):
        yield "add_watermarker is set in model_index.json; pictures are drawn without a watermark"
    for folder in sorted(path.iterdir()):
        if folder.name not in {*index, *family.folders} and _STEERING.fullmatch(folder.name):
            yield f"{folder.name}/, which model_index.json does not name, is left out"


def _what_network(name: object) -> str:
    """What is known about a class of networks, for after its name."""
    for pattern, words in _OTHER_NETWORKS:
        if isinstance(name, str) and re.fullmatch(pattern, name):
            return f", {words}"
    return ""


def _shown(value: object) -> str:
    """A value of a file for a message, short."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
