"""The manifest: everything a program must know to draw from a bundle, as data.

``manifest.json`` is the only file that is found by name; every other file is named in it with its size
and SHA-256. A newer ``format_version`` is refused rather than guessed at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, is_dataclass
from dataclasses import fields as dataclass_fields
from pathlib import PurePosixPath
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints

from sdrt.runtime.components import (
    DYNAMIC_AXES,
    FAMILIES,
    PRECISIONS,
    ComponentSpec,
    Precision,
    TensorSpec,
    components_of,
    required_components,
)
from sdrt.runtime.errors import BundleError
from sdrt.runtime.schedule import NoiseSchedule
from sdrt.runtime.solvers import SAMPLERS

FORMAT: Final = "sdrt-bundle"
# Version 2 added the family sdxl with `tokenizer_2` and `force_zeros_for_empty_prompt`, and `ranges`.
# Version 3 added the family image-variations with `image_processor`, `preview`, `limits.max_chunks`, and
# optional inputs.
FORMAT_VERSION: Final = 3
MANIFEST_NAME: Final = "manifest.json"

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
class ImageProcessorFacts:
    """How a CLIP image encoder wants its picture: ``size`` pixels a side, less ``mean``, over ``std``.

    The shorter side is brought to ``size`` with a bicubic filter, the middle is cut out, and mean and std are
    of RGB in [0, 1].
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Preview:
    """The affine map from latents to RGB in [-1, 1] that is nearest to the VAE decoder at the latents' size.

    ``rgb = latents · weights + bias``; ``weights`` has a row of three for each latent channel.
    """

    weights: tuple[tuple[float, ...], ...]
    bias: tuple[float, float, float]


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
    """What one call may ask of the graphs; more images than ``max_batch`` are drawn in several batches.

    A prompt may have ``max_chunks`` times the tokens that the text encoder reads at once. ``max_clip_skip``
    layers of the text encoders may be left out.
    """

    min_batch: int
    max_batch: int
    height: SizeLimit
    width: SizeLimit
    max_chunks: int = 1
    max_clip_skip: int = 0


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
    """The parsed manifest.

    Attributes:
        family: ``sd``, ``sdxl`` or ``image-variations``: which table of `sdrt.runtime.components` the
            components are of.
        components: By name.
        latents: Their geometry.
        schedule: The noise schedule the model was trained on.
        tokenizer: Of the (first) text encoder; None where there is none (image-variations).
        text_output: The text encoder's output that the U-Net was trained on; empty where there is none.
        defaults: Of a request.
        limits: Of a request.
        provenance: Where the bundle comes from.
        parity: What was compared with PyTorch, the figures, and what was left out.
        tokenizer_2: Of SDXL's second text encoder; None in other families.
        force_zeros_for_empty_prompt: Whether the embeddings of a negative prompt that was not given are
            zeros in place of the empty text's (SDXL base).
        ranges: Component → its range audit: the largest magnitudes on a calibration run of an fp16 graph.
        image_processor: Of the image encoder; None in families without one.
        preview: From latents to a small picture without the decoder; None in bundles before version 3.
    """

    family: str
    components: Mapping[str, Component]
    latents: LatentGeometry
    schedule: NoiseSchedule
    tokenizer: TokenizerFacts | None
    text_output: str
    defaults: Defaults
    limits: Limits
    provenance: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_2: TokenizerFacts | None = None
    force_zeros_for_empty_prompt: bool = False
    ranges: Mapping[str, Any] = field(default_factory=dict)
    image_processor: ImageProcessorFacts | None = None
    preview: Preview | None = None

    @property
    def required_components(self) -> tuple[str, ...]:
        """The components that a drawing needs."""
        return required_components(self.family)

    @property
    def tokenizers(self) -> tuple[TokenizerFacts, ...]:
        """The tokenizer, and the second one where there is one; none in a family without text."""
        return tuple(facts for facts in (self.tokenizer, self.tokenizer_2) if facts is not None)

    @property
    def tokens(self) -> int:
        """What the U-Net reads of one chunk of a prompt; 1, an embedding, in a family without text."""
        return 1 if self.tokenizer is None else self.tokenizer.max_length

    def files(self) -> tuple[FileEntry, ...]:
        """Every file of the bundle except the manifest itself."""
        entries = [entry for part in self.components.values() for entry in part.files]
        return (*entries, *(facts.file for facts in self.tokenizers))


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
    if manifest.tokenizer is not None:
        document["tokenizer"] = asdict(manifest.tokenizer)
        document["text_output"] = manifest.text_output
    if manifest.tokenizer_2 is not None:
        document["tokenizer_2"] = asdict(manifest.tokenizer_2)
        document["force_zeros_for_empty_prompt"] = manifest.force_zeros_for_empty_prompt
    if manifest.image_processor is not None:
        document["image_processor"] = asdict(manifest.image_processor)
    if manifest.preview is not None:
        document["preview"] = asdict(manifest.preview)
    document["defaults"] = asdict(manifest.defaults)
    document["limits"] = asdict(manifest.limits)
    document["provenance"] = dict(manifest.provenance)
    document["parity"] = dict(manifest.parity)
    document["ranges"] = dict(manifest.ranges)
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
    family = _family(document)
    table = components_of(family)
    parts = {name: _component(name, part, table) for name, part in document["components"].items()}
    missing = [name for name in required_components(family) if name not in parts]
    if missing:
        raise BundleError(f"{MANIFEST_NAME} lacks the component {', '.join(missing)}")
    reads_text = "text_encoder" in table
    first = document["tokenizer"] if reads_text else None
    second = document["tokenizer_2"] if family == "sdxl" else None
    return Manifest(
        family=family,
        components=parts,
        latents=_value(LatentGeometry, document["latents"], "latents"),
        schedule=NoiseSchedule.from_dict(_value(dict, document["schedule"], "schedule")),
        tokenizer=None if first is None else _value(TokenizerFacts, first, "tokenizer"),
        text_output=_value(str, document["text_output"], "text_output") if reads_text else "",
        defaults=_value(Defaults, document["defaults"], "defaults"),
        limits=_value(Limits, document["limits"], "limits"),
        provenance=_value(dict, document.get("provenance", {}), "provenance"),
        parity=_value(dict, document.get("parity", {}), "parity"),
        tokenizer_2=None if second is None else _value(TokenizerFacts, second, "tokenizer_2"),
        force_zeros_for_empty_prompt=family == "sdxl" and _flag(document, "force_zeros_for_empty_prompt"),
        ranges=_value(dict, document.get("ranges", {}), "ranges"),
        image_processor=(
            None
            if reads_text
            else _value(ImageProcessorFacts, document["image_processor"], "image_processor")
        ),
        preview=_value(Preview, document["preview"], "preview") if "preview" in document else None,
    )


