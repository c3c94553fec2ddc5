"""The manifest as JSON: written, and read with every field and type checked.

Another ``format_version`` is refused rather than guessed at.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Final

from sdrt.runtime.bundle.families.record import (
    DYNAMIC_AXES,
    Family,
    Precision,
    TensorSpec,
)
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.bundle.json_records import JsonReader, plain
from sdrt.runtime.bundle.limits import MAX_AXIS, MAX_FILES
from sdrt.runtime.bundle.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_NAME,
    Component,
    Facts,
    FileEntry,
    Manifest,
)
from sdrt.runtime.bundle.manifest_rules import check_file, check_rules
from sdrt.runtime.errors import BundleError

_READER: Final = JsonReader(MANIFEST_NAME, "export the bundle again")


@dataclass(frozen=True, slots=True)
class ComponentRecord:
    """One exported component as the manifest has it.

    Attributes:
        model: Path of its graph, one of the files.
        files: All that the graph consists of.
        precision: Of the graph.
        inputs: In the graph's order, with the checkpoint's sizes filled in.
        outputs: In the graph's order, with the checkpoint's sizes filled in.
    """

    model: str
    files: tuple[FileEntry, ...]
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestRecord(Facts):
    """``manifest.json`` as it stands, but for ``format`` and ``format_version``."""

    components: dict[str, ComponentRecord]


def to_json(manifest: Manifest) -> str:
    """The manifest as JSON text, two spaces deep, keys in the order of the dataclasses."""
    parts = {
        name: ComponentRecord(part.model, part.files, part.precision, part.spec.inputs, part.spec.outputs)
        for name, part in manifest.components.items()
    }
    record = ManifestRecord(components=parts, **_facts(manifest))
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **plain(record)}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def from_json(text: str | bytes) -> Manifest:
    """Parse and check a manifest.

    Raises:
        BundleError: Not a manifest, of another format, a field missing or of a wrong type, a path that
            leaves the bundle, a component that is not in the table, or beyond `sdrt.runtime.bundle.limits`.
    """
    record = _READER.read(ManifestRecord, _READER.document(text, FORMAT, FORMAT_VERSION))
    for entry in _files(record):
        check_file(entry, MANIFEST_NAME)
    family = _family(record.family)
    parts = {name: _component(name, part, family) for name, part in record.components.items()}
    missing = [name for name in family.required if name not in parts]
    if missing:
        raise BundleError(f"{MANIFEST_NAME} lacks the component {', '.join(missing)}")
    manifest = Manifest(components=parts, **_facts(record))
    check_rules(manifest)
    return manifest


def _facts(facts: Facts) -> dict[str, Any]:
    return {entry.name: getattr(facts, entry.name) for entry in fields(Facts)}


def _files(record: ManifestRecord) -> Iterator[FileEntry]:
    for part in record.components.values():
        yield from part.files
    yield from (facts.file for facts in record.tokenizers)
    yield record.weights


def _family(family: str) -> Family:
    """The family's record, if this version knows it: what else stands in the manifest depends on it."""
    if family not in FAMILIES:
        raise BundleError(
            f"the bundle is of the family {family[:40]!r}, this sdrt draws {', '.join(FAMILIES)}: "
            "upgrade sdrt"
        )
    return FAMILIES[family]


def _component(name: str, part: ComponentRecord, family: Family) -> Component:
    if name not in family.components:
        raise BundleError(f"{MANIFEST_NAME} names an unknown component {name[:40]!r}")
    table = family.components[name]
    named = {spec.name for spec in part.inputs}
    wanted = tuple(spec for spec in table.inputs if spec.name in named or spec.name not in table.optional)
    _check_tensors(f"the inputs of {name}", part.inputs, wanted, part.precision)
    _check_tensors(f"the outputs of {name}", part.outputs, table.outputs, part.precision)
    if len(part.files) > MAX_FILES:
        raise BundleError(f"{MANIFEST_NAME}: {name} has {len(part.files)} files, the limit is {MAX_FILES}")
    if part.model not in {entry.path for entry in part.files}:
        raise BundleError(f"component {name}: its model {part.model[:100]!r} is not among its files")
    return Component(part.model, part.files, part.precision, table.with_tensors(part.inputs, part.outputs))


def _check_tensors(
    where: str, specs: tuple[TensorSpec, ...], table: tuple[TensorSpec, ...], precision: Precision
) -> None:
    """Refuse inputs or outputs that are not those of the components table with sizes filled in."""
    if [spec.name for spec in specs] != [want.name for want in table]:
        raise BundleError(f"{MANIFEST_NAME}: {where} are not {', '.join(want.name for want in table)}")
    for spec, want in zip(specs, table, strict=True):
        fits = len(spec.shape) == len(want.shape) and all(map(_axis_fits, want.shape, spec.shape))
        if not fits or spec.dtype != want.resolved_dtype(precision):
            given = f"{spec.dtype}{list(spec.shape)}"[:100]
            raise BundleError(f"{MANIFEST_NAME}: {where}: {spec.name} is {given}")


def _axis_fits(want: int | str, given: int | str) -> bool:
    if want in DYNAMIC_AXES:
        return given == want
    return isinstance(given, int) and 0 < given <= MAX_AXIS and (given == want or isinstance(want, str))
