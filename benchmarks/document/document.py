"""What ``sd-bench`` found, as data: the JSON that every report is made from.

A document holds raw measurements, one entry for each quantity of each subject under each setting, so that
a reader can compute any figure anew; `sdrt.benchmarks.report.derive` does so for the reports.
``report.schema.json`` beside this file is its JSON Schema, and says what every field means.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Final, NamedTuple, get_args, get_origin, get_type_hints

from sdrt.runtime.errors import UsageError

FORMAT: Final = "sdrt-bench"
FORMAT_VERSION: Final = 2
SCHEMA: Final = Path(__file__).with_name("report.schema.json")

# Every quantity, its unit and what it is. Times are of one occurrence, sizes are in bytes.
QUANTITIES: Final[dict[str, tuple[str, str]]] = {
    # A fresh process to the first picture on disk, and its parts in their order.
    "cold_total": ("s", "fresh process to the first picture on disk"),
    "cold_start": ("s", "start of the interpreter, until the first line of the program"),
    "cold_import": ("s", "imports"),
    "cold_load": ("s", "loading the model"),
    "cold_image": ("s", "first drawing"),
    "cold_save": ("s", "writing the PNG"),
    "cold_peak_memory": ("B", "most memory that process held (VmHWM, mapped files included)"),
    "cold_peak_anonymous": ("B", "most memory of its own that it was seen to hold (RssAnon, sampled)"),
    "installed_size": ("B", "files of the distributions it needs"),
    # A process that has drawn before.
    "image": ("s", "whole call, from prompt to pixels"),
    "step": ("s", "one guided step, from the end of the step before to its own"),
    "text_encoder": ("s", "text encoder on the conditional and the unconditional texts"),
    "unet": ("s", "one evaluation of the U-Net on both halves"),
    "vae_decoder": ("s", "latents to pixels"),
    "vae_encoder": ("s", "pixels to latents"),
    "memory": ("B", "memory held after drawing (VmRSS, mapped files included)"),
    "peak_memory": ("B", "most memory the process held (VmHWM, mapped files included)"),
    "gpu_memory": ("B", "GPU memory held after drawing (free memory before less after)"),
    # Fidelity to the reference that the model names.
    "psnr": ("dB", "peak signal-to-noise ratio of the picture; null where the pictures are equal"),
    "latent_error": ("1", "norm of the final latents' difference over the norm of the reference's"),
}


class Setting(NamedTuple):
    """Under which a quantity is measured: pixels, pictures drawn together, steps of the drawing."""

    height: int
    width: int
    batch: int
    steps: int

    def __str__(self) -> str:
        return f"{self.height} x {self.width}, batch {self.batch}, {self.steps} steps"


@dataclass(frozen=True, slots=True)
class Machine:
    """What the figures were taken on."""

    cpu: str
    cores: int
    memory_bytes: int
    system: str
    python: str
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Noise:
    """How quiet the machine was: a fixed piece of work, timed again and again between the measurements."""

    probe_seconds: tuple[float, ...] = ()
    load_average: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a processor or a GPU can do at most, measured in the same run."""

    flop_per_s: float
    bytes_per_s: float
    how: str
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Subject:
    """What was measured: sdrt on one backend, or a peer."""

    name: str
    label: str
    kind: str
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Work:
    """Operations and bytes of one component at one setting, counted from its graph."""

    component: str
    height: int
    width: int
    batch: int
    flop: int
    bytes_moved: int


@dataclass(frozen=True, slots=True)
class MemoryShortage:
    """Memory that did not suffice to hold two subjects at once, or not surely for one."""

    held: int
    free_bytes: int
    needed_bytes: int


