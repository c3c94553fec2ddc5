"""The manifest as JSON: written, and read with every field and type checked.

A newer ``format_version`` is refused rather than guessed at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, is_dataclass, replace
from dataclasses import fields as dataclass_fields
from functools import cache
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints

from sdrt.runtime.bundle.families.record import (
    DYNAMIC_AXES,
    PRECISIONS,
    ComponentSpec,
    Family,
    Precision,
    TensorSpec,
)
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.bundle.limits import MAX_AXIS, MAX_FILES
from sdrt.runtime.bundle.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_NAME,
    Component,
    Defaults,
    FileEntry,
    ImageProcessorFacts,
    LatentGeometry,
    Limits,
    Manifest,
    Preview,
    TokenizerFacts,
)
from sdrt.runtime.bundle.manifest_rules import check_file, check_rules
from sdrt.runtime.errors import BundleError
from sdrt.runtime.samplers.schedule import NoiseSchedule
from sdrt.runtime.samplers.table import SamplerOptions
from sdrt.runtime.system.untrusted import parse_json

_Record = TypeVar("_Record")


def to_json(manifest: Manifest) -> str:
    """The manifest as JSON text, two spaces deep, keys in the order of the dataclasses."""
    document: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION}
    document["family"] = manifest.family
    document["components"] = {
        name: {
            "model": part.model,
            "files": [asdict(entry) for entry in part.files],
            "precision": part.precision,
            "inputs": [asdict(spec) for spec in part.spec.inputs],
            "outputs": [asdict(spec) for spec in part.spec.outputs],
        }
        for name, part in manifest.components.items()
    }
    document["latents"] = asdict(manifest.latents)
    document["schedule"] = manifest.schedule.to_dict()
    family = manifest.record
    for name, facts in zip(family.tokenizers, manifest.tokenizers, strict=True):
        document[name] = asdict(facts)
    if family.reads_text:
        document["text_output"] = manifest.text_output
    if family.zeros_for_no_text:
        document["force_zeros_for_empty_prompt"] = manifest.force_zeros_for_empty_prompt
    if manifest.image_processor is not None:
        document["image_processor"] = asdict(manifest.image_processor)
    if manifest.preview is not None:
        document["preview"] = asdict(manifest.preview)
    document["defaults"] = asdict(manifest.defaults) | {
        "sampler_options": manifest.defaults.sampler_options.to_dict()
    }
    if not document["defaults"]["sampler_options"]:
        del document["defaults"]["sampler_options"]
    document["limits"] = asdict(manifest.limits)
    document["provenance"] = dict(manifest.provenance)
    document["parity"] = dict(manifest.parity)
    document["ranges"] = dict(manifest.ranges)
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def from_json(text: str | bytes) -> Manifest:
    """Parse and check a manifest.

    Raises:
        BundleError: Not a manifest, of a newer format, a field missing or of a wrong type, a path that
            leaves the bundle, a component that is not in the table, or beyond `sdrt.runtime.bundle.limits`.
    """
    try:
        document = parse_json(text)
    except ValueError as error:
        raise BundleError(f"{MANIFEST_NAME} is not valid JSON ({error}); export it again") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BundleError(f'{MANIFEST_NAME} does not say "format": "{FORMAT}": this is no bundle')
    version = document.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"{MANIFEST_NAME}: format_version is {repr(version)[:40]}, not a positive number")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"the bundle has format version {version}, this sdrt reads up to {FORMAT_VERSION}: "
            "upgrade sdrt, or export the bundle again with this version"
        )
    try:
        manifest = _manifest(document)
    except KeyError as error:
        raise BundleError(f"{MANIFEST_NAME} lacks the field {error}; export the bundle again") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BundleError(f"{MANIFEST_NAME} is malformed ({error}); export the bundle again") from None
    check_rules(manifest)
    return manifest


def _manifest(document: Mapping[str, Any]) -> Manifest:
    family = _family(document)
    parts = {name: _component(name, part, family) for name, part in document["components"].items()}
    missing = [name for name in family.required if name not in parts]
    if missing:
        raise BundleError(f"{MANIFEST_NAME} lacks the component {', '.join(missing)}")
    reads_text = family.reads_text
    return Manifest(
        family=family.name,
        components=parts,
        latents=_value(LatentGeometry, document["latents"], "latents"),
        schedule=NoiseSchedule.from_dict(_value(dict, document["schedule"], "schedule")),
        tokenizers=tuple(_value(TokenizerFacts, document[name], name) for name in family.tokenizers),
        text_output=_value(str, document["text_output"], "text_output") if reads_text else "",
        defaults=_defaults(_value(dict, document["defaults"], "defaults")),
        limits=_value(Limits, document["limits"], "limits"),
        provenance=_value(dict, document.get("provenance", {}), "provenance"),
        parity=_value(dict, document.get("parity", {}), "parity"),
        force_zeros_for_empty_prompt=(
            family.zeros_for_no_text and _flag(document, "force_zeros_for_empty_prompt")
        ),
        ranges=_value(dict, document.get("ranges", {}), "ranges"),
        image_processor=(
            None
            if reads_text
            else _value(ImageProcessorFacts, document["image_processor"], "image_processor")
        ),
        preview=_value(Preview, document["preview"], "preview") if "preview" in document else None,
    )


def _family(document: Mapping[str, Any]) -> Family:
    """The family's record, if this version knows it: what else stands in the manifest depends on it."""
    family = _value(str, document["family"], "family")
    if family not in FAMILIES:
        raise BundleError(
            f"the bundle is of the family {family[:40]!r}, this sdrt draws {', '.join(FAMILIES)}: "
            "upgrade sdrt"
        )
    return FAMILIES[family]


