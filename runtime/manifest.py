"""The manifest: everything a program must know to draw from a bundle, as data.

``manifest.json`` is the only file that is found by name; every other file is named in it with its size
and SHA-256. A newer ``format_version`` is refused rather than guessed at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any, Final

from sdrt.runtime.components import COMPONENTS, PRECISIONS, ComponentSpec, Precision, TensorSpec
from sdrt.runtime.errors import BundleError
from sdrt.runtime.schedule import NoiseSchedule

FORMAT: Final = "sdrt-bundle"
FORMAT_VERSION: Final = 1
MANIFEST_NAME: Final = "manifest.json"
# Without one of these nothing can be drawn; the encoder is for image-to-image alone.
REQUIRED_COMPONENTS: Final = ("text_encoder", "unet", "vae_decoder")


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
    except ValueError as error:
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
        return _manifest(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise BundleError(f"{MANIFEST_NAME} is incomplete or malformed ({what})") from None


def _manifest(document: Mapping[str, Any]) -> Manifest:
    parts = {name: _component(name, part) for name, part in document["components"].items()}
    missing = [name for name in REQUIRED_COMPONENTS if name not in parts]
    if missing:
        raise BundleError(f"{MANIFEST_NAME} lacks the component {', '.join(missing)}")
    limits = document["limits"]
    tokenizer = document["tokenizer"]
    return Manifest(
        family=str(document["family"]),
        components=parts,
        latents=LatentGeometry(**document["latents"]),
        schedule=NoiseSchedule.from_dict(document["schedule"]),
        tokenizer=TokenizerFacts(**{**tokenizer, "file": _file(tokenizer["file"])}),
        text_output=str(document["text_output"]),
        defaults=Defaults(**document["defaults"]),
        limits=Limits(
            int(limits["min_batch"]),
            int(limits["max_batch"]),
            SizeLimit(**limits["height"]),
            SizeLimit(**limits["width"]),
        ),
        provenance=document.get("provenance", {}),
        parity=document.get("parity", {}),
    )


def _component(name: str, part: Mapping[str, Any]) -> Component:
    if name not in COMPONENTS:
        raise BundleError(f"{MANIFEST_NAME} names an unknown component {name!r}")
    if part["precision"] not in PRECISIONS:
        raise BundleError(f"component {name} has the unknown precision {part['precision']!r}")
    spec = ComponentSpec(
        name,
        tuple(_tensor(entry) for entry in part["inputs"]),
        tuple(_tensor(entry) for entry in part["outputs"]),
    )
    files = tuple(_file(entry) for entry in part["files"])
    if part["model"] not in {entry.path for entry in files}:
        raise BundleError(f"component {name}: its model {part['model']!r} is not among its files")
    return Component(part["model"], files, part["precision"], spec)


def _tensor(entry: Mapping[str, Any]) -> TensorSpec:
    about = str(entry.get("about", ""))
    return TensorSpec(str(entry["name"]), str(entry["dtype"]), tuple(entry["shape"]), about)


def _file(entry: Mapping[str, Any]) -> FileEntry:
    path = str(entry["path"])
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path:
        raise BundleError(f"{MANIFEST_NAME} names {path!r}, which lies outside the bundle: refused")
    return FileEntry(path, int(entry["size"]), str(entry["sha256"]))
