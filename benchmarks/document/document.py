"""What ``sd-bench`` found, as data: the JSON that every report is made from.

A document holds raw measurements, one entry for each quantity of each subject under each setting, so that
a reader can compute any figure anew; `sdrt.benchmarks.report.derive` does so for the reports.
``report.schema.json`` beside this file is its JSON Schema, and says what every field means.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from sdrt.runtime.errors import UsageError
from sdrt.runtime.files import write_atomically

FORMAT: Final = "sdrt-bench"
FORMAT_VERSION: Final = 1
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
    # Fidelity to the fp32 reference, PyTorch's.
    "psnr": ("dB", "peak signal-to-noise ratio of the picture; null where the pictures are equal"),
    "latent_error": ("1", "norm of the final latents' difference over the norm of the reference's"),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What the figures were taken on.

    Attributes:
        cpu: Its name.
        cores: That the processes may use.
        memory_bytes: Of the machine.
        system: Kernel and distribution.
        python: Version of the interpreter that ran ``sd-bench``.
        gpus: Names; empty without one.
    """

    cpu: str
    cores: int
    memory_bytes: int
    system: str
    python: str
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Noise:
    """How quiet the machine was: a fixed piece of work, timed again and again between the measurements.

    Attributes:
        probe_seconds: Of each time.
        load_average: Of the last minute, each time.
    """

    probe_seconds: tuple[float, ...] = ()
    load_average: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the machine's processor can do at most, measured in the same run; a GPU's limits are not measured.

    Attributes:
        flop_per_s: fp32 matrix product; a multiply-add counts as 2.
        bytes_per_s: Memory bandwidth, read and written bytes together.
        how: What was measured.
    """

    flop_per_s: float
    bytes_per_s: float
    how: str


@dataclass(frozen=True, slots=True)
class Subject:
    """What was measured: sdrt on one backend, or a peer.

    Attributes:
        name: As on the command line.
        label: For people.
        kind: ``backend`` of ours, or ``peer``.
        versions: Of the packages that matter.
        notes: What differs from the others, a sentence each.
        device: What its networks run on: ``cpu`` or ``cuda``.
    """

    name: str
    label: str
    kind: str
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Work:
    """Operations and bytes of one component at one setting, counted from its graph.

    Attributes:
        component: Its name.
        height: Pixels.
        width: Pixels.
        batch: Pictures.
        flop: Operations of one call; a multiply-add counts as 2.
        bytes_moved: Weights read once, and every activation written once and read once: what no
            implementation without fusion can avoid.
    """

    component: str
    height: int
    width: int
    batch: int
    flop: int
    bytes_moved: int


@dataclass(frozen=True, slots=True)
class MemoryShortage:
    """Memory that did not suffice to hold two subjects at once, or not surely for one.

    Attributes:
        held: Subjects that were loaded when the free memory was read.
        free_bytes: That another one could have had.
        needed_bytes: That another one may need.
    """

    held: int
    free_bytes: int
    needed_bytes: int


@dataclass(frozen=True, slots=True)
class Model:
    """What was drawn with, and the settings that every subject had.

    Attributes:
        name: Short, unique in the document.
        source: As on the command line.
        weights_bytes: Of all components' weights in fp32.
        sampler: Name.
        steps: Of a picture.
        guidance_scale: Of every step.
        prompt: Text.
        threads: Of each subject.
        sizes: Height and width in pixels of each size, the first being the model's main one.
        work: Counted operations.
        memory_shortage: Why subjects were measured one at a time, each started anew for every round; None
            where memory sufficed.
    """

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
    """One quantity of one subject under one setting.

    Attributes:
        model: `Model.name`.
        subject: `Subject.name`.
        quantity: A key of `QUANTITIES`; its unit is there.
        height: Pixels.
        width: Pixels.
        batch: Pictures drawn together.
        steps: Of the drawing.
        values: In the order in which they were taken; None is an infinite one.
        rounds: For each value the round it was taken in. Within one round every subject ran once, one after
            the other, so that values of one round are compared with each other.
    """

    model: str
    subject: str
    quantity: str
    height: int
    width: int
    batch: int
    steps: int
    values: tuple[float | None, ...]
    rounds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """What was to be measured and could not be.

    Attributes:
        model: `Model.name`; empty where it has nothing to do with a model.
        subject: `Subject.name`.
        stage: What was being done.
        error: One line.
    """

    model: str
    subject: str
    stage: str
    error: str


@dataclass(frozen=True, slots=True)
class Document:
    """A whole run.

    Attributes:
        created: UTC, ISO 8601.
        command: The words of the command.
        complete: Whether the run came to its end.
        sdrt: Version, and the commit where it is known.
        machine: What it ran on.
        noise: How quiet that was.
        ceilings: What that can do; None where it was not measured.
        subjects: Ours first; the first one is what ratios compare with the others.
        models: In the order of the command.
        measurements: In the order in which they were begun.
        failures: Likewise.
    """

    created: str
    command: tuple[str, ...]
    complete: bool
    sdrt: str
    machine: Machine
    noise: Noise
    ceilings: Ceilings | None
    subjects: tuple[Subject, ...]
    models: tuple[Model, ...]
    measurements: tuple[Measurement, ...]
    failures: tuple[Failure, ...]

    def select(self, quantity: str, **settings: object) -> list[Measurement]:
        """The measurements of one quantity that have these settings (``model``, ``subject``, ``batch`` …)."""
        return [
            entry
            for entry in self.measurements
            if entry.quantity == quantity
            and all(getattr(entry, name) == value for name, value in settings.items())
        ]


def to_json(document: Document) -> str:
    """The document as JSON text."""
    return json.dumps(
        {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(document)},
        indent=1,
        ensure_ascii=False,
        allow_nan=False,
    )


def write(document: Document, path: Path) -> None:
    """Write it as JSON, whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    write_atomically(path, (to_json(document) + "\n").encode())


