"""The manifest: everything a program must know to draw from a bundle, as data.

``manifest.json`` is the only file that is found by name; every other file is named in it with its size
and SHA-256. A newer ``format_version`` is refused rather than guessed at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import PurePosixPath
from typing import Any, Final, TypeVar, get_type_hints

from sdrt.runtime.components import (
    COMPONENTS,
    DYNAMIC_AXES,
    PRECISIONS,
    ComponentSpec,
    Precision,
    TensorSpec,
)
from sdrt.runtime.errors import BundleError
from sdrt.runtime.schedule import NoiseSchedule
from sdrt.runtime.solvers import SAMPLERS

FORMAT: Final = "sdrt-bundle"
FORMAT_VERSION: Final = 1
MANIFEST_NAME: Final = "manifest.json"
FAMILIES: Final = ("sd",)  # Stable Diffusion 1.x and 2.x
# Without one of these nothing can be drawn; the encoder is for image-to-image alone.
REQUIRED_COMPONENTS: Final = ("text_encoder", "unet", "vae_decoder")

_Record = TypeVar("_Record")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the bundle: path relative to it with ``/``, size in bytes, SHA-256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Component:
    """One exported component: its graph, all of its files, its precision, and what goes in and out."""

    model: str
    files: tuple[FileEntry, ...]
    precision: Precision
    spec: ComponentSpec


@dataclass(frozen=True, slots=True)
class LatentGeometry:
    """Latents have ``channels`` channels and are ``factor`` times smaller than the image per side."""

    channels: int
    factor: int


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """The tokenizer's file and what the file does not say: length, and the three special ids."""

    file: FileEntry
    max_length: int
    bos: int
    eos: int
    pad: int