def _family(document: Mapping[str, Any]) -> str:
    """The family, if this version knows it: what else stands in the manifest depends on it."""
    family = _value(str, document["family"], "family")
    if family not in FAMILIES:
        raise BundleError(
            f"the bundle is of the family {family!r}, this sdrt draws {', '.join(FAMILIES)}: upgrade sdrt"
        )
    return family


def _flag(document: Mapping[str, Any], name: str) -> bool:
    value = document[name]
    if not isinstance(value, bool):
        raise BundleError(f"{MANIFEST_NAME}: {name} is {str(value)[:40]!r}, not true or false")
    return value


def _value(kind: type[_Record], value: Any, where: str) -> _Record:
    """A value from JSON as ``kind``: a dataclass from an object with just its fields, else as it stands."""
    if is_dataclass(kind):
        fields = get_type_hints(kind)
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
            _check_path(record.path)
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


def _component(name: str, part: Mapping[str, Any], family: Mapping[str, ComponentSpec]) -> Component:
    if name not in family:
        raise BundleError(f"{MANIFEST_NAME} names an unknown component {name!r}")
    precision = part["precision"]
    if precision not in PRECISIONS:
        raise BundleError(f"component {name} has the unknown precision {precision!r}")
    table = family[name]
    spec = ComponentSpec(
        name,
        _tensors(f"the inputs of {name}", part["inputs"], _without_absent(table, part["inputs"]), precision),
        _tensors(f"the outputs of {name}", part["outputs"], table.outputs, precision),
    )
    files = tuple(_value(FileEntry, entry, f"a file of {name}") for entry in part["files"])
    if part["model"] not in {entry.path for entry in files}:
        raise BundleError(f"component {name}: its model {part['model']!r} is not among its files")
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
            raise BundleError(f"{MANIFEST_NAME}: {where}: {spec.name} is {spec.dtype}{list(spec.shape)}")
    return specs


def _axis_fits(want: int | str, given: object) -> bool:
    if want in DYNAMIC_AXES and given == want:
        return True
    if want in DYNAMIC_AXES and want != "context":  # which was a number before format version 3
        return False
    return type(given) is int and given > 0 and (given == want or isinstance(want, str))


def _check_path(path: str) -> None:
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or not path.isprintable():
        raise BundleError(f"{MANIFEST_NAME} names {path!r}, which lies outside the bundle: refused")