def read(path: Path) -> Document:
    """Read a report's JSON.

    Raises:
        UsageError: It cannot be read, is no such report, or of a newer format.
    """
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise UsageError(f"{path}: {error}") from None
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path} cannot be read: {reason}") from error


def from_json(text: str) -> Document:
    """Parse a document and check it against the schema.

    Raises:
        UsageError: It does not fit.
    """
    import jsonschema

    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"no valid JSON: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UsageError(f'it does not say "format": "{FORMAT}": this is no report of sd-bench')
    version = found.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UsageError(f"format version {version}, this sdrt reads up to {FORMAT_VERSION}: upgrade sdrt")
    try:
        jsonschema.validate(found, json.loads(SCHEMA.read_text(encoding="utf-8")))
    except jsonschema.ValidationError as error:
        raise UsageError(f"{error.json_path}: {error.message}; see {SCHEMA.name}") from None
    document = _document(found)
    for entry in document.measurements:
        if len(entry.values) != len(entry.rounds):
            raise UsageError(
                f"{entry.quantity} of {entry.subject} has {len(entry.values)} values and {len(entry.rounds)} "
                "rounds: each value needs its round"
            )
    return document


def _document(found: dict[str, Any]) -> Document:
    ceilings = found["ceilings"]
    return Document(
        created=found["created"],
        command=tuple(found["command"]),
        complete=found["complete"],
        sdrt=found["sdrt"],
        machine=_record(Machine, found["machine"]),
        noise=_record(Noise, found["noise"]),
        ceilings=None if ceilings is None else _record(Ceilings, ceilings),
        subjects=_records(Subject, found["subjects"]),
        models=tuple(_model(entry) for entry in found["models"]),
        measurements=_records(Measurement, found["measurements"]),
        failures=_records(Failure, found["failures"]),
    )


def _model(found: dict[str, Any]) -> Model:
    sizes = tuple((height, width) for height, width in found["sizes"])
    work = _records(Work, found["work"])
    shortage = found.get("memory_shortage")  # of no report before it was told
    short = None if shortage is None else _record(MemoryShortage, shortage)
    return Model(**{**found, "sizes": sizes, "work": work, "memory_shortage": short})


def _records(kind: type[Any], found: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
    return tuple(_record(kind, entry) for entry in found)


def _record(kind: type[Any], found: dict[str, Any]) -> Any:
    """A record of plain fields; the schema has checked names and types."""
    names = {entry.name for entry in fields(kind)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return kind(**{name: value for name, value in values.items() if name in names})