def _defaults(given: Mapping[str, Any]) -> Defaults:
    """Defaults, whose sampler options check themselves."""
    numbers = {name: value for name, value in given.items() if name != "sampler_options"}
    options = SamplerOptions.from_dict(given.get("sampler_options", {}))
    return replace(_value(Defaults, numbers, "defaults"), sampler_options=options)


def _flag(document: Mapping[str, Any], name: str) -> bool:
    value = document[name]
    if not isinstance(value, bool):
        raise BundleError(f"{MANIFEST_NAME}: {name} is {str(value)[:40]!r}, not true or false")
    return value


def _value(kind: type[_Record], value: Any, where: str) -> _Record:
    """A value from JSON as ``kind``: a dataclass from an object with just its fields, else as it stands."""
    if is_dataclass(kind):
        known: Any = kind  # hashable, which type checkers do not see
        fields = _fields(known)
        given = _value(dict, value, where)
        if unknown := sorted(set(given) - set(fields)):
            raise BundleError(f"{MANIFEST_NAME}: {where} has the unknown field {_shown(unknown)}")
        optional = {entry.name for entry in dataclass_fields(kind) if entry.default is not MISSING}
        record = kind(
            **{
                name: _value(hint, given[name], f"{where}.{name}")
                for name, hint in fields.items()
                if name in given or name not in optional
            }
        )
        if isinstance(record, FileEntry):
            check_file(record, MANIFEST_NAME)
        return record
    if get_origin(kind) is tuple:
        entries: _Record = _tuple(get_args(kind), value, where)
        return entries
    # In JSON 7 is a number like 7.5; Python's bool is an int, JSON's is not.
    allowed = (int, float) if kind is float else kind
    fits = isinstance(value, allowed) and not isinstance(value, bool)
    if not fits or (kind is float and not math.isfinite(value)):
        raise BundleError(f"{MANIFEST_NAME}: {where} is {str(value)[:40]!r}, not {_KINDS[kind]}")
    checked: _Record = value
    return checked


@cache
def _fields(kind: Any) -> dict[str, Any]:
    """Field → type of a dataclass."""
    return get_type_hints(kind)


def _tuple(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """A list from JSON as a tuple: of any length for ``(kind, ...)``, else of just these kinds."""
    given = _value(list, value, where)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(given)
    if len(given) != len(kinds):
        raise BundleError(f"{MANIFEST_NAME}: {where} has {len(given)} entries, not {len(kinds)}")
    pairs = enumerate(zip(kinds, given, strict=True))
    return tuple(_value(kind, entry, f"{where}[{index}]") for index, (kind, entry) in pairs)


_KINDS: Final = {
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    dict: "an object",
    list: "a list",
}


def _shown(names: Sequence[str]) -> str:
    """Names as anybody may have written them, fit for a line."""
    return ", ".join(map(repr, names))[:100]


def _component(name: str, part: Mapping[str, Any], family: Family) -> Component:
    if name not in family.components:
        raise BundleError(f"{MANIFEST_NAME} names an unknown component {name[:40]!r}")
    precision = part["precision"]
    if precision not in PRECISIONS:
        raise BundleError(f"component {name} has the unknown precision {str(precision)[:40]!r}")
    table = family.components[name]
    spec = table.with_tensors(
        _tensors(f"the inputs of {name}", part["inputs"], _without_absent(table, part["inputs"]), precision),
        _tensors(f"the outputs of {name}", part["outputs"], table.outputs, precision),
    )
    listed = _value(list, part["files"], f"the files of {name}")
    if len(listed) > MAX_FILES:
        raise BundleError(f"{MANIFEST_NAME}: {name} has {len(listed)} files, the limit is {MAX_FILES}")
    files = tuple(_value(FileEntry, entry, f"a file of {name}") for entry in listed)
    if part["model"] not in {entry.path for entry in files}:
        raise BundleError(f"component {name}: its model {str(part['model'])[:100]!r} is not among its files")
    return Component(part["model"], files, precision, spec)


def _without_absent(table: ComponentSpec, entries: Any) -> tuple[TensorSpec, ...]:
    """The table's inputs, but for optional ones that the manifest does not name."""
    named = {entry["name"] for entry in entries}
    return tuple(spec for spec in table.inputs if spec.name in named or spec.name not in table.optional)


def _tensors(
    where: str, entries: Any, table: tuple[TensorSpec, ...], precision: Precision
) -> tuple[TensorSpec, ...]:
    """Inputs or outputs as recorded, if they are those of the components table with sizes filled in."""
    specs = tuple(
        TensorSpec(entry["name"], entry["dtype"], tuple(entry["shape"]), str(entry.get("about", "")))
        for entry in entries
    )
    if [spec.name for spec in specs] != [want.name for want in table]:
        raise BundleError(f"{MANIFEST_NAME}: {where} are not {', '.join(want.name for want in table)}")
    for spec, want in zip(specs, table, strict=True):
        fits = len(spec.shape) == len(want.shape) and all(map(_axis_fits, want.shape, spec.shape))
        if not fits or spec.dtype != want.resolved_dtype(precision):
            given = f"{spec.dtype}{list(spec.shape)}"[:100]
            raise BundleError(f"{MANIFEST_NAME}: {where}: {spec.name} is {given}")
    return specs


def _axis_fits(want: int | str, given: object) -> bool:
    if want in DYNAMIC_AXES and given == want:
        return True
    if want in DYNAMIC_AXES and want != "context":  # which was a number before format version 3
        return False
    return type(given) is int and 0 < given <= MAX_AXIS and (given == want or isinstance(want, str))
