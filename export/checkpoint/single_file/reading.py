"""A single file → what it is, and the configurations that go with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from sdrt.export.checkpoint.architectures import FOLDER
from sdrt.export.checkpoint.classes import pipeline_family, scheduler_class
from sdrt.export.checkpoint.families import CheckpointFamily
from sdrt.export.checkpoint.files import read_json
from sdrt.export.checkpoint.limits import MAX_CONFIG_BYTES
from sdrt.export.checkpoint.overrides import Overrides, with_overrides
from sdrt.export.checkpoint.scheduler import FILE as SCHEDULER_FILE
from sdrt.export.checkpoint.single_file.header import DTYPES, FP8, Header, load_tensors
from sdrt.export.checkpoint.single_file.names import EMA, TOLD, UNET
from sdrt.export.checkpoint.single_file.published import INDEX_FILE, KINDS, Kind
from sdrt.runtime.errors import CheckpointError, UsageError

_FIRST: Final = f"{UNET}input_blocks.0.0.weight"
_CONTEXT: Final = re.compile(r".*\.transformer_blocks\.0\.attn2\.to_k\.weight")
_BY_CONFIG: Final = "--config FOLDER gives the configurations and the tokenizer of a model of other sizes"
# What metadata say of the prediction → a scheduler's word for it.
_PREDICTIONS: Final = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
}
_PREDICTION_KEYS: Final = ("modelspec.prediction_type", "modelspec.predict_key")
_NAMES: Final = ("modelspec.title", "modelspec.architecture")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a single file is.

    Attributes:
        base: A folder of configurations in diffusers' format; tokenizers' vocabularies may be missing.
        family: Of the pipeline that draws with it.
        index: ``model_index.json``.
        configs: Folder of a network → its ``config.json``.
        scheduler: ``scheduler_config.json``.
        line: All of that for people, in one line.
        names: What says that it was distilled to few steps, if anything does.
        published: Whether the configurations are ours, of a published kind.
    """

    base: Path
    family: CheckpointFamily
    index: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    line: str
    names: tuple[str, ...]
    published: bool


@dataclass(frozen=True, slots=True)
class _Told:
    """What the file or the user says of the prediction, and by what."""

    overrides: Overrides
    by: tuple[str, ...] = ()


def read_single_file(header: Header, overrides: Overrides) -> Reading:
    """Tell what a file is by its tensors' names and shapes, its metadata and, last, its own name.

    Args:
        header: Of a file whose U-Net has LDM's names.
        overrides: What the user says of it.

    Raises:
        CheckpointError: It is of no published kind, or of one that is not supported.
        UsageError: ``overrides`` do not fit it.
    """
    if overrides.config is not None:
        return _by_config(header, overrides.config, overrides)
    told = _told(header, overrides)
    kind, why = _kind(header, told.overrides)
    base = FOLDER / kind.base
    index = read_json(base / INDEX_FILE, limit=MAX_CONFIG_BYTES) | dict(kind.index)
    family = pipeline_family(base, index)
    configs = _configs(base, family)
    configs["unet"] |= {**kind.unet, **_guidance(header)}
    configs["vae"] |= {**kind.vae, **_latents(header)}
    scheduler = {**(kind.scheduler or scheduler_in(base, index)), **_sigmas(header)}
    scheduler = with_overrides(scheduler, told.overrides)
    words = f"{kind.words}{why}"
    line = _line(header, words, scheduler, told)
    # The kind has the last word: a file that the user takes for another is not told by its name.
    names = (f"{kind.name}, {header.path.stem}",) if kind.hints else ()
    return Reading(base, family, index, configs, scheduler, line, names, published=True)


def _by_config(header: Header, base: Path, overrides: Overrides) -> Reading:
    if not (base / INDEX_FILE).is_file():
        raise UsageError(f"--config is {base}: a diffusers folder is wanted, with {INDEX_FILE}")
    index = read_json(base / INDEX_FILE, limit=MAX_CONFIG_BYTES)
    family = pipeline_family(base, index)
    scheduler = with_overrides(scheduler_in(base, index), overrides)
    words = f"{family.record.title} by --config {base.resolve().name}"
    line = _line(header, words, scheduler, _Told(overrides))
    names = (header.path.stem,)
    return Reading(base, family, index, _configs(base, family), scheduler, line, names, published=False)


def _kind(header: Header, overrides: Overrides) -> tuple[Kind, str]:
    """The published kind, and by what it is known where that is not the tensors alone."""
    if len(header.shape(_FIRST)) != 4:
        raise CheckpointError(
            f"{header.path} has no {_FIRST}, the first layer of a U-Net: a transformer in place of a U-Net "
            "(as in Stable Diffusion 3 and FLUX) is not supported"
        )
    context, channels = _context(header), header.shape(_FIRST)[1]
    words = " ".join([header.path.stem, *(header.metadata.get(key, "") for key in _NAMES)]).lower()
    if overrides.family:
        return _named_kind(header, overrides.family, words, (context, channels)), " (--family)"
    for kind in KINDS:
        if (kind.context, kind.channels) != (context, channels) or not header.tensors.keys() >= {
            *kind.markers
        }:
            continue
        why = _why(kind, words, overrides)
        if why is None:
            continue
        if not kind.base:
            raise CheckpointError(f"{header.path} is {kind.words}: {kind.why}")
        return kind, why or (kind.doubt and not overrides.prediction_type and f" ({kind.doubt})") or ""
    raise CheckpointError(
        f"{header.path}: its U-Net takes {channels} channels and reads {context} features of the text; no "
        f"published kind of single file does: {_BY_CONFIG}"
    )


