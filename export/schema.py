"""The JSON Schema of a bundle's manifest, made of the dataclasses that the runtime reads it with.

``make schema`` writes ``docs/manifest.schema.json``. What a type says stands in the dataclass, what a field
means in its docstring; here is only what neither says: patterns, smallest numbers, names to choose from.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import types
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from sdrt.runtime.bundle import limits
from sdrt.runtime.bundle.families.record import Family, TensorSpec
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.bundle.manifest import (
    FORMAT,
    FORMAT_VERSION,
    Defaults,
    FileEntry,
    LatentGeometry,
    Limits,
    NoisingFacts,
    SizeLimit,
    TokenizerFacts,
)
from sdrt.runtime.bundle.manifest_json import ManifestRecord
from sdrt.runtime.bundle.weight_map import PASSES, Holder, WeightMap
from sdrt.runtime.samplers.edm import EDM_SIGMA_SCHEDULES, EdmScaling
from sdrt.runtime.samplers.schedule import (
    BETA_SCHEDULES,
    MAX_TRAIN_TIMESTEPS,
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    NoiseSchedule,
)
from sdrt.runtime.samplers.table import CHECKPOINT_OPTIONS, SamplerOptions

PATH: Final = Path("docs/manifest.schema.json")
Schema = dict[str, Any]

_NAMES: Final = {int: "integer", float: "number", str: "string", bool: "boolean"}
_PRECISIONS: Final = {"enum": ["int64", "float32", "float16", "bfloat16"]}
# What a class leaves out of its object where there is nothing to say.
_OPTIONAL: Final[Mapping[Any, frozenset[str]]] = {
    ManifestRecord: frozenset({"noising"}),
    NoiseSchedule: frozenset(
        {
            *("beta_start", "beta_end", "beta_schedule"),  # of a model with edm
            *("timestep_spacing", "set_alpha_to_one", "trained_betas", "rescale_betas_zero_snr", "edm"),
        }
    ),
    SamplerOptions: frozenset(CHECKPOINT_OPTIONS),
}


def _numbers(least: float, most: float | None = None) -> Schema:
    return {"minimum": least} | ({} if most is None else {"maximum": most})


# Class and field → what its type does not say.
_MORE: Final[Mapping[tuple[Any, str], Schema]] = {
    (FileEntry, "path"): {"pattern": r"^(?!/)(?!(.*/)?\.\.(/|$))[^\\\u0000-\u001f]+$"},
    (FileEntry, "size"): _numbers(0, limits.MAX_FILE_BYTES),
    (FileEntry, "sha256"): {"pattern": "^[0-9a-f]{64}$"},
    (TensorSpec, "dtype"): _PRECISIONS,
    (LatentGeometry, "channels"): _numbers(1, limits.MAX_CHANNELS),
    (LatentGeometry, "factor"): _numbers(1, limits.MAX_FACTOR),
    (TokenizerFacts, "max_length"): _numbers(2, limits.MAX_TOKENS),
    (SizeLimit, "minimum"): _numbers(1, limits.MAX_SIDE),
    (SizeLimit, "maximum"): _numbers(1, limits.MAX_SIDE),
    (SizeLimit, "multiple"): _numbers(1),
    (Limits, "min_batch"): _numbers(1, limits.MAX_BATCH),
    (Limits, "max_batch"): _numbers(1, limits.MAX_BATCH),
    (Limits, "max_chunks"): _numbers(1, limits.MAX_CHUNKS),
    (Limits, "max_clip_skip"): _numbers(0, limits.MAX_CLIP_SKIP),
    (NoisingFacts, "max_level"): _numbers(0),
    (Defaults, "num_inference_steps"): _numbers(1),
    (Defaults, "guidance_scale"): _numbers(0),
    (ManifestRecord, "family"): {"enum": list(FAMILIES)},
    (NoiseSchedule, "beta_schedule"): {"enum": list(BETA_SCHEDULES)},
    (NoiseSchedule, "num_train_timesteps"): _numbers(2, MAX_TRAIN_TIMESTEPS),
    (NoiseSchedule, "prediction_type"): {"enum": list(PREDICTION_TYPES)},
    (NoiseSchedule, "timestep_spacing"): {"enum": list(TIMESTEP_SPACINGS)},
    (NoiseSchedule, "steps_offset"): _numbers(0),
    (EdmScaling, "sigma_schedule"): {"enum": list(EDM_SIGMA_SCHEDULES)},
    (Holder, "passes"): {"items": {"enum": list(PASSES)}},
}


def manifest_schema() -> Schema:
    """The schema as plain data; the weight map's is its ``$defs/WeightMap``."""
    found: dict[str, Schema] = {}
    _record(WeightMap, found)
    name = _record(ManifestRecord, found)["$ref"].rpartition("/")[2]
    manifest = found.pop(name)
    head = {"format": {"const": FORMAT}, "format_version": {"const": FORMAT_VERSION}}
    manifest["properties"] = head | manifest["properties"]
    manifest["required"] = [*head, *manifest["required"]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "manifest.json of an sdrt bundle",
        **manifest,
        "allOf": [_family(family) for family in FAMILIES.values()],
        "$defs": dict(sorted(found.items())),
    }