def _check_whole(manifest: Manifest) -> None:
    """Refuse numbers that make no sense, alone or together."""
    for rule, holds in {**_number_rules(manifest), **_fit_rules(manifest)}.items():
        if not holds:
            raise BundleError(f"{MANIFEST_NAME} breaks a rule: {rule}; export the bundle again")
    limits, defaults = manifest.limits, manifest.defaults
    sides = (limits.height, limits.width)
    for name, side, size in zip(("height", "width"), sides, (defaults.height, defaults.width), strict=True):
        if not side.admits(size):
            raise BundleError(f"{MANIFEST_NAME}: the default {name} is {size}, the limits are {side}")


def _number_rules(manifest: Manifest) -> dict[str, bool]:
    """Rule → whether it holds: limits, defaults and latents."""
    limits, defaults, factor = manifest.limits, manifest.defaults, manifest.latents.factor
    sides = (limits.height, limits.width)
    return {
        "latents: channels and factor are at least 1": min(factor, manifest.latents.channels) >= 1,
        "limits: 1 ≤ min_batch ≤ max_batch": 1 <= limits.min_batch <= limits.max_batch,
        "limits: max_chunks is at least 1": limits.max_chunks >= 1,
        "limits: max_clip_skip is at least 0": limits.max_clip_skip >= 0,
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
    }


def _fit_rules(manifest: Manifest) -> dict[str, bool]:
    """Rule → whether it holds: what one component gives is what the next one takes."""
    parts = manifest.components
    latents = (
        parts["unet"].spec.inputs[0],
        *parts["unet"].spec.outputs,
        *parts["vae_decoder"].spec.inputs,
    )
    rules = _text_rules(manifest) if manifest.tokenizers else _image_rules(manifest)
    return rules | {
        "the unet and the vae_decoder have the latents' channels": all(
            spec.shape[1] == manifest.latents.channels for spec in latents
        ),
        "preview has a row for each channel of the latents": (
            manifest.preview is None
            or (
                len(manifest.preview.weights) == manifest.latents.channels
                and all(len(row) == 3 for row in manifest.preview.weights)
            )
        ),
    }


def _image_rules(manifest: Manifest) -> dict[str, bool]:
    """Rule → whether it holds: the image encoder and what it gives."""
    encoder, facts = manifest.components["image_encoder"].spec, manifest.image_processor
    embeddings = manifest.components["unet"].spec.inputs[2]
    return {
        "the image encoder's output fits the unet": encoder.outputs[0].shape[2] == embeddings.shape[2],
        "the image_processor's size is the image encoder's": (
            facts is not None and encoder.inputs[0].shape[2:] == (facts.size, facts.size)
        ),
        "the image_processor's std are above 0": facts is not None and min(facts.std) > 0,
    }


def _text_rules(manifest: Manifest) -> dict[str, bool]:
    """Rule → whether it holds: text encoders, tokenizers and what the U-Net reads of them."""
    parts = manifest.components
    texts = {spec.name: spec.shape[1:] for spec in parts["text_encoder"].spec.outputs}
    unet = parts["unet"].spec
    embeddings = unet.inputs[2]
    encoders = [parts[name] for name in ("text_encoder", "text_encoder_2") if name in parts]
    given = texts.get(manifest.text_output)
    rules = {"text_output is an output of the text encoder": given is not None}
    if manifest.tokenizer_2 is not None:
        hidden, pooled = parts["text_encoder_2"].spec.outputs
        given = None if given is None else (given[0], _sum(given[1], hidden.shape[2]))
        added = unet.input("text_embeds")
        rules["text_encoder_2's text_embeds fit the unet"] = (
            added is not None and pooled.shape[1:] == added.shape[1:]
        )
    context = embeddings.shape[1]
    return rules | {
        "the text encoder's output fits the unet": given is not None and given[1:] == embeddings.shape[2:],
        "the tokenizer's max_length fits the text encoder and the unet": all(
            part.spec.inputs[0].shape[1] == facts.max_length and context in ("context", facts.max_length)
            for part, facts in zip(encoders, manifest.tokenizers, strict=True)
        ),
        "limits: max_chunks is 1 where the unet's context has one size": (
            context == "context" or manifest.limits.max_chunks == 1
        ),
        "limits: max_clip_skip is 0 where the text encoders do not read clip_skip": (
            manifest.limits.max_clip_skip == 0
            or all(part.spec.input("clip_skip") is not None for part in encoders)
        ),
    }


def _sum(left: int | str, right: int | str) -> int:
    """Of two widths, which are numbers in every manifest that passed `_tensors`."""
    assert isinstance(left, int)
    assert isinstance(right, int)
    return left + right