def _named_kind(header: Header, name: str, words: str, sizes: tuple[int, int]) -> Kind:
    """The kind that the user names, if the file can be one; of its rows the one that more tells."""
    rows = [kind for kind in KINDS if kind.name == name]
    fitting = [kind for kind in rows if all(marker in header.tensors for marker in kind.markers)]
    if not fitting:
        wanted = " and ".join(rows[0].markers)
        raise UsageError(f"--family is {name}: {header.path} has no tensor {wanted}")
    told = (kind for kind in fitting if kind.markers or (kind.hints and re.search(kind.hints, words)))
    kind = next(told, fitting[-1])
    if (kind.context, kind.channels) != sizes:
        raise UsageError(
            f"--family is {name}, whose U-Net takes {kind.channels} channels and reads {kind.context} "
            f"features of the text; that of {header.path} takes {sizes[1]} and reads {sizes[0]}"
        )
    return kind


def _why(kind: Kind, words: str, overrides: Overrides) -> str | None:
    """What tells a kind beside its tensors: nothing where they do, None where it is not told."""
    if kind.predicts and overrides.prediction_type:
        return "" if kind.predicts == overrides.prediction_type else None
    if not kind.hints:
        return ""
    return " (by its name)" if re.search(kind.hints, words) else None


def _context(header: Header) -> int:
    """The features that the U-Net's cross-attention reads; 0 where it has none."""
    found = (name for name in header.tensors if name.startswith(UNET) and _CONTEXT.fullmatch(name))
    return next((shape[-1] for name in found if (shape := header.shape(name))), 0)


def _told(header: Header, overrides: Overrides) -> _Told:
    """The overrides, with what tensors and metadata say of the prediction where the user says nothing."""
    prediction, by = overrides.prediction_type, []
    if not prediction and "v_pred" in header.tensors:
        prediction, by = "v_prediction", ["tensor v_pred"]
    for key in _PREDICTION_KEYS:
        said = _PREDICTIONS.get(header.metadata.get(key, "").lower(), "")
        if said and not prediction:
            prediction, by = said, [f"its {key}"]
    marked = "ztsnr" in header.tensors and prediction == "v_prediction"
    if marked and not overrides.zero_snr:
        by.append("tensor ztsnr")
    told = replace(overrides, prediction_type=prediction, zero_snr=overrides.zero_snr or marked)
    return _Told(told, tuple(by))


def _configs(base: Path, family: CheckpointFamily) -> dict[str, dict[str, Any]]:
    return {
        folder: read_json(base / folder / "config.json", limit=MAX_CONFIG_BYTES) for folder in family.folders
    }


def scheduler_in(base: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """A folder's ``scheduler_config.json``, with the class that reads it."""
    config = read_json(base / SCHEDULER_FILE, limit=MAX_CONFIG_BYTES)
    return {**config, "_class_name": scheduler_class(base, index, config)}


def _guidance(header: Header) -> dict[str, Any]:
    """Of a U-Net that is told its guidance scale: the width of what it is told."""
    shape = header.shape(TOLD)
    return {"time_cond_proj_dim": shape[1]} if len(shape) == 2 else {}


def _latents(header: Header) -> dict[str, Any]:
    """Mean and standard deviation of the latents, which some files hold as tensors."""
    keys = {"latents_mean": "edm_mean", "latents_std": "edm_std"}
    if not all(name in header.tensors for name in keys.values()):
        return {}
    return {key: _numbers(header, name) for key, name in keys.items()}


def _sigmas(header: Header) -> dict[str, Any]:
    """The ends of the noise levels, which CosXL holds as tensors."""
    keys = {"sigma_min": "edm_vpred.sigma_min", "sigma_max": "edm_vpred.sigma_max"}
    return {key: _numbers(header, name)[0] for key, name in keys.items() if name in header.tensors}


def _numbers(header: Header, name: str) -> list[float]:
    dtype, shape = header.tensors[name]
    if len(shape) > 4 or not all(0 < size <= 256 for size in shape) or dtype not in DTYPES:
        raise CheckpointError(
            f"{header.path}: the tensor {name} is {dtype} of the shape {list(shape)}: a few floating point "
            "numbers are wanted"
        )
    ((_, tensor),) = load_tensors(header, [name], meta=False)
    # As they were meant: 0.002 was rounded to fp32 or fp16 when it was saved.
    return [float(f"{number:.6g}") for number in tensor.double().flatten().tolist()]


def _line(header: Header, words: str, scheduler: Mapping[str, Any], told: _Told) -> str:
    return ", ".join(_phrases(header, words, scheduler, told))


def _phrases(header: Header, words: str, scheduler: Mapping[str, Any], told: _Told) -> Iterator[str]:
    yield f"{header.path.name} is {words}"
    by = f" ({', '.join(told.by)})" if told.by else ""
    yield f"predicts {scheduler.get('prediction_type', 'epsilon')}{by}"
    if scheduler.get("rescale_betas_zero_snr"):
        yield "zero terminal SNR"
    yield f"scheduled by {scheduler['_class_name']}"
    unet = [name for name in header.tensors if name.startswith(UNET)]
    dtype = header.dtype_of(unet)
    yield f"fp8 ({dtype}), widened to fp16" if dtype in FP8 else DTYPES.get(dtype, dtype)
    if any(name.startswith(EMA) for name in header.tensors):
        yield "its EMA copies left out"