def _family(family: Family) -> Schema:
    """Which components a family has and needs, and how many tokenizers."""
    components = {
        "required": list(family.required),
        "propertyNames": {"enum": list(family.components)},
    }
    tokenizers = {"minItems": len(family.tokenizers), "maxItems": len(family.tokenizers)}
    return {
        "if": {"properties": {"family": {"const": family.name}}, "required": ["family"]},
        "then": {"properties": {"components": components, "tokenizers": tokenizers}},
    }


def _record(kind: Any, found: dict[str, Schema]) -> Schema:
    """A reference to a dataclass, whose own schema goes into ``found``."""
    name = kind.__name__
    if name not in found:
        found[name] = {}  # there while its fields are gone through
        hints, about = get_type_hints(kind), _about_fields(kind)
        names = [entry.name for entry in fields(kind)]
        if kind is SamplerOptions:
            names = list(CHECKPOINT_OPTIONS)
        optional = _OPTIONAL.get(kind, frozenset())
        properties = {}
        for field in names:
            schema = _type(hints[field], found, nullable=field not in optional)
            properties[field] = schema | _MORE.get((kind, field), {})
            if field in about:
                properties[field]["description"] = about[field]
        found[name] = {
            "description": _plain(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0]),
            "type": "object",
            "properties": properties,
            "required": [field for field in names if field not in optional],
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{name}"}


def _about_fields(kind: Any) -> dict[str, str]:
    """What a class's docstring, or that of one it extends, says of each field under ``Attributes``."""
    about: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
        for name, words in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE):
            about[name] = _plain(words)
    return about


def _plain(words: str) -> str:
    """A docstring's words for readers of JSON."""
    return re.sub(r"\bNone\b", "null", " ".join(words.split()).replace("``", "`"))


def _type(kind: Any, found: dict[str, Schema], *, nullable: bool = True) -> Schema:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if origin in (Union, types.UnionType):
        kinds = [inner for inner in arguments if inner is not type(None)]
        schemas = [_type(inner, found) for inner in kinds]
        if nullable and len(kinds) < len(arguments):
            schemas.append({"type": "null"})
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": _type(arguments[0], found)}
    if origin is tuple:
        items = [_type(inner, found) for inner in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin in (dict, Mapping):
        inner = _type(arguments[1], found)
        return {"type": "object"} | ({"additionalProperties": inner} if inner else {})
    return {"type": _NAMES[kind]} if kind in _NAMES else _record(kind, found)


def schema_text() -> str:
    """The schema as the text of its file."""
    return json.dumps(manifest_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PATH
    target.write_text(schema_text(), encoding="utf-8")