@dataclass(frozen=True, slots=True)
class SizeLimit:
    """Sizes of one side in pixels that the graphs admit: ``minimum … maximum`` in steps of ``multiple``."""

    minimum: int
    maximum: int
    multiple: int

    def admits(self, size: int) -> bool:
        """Whether ``size`` pixels may be asked for."""
        return self.minimum <= size <= self.maximum and size % self.multiple == 0

    def __str__(self) -> str:
        if self.minimum == self.maximum:
            return f"{self.minimum}"
        return f"multiples of {self.multiple} from {self.minimum} to {self.maximum}"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may ask of the graphs; more images than ``max_batch`` are drawn in several batches."""

    min_batch: int
    max_batch: int
    height: SizeLimit
    width: SizeLimit


@dataclass(frozen=True, slots=True)
class Defaults:
    """What `sd-run` uses for an option that was not given."""

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The parsed manifest. ``text_output`` names the text encoder's output that the U-Net was trained on."""

    family: str
    components: Mapping[str, Component]
    latents: LatentGeometry
    schedule: NoiseSchedule
    tokenizer: TokenizerFacts
    text_output: str
    defaults: Defaults
    limits: Limits
    provenance: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)

    def files(self) -> tuple[FileEntry, ...]:
        """Every file of the bundle except the manifest itself."""
        entries = [entry for part in self.components.values() for entry in part.files]
        return (*entries, self.tokenizer.file)


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
    document["tokenizer"] = asdict(manifest.tokenizer)
    document["text_output"] = manifest.text_output
    document["defaults"] = asdict(manifest.defaults)
    document["limits"] = asdict(manifest.limits)
    document["provenance"] = dict(manifest.provenance)
    document["parity"] = dict(manifest.parity)
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def from_json(text: str) -> Manifest:
    """Parse and check a manifest.

    Raises:
        BundleError: Not a manifest, of a newer format, a field missing or of a wrong type, a path that
            leaves the bundle, or a component that is not in the table.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{MANIFEST_NAME} is not valid JSON ({error}); export it again") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BundleError(f'{MANIFEST_NAME} does not say "format": "{FORMAT}": this is no bundle')
    version = document.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"{MANIFEST_NAME}: format_version is {version!r}, not a positive number")
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
    _check_whole(manifest)
    return manifest


def _manifest(document: Mapping[str, Any]) -> Manifest:
    parts = {name: _component(name, part) for name, part in document["components"].items()}
    missing = [name for name in REQUIRED_COMPONENTS if name not in parts]
    if missing:
        raise BundleError(f"{MANIFEST_NAME} lacks the component {', '.join(missing)}")
    return Manifest(
        family=_value(str, document["family"], "family"),
        components=parts,
        latents=_value(LatentGeometry, document["latents"], "latents"),
        schedule=NoiseSchedule.from_dict(_value(dict, document["schedule"], "schedule")),
        tokenizer=_value(TokenizerFacts, document["tokenizer"], "tokenizer"),
        text_output=_value(str, document["text_output"], "text_output"),
        defaults=_value(Defaults, document["defaults"], "defaults"),
        limits=_value(Limits, document["limits"], "limits"),
        provenance=_value(dict, document.get("provenance", {}), "provenance"),
        parity=_value(dict, document.get("parity", {}), "parity"),
    )


def _value(kind: type[_Record], value: Any, where: str) -> _Record:
    """A value from JSON as ``kind``: a dataclass from an object with just its fields, else as it stands."""
    if is_dataclass(kind):
        fields = get_type_hints(kind)
        given = _value(dict, value, where)
        if unknown := sorted(set(given) - set(fields)):
            raise BundleError(f"{MANIFEST_NAME}: {where} has the unknown field {', '.join(unknown)}")
        record = kind(**{name: _value(hint, given[name], f"{where}.{name}") for name, hint in fields.items()})
        if isinstance(record, FileEntry):
            _check_path(record.path)
        return record
    # In JSON 7 is a number like 7.5; Python's bool is an int, JSON's is not.
    allowed = (int, float) if kind is float else kind
    fits = isinstance(value, allowed) and not isinstance(value, bool)
    if not fits or (kind is float and not math.isfinite(value)):
        raise BundleError(f"{MANIFEST_NAME}: {where} is {str(value)[:40]!r}, not {_KINDS[kind]}")
    checked: _Record = value
    return checked


_KINDS: Final = {int: "a whole number", float: "a finite number", str: "a text", dict: "an object"}


def _component(name: str, part: Mapping[str, Any]) -> Component:
    if name not in COMPONENTS:
        raise BundleError(f"{MANIFEST_NAME} names an unknown component {name!r}")
    precision = part["precision"]
    if precision not in PRECISIONS:
        raise BundleError(f"component {name} has the unknown precision {precision!r}")
    table = COMPONENTS[name]
    spec = ComponentSpec(
        name,
        _tensors(f"the inputs of {name}", part["inputs"], table.inputs, precision),
        _tensors(f"the outputs of {name}", part["outputs"], table.outputs, precision),
    )
    files = tuple(_value(FileEntry, entry, f"a file of {name}") for entry in part["files"])
    if part["model"] not in {entry.path for entry in files}:
        raise BundleError(f"component {name}: its model {part['model']!r} is not among its files")
    return Component(part["model"], files, precision, spec)


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
            raise BundleError(f"{MANIFEST_NAME}: {where}: {spec.name} is {spec.dtype}{list(spec.shape)}")
    return specs


def _axis_fits(want: int | str, given: object) -> bool:
    if given == want and isinstance(want, str):
        return want in DYNAMIC_AXES
    return type(given) is int and given > 0 and (given == want or isinstance(want, str))


def _check_path(path: str) -> None:
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or not path.isprintable():
        raise BundleError(f"{MANIFEST_NAME} names {path!r}, which lies outside the bundle: refused")


def _check_whole(manifest: Manifest) -> None:
    """Refuse a family that this version does not know, and numbers that make no sense, alone or together."""
    if manifest.family not in FAMILIES:
        raise BundleError(
            f"the bundle is of the family {manifest.family!r}, this sdrt draws {', '.join(FAMILIES)}: "
            "upgrade sdrt"
        )
    limits, defaults, factor = manifest.limits, manifest.defaults, manifest.latents.factor
    parts = manifest.components
    texts = {spec.name: spec.shape[1:] for spec in parts["text_encoder"].spec.outputs}
    positions = parts["text_encoder"].spec.inputs[0].shape[1]
    sample, _, embeddings = parts["unet"].spec.inputs
    latents = (sample, *parts["unet"].spec.outputs, *parts["vae_decoder"].spec.inputs)
    sides = (limits.height, limits.width)
    rules = {
        "latents: channels and factor are at least 1": min(factor, manifest.latents.channels) >= 1,
        "limits: 1 ≤ min_batch ≤ max_batch": 1 <= limits.min_batch <= limits.max_batch,
        "limits: 1 ≤ minimum ≤ maximum, and multiple is at least 1": all(
            1 <= side.minimum <= side.maximum and side.multiple >= 1 for side in sides
        ),
        "limits: all sizes are multiples of the factor": all(
            (side.minimum if side.minimum == side.maximum else side.multiple) % max(factor, 1) == 0
            for side in sides
        ),
        "defaults: 1 to num_train_timesteps steps": (
            1 <= defaults.num_inference_steps <= manifest.schedule.num_train_timesteps
        ),
        "defaults: guidance_scale is not negative": defaults.guidance_scale >= 0,
        "defaults: a known sampler": defaults.sampler in SAMPLERS,
        "text_output is an output of the text encoder": manifest.text_output in texts,
        "the text encoder's output fits the unet": texts.get(manifest.text_output) == embeddings.shape[1:],
        "the tokenizer's max_length fits the text encoder and the unet": (
            positions == embeddings.shape[1] == manifest.tokenizer.max_length
        ),
        "the unet and the vae_decoder have the latents' channels": all(
            spec.shape[1] == manifest.latents.channels for spec in latents
        ),
    }
    for rule, holds in rules.items():
        if not holds:
            raise BundleError(f"{MANIFEST_NAME} breaks a rule: {rule}; export the bundle again")
    for name, side, size in zip(("height", "width"), sides, (defaults.height, defaults.width), strict=True):
        if not side.admits(size):
            raise BundleError(f"{MANIFEST_NAME}: the default {name} is {size}, the limits are {side}")