@dataclass(frozen=True, slots=True)
class Model:
    """What was drawn with, and the settings that every subject had."""

    name: str
    source: str
    weights_bytes: int
    sampler: str
    steps: int
    guidance_scale: float
    prompt: str
    threads: int
    sizes: tuple[tuple[int, int], ...]
    work: tuple[Work, ...] = ()
    memory_shortage: MemoryShortage | None = None
    reference: str = "PyTorch in fp32"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One quantity of one subject under one setting."""

    model: str
    subject: str
    quantity: str
    height: int
    width: int
    batch: int
    steps: int
    values: tuple[float | None, ...]
    rounds: tuple[int, ...]

    @property
    def setting(self) -> Setting:
        """Under which it was measured."""
        return Setting(self.height, self.width, self.batch, self.steps)


@dataclass(frozen=True, slots=True)
class Kernel:
    """What ran on the GPU under one name in a step."""

    name: str
    seconds: float
    launches: float


@dataclass(frozen=True, slots=True)
class Profile:
    """What a denoising step does on the GPU, and on the host for it."""

    model: str
    subject: str
    batch: int
    seconds: float
    launches: float
    host: dict[str, float]
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """What was to be measured and could not be."""

    model: str
    subject: str
    stage: str
    error: str


@dataclass(frozen=True, slots=True)
class Document:
    """A whole run; the first subject is what ratios compare with the others."""

    created: str
    command: tuple[str, ...]
    complete: bool
    sdrt: str
    machine: Machine
    noise: Noise = Noise()
    ceilings: tuple[Ceilings, ...] = ()
    subjects: tuple[Subject, ...] = ()
    models: tuple[Model, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    profiles: tuple[Profile, ...] = ()
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()

    def select(self, quantity: str, **settings: object) -> list[Measurement]:
        """The measurements of one quantity that have these settings (``model``, ``subject``, ``batch`` …)."""
        return [
            entry
            for entry in self.measurements
            if entry.quantity == quantity
            and all(getattr(entry, name) == value for name, value in settings.items())
        ]

    def joined(self, other: Document) -> Document:
        """This run with what another one on the same machine found; no two models may have one name."""
        known = {subject.name for subject in self.subjects}
        devices = {ceilings.device for ceilings in self.ceilings}
        return replace(
            self,
            complete=self.complete and other.complete,
            noise=Noise(
                self.noise.probe_seconds + other.noise.probe_seconds,
                self.noise.load_average + other.noise.load_average,
            ),
            ceilings=self.ceilings + tuple(c for c in other.ceilings if c.device not in devices),
            subjects=self.subjects + tuple(s for s in other.subjects if s.name not in known),
            models=self.models + other.models,
            measurements=self.measurements + other.measurements,
            profiles=self.profiles + other.profiles,
            failures=self.failures + other.failures,
            notes=self.notes + other.notes,
        )


def to_json(document: Document) -> str:
    """The document as JSON text."""
    head = {"format": FORMAT, "format_version": FORMAT_VERSION}
    return json.dumps({**head, **asdict(document)}, indent=1, ensure_ascii=False, allow_nan=False)


def read(path: Path, *, check: bool = True) -> Document:
    """Read a report's JSON, and unless it is ours check it against the schema.

    Raises:
        UsageError: It cannot be read, is no such report, or of another format.
    """
    try:
        return from_json(path.read_text(encoding="utf-8"), check=check)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path} cannot be read: {reason}") from error


def from_json(text: str, *, check: bool = True) -> Document:
    """Parse a document and check it against the schema.

    Raises:
        UsageError: It does not fit.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"no valid JSON: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UsageError(f'it does not say "format": "{FORMAT}": this is no report of sd-bench')
    version = found.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UsageError(f"format version {version}, this sdrt reads up to {FORMAT_VERSION}: upgrade sdrt")
    if check:
        _check(found)
    document: Document = _value(Document, found)
    for entry in document.measurements:
        if len(entry.values) != len(entry.rounds):
            raise UsageError(
                f"{entry.quantity} of {entry.subject} has {len(entry.values)} values and {len(entry.rounds)} "
                "rounds: each value needs its round"
            )
    return document


def _check(found: Any) -> None:
    import jsonschema

    try:
        jsonschema.validate(found, json.loads(SCHEMA.read_text(encoding="utf-8")))
    except jsonschema.ValidationError as error:
        raise UsageError(f"{error.json_path}: {error.message}; see {SCHEMA.name}") from None


def _value(kind: Any, found: Any) -> Any:
    """JSON as a value of a type; the schema has checked names and types."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        known = [entry.name for entry in fields(kind) if entry.name in found]
        return kind(**{name: _value(hints[name], found[name]) for name in known})  # type: ignore[operator]
    if get_origin(kind) is tuple:
        return tuple(_value(get_args(kind)[0], entry) for entry in found)
    if isinstance(kind, UnionType) and found is not None:
        return _value(get_args(kind)[0], found)
    return found
