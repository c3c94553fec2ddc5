"""A report while it grows: measurements as they come in, and how quiet the machine was meanwhile."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

import sdrt
from sdrt.benchmarks.document import (
    QUANTITIES,
    Ceilings,
    Document,
    Failure,
    Machine,
    Measurement,
    MemoryShortage,
    Model,
    Noise,
    Subject,
)
from sdrt.runtime.backends.executor import usable_cores

_PROBE_BYTES: Final = bytes(1 << 20)  # stays in a core's own cache
_PROBE_REPEATS: Final = 40  # some 30 ms


class Setting(NamedTuple):
    """Under which a quantity is measured: pixels, pictures drawn together, steps of the drawing."""

    height: int
    width: int
    batch: int
    steps: int

    def __str__(self) -> str:
        return f"{self.height} x {self.width}, batch {self.batch}, {self.steps} steps"


class Recorder:
    """Collects a report's content; `document` is valid at every moment.

    Attributes:
        ceilings: Set when they were measured.
    """

    def __init__(self, command: Sequence[str], write: Callable[[Document], None] = lambda _: None) -> None:
        """Begin a report.

        Args:
            command: The words of the command.
            write: What `save` does with the document.
        """
        self.ceilings: Ceilings | None = None
        self._command, self._write = tuple(command), write
        self._created = datetime.now(UTC).isoformat(timespec="seconds")
        self._machine, self._version = this_machine(), sdrt_version()
        self._probes: list[float] = []
        self._loads: list[float] = []
        self._subjects: dict[str, Subject] = {}
        self._models: dict[str, Model] = {}
        self._values: dict[tuple[str, str, str, Setting], list[tuple[float, int]]] = {}
        self._failures: list[Failure] = []

    def set_subject(self, subject: Subject) -> None:
        """Add it, or put what is now known of it in its place."""
        self._subjects[subject.name] = subject

    def describe(self, name: str, versions: dict[str, str], notes: Sequence[str]) -> None:
        """Record what a subject said of itself."""
        known = self._subjects[name]
        merged = tuple(dict.fromkeys((*known.notes, *notes)))
        self._subjects[name] = replace(known, versions={**known.versions, **versions}, notes=merged)

    def set_model(self, model: Model) -> None:
        """Add it, or put what is now known of it in its place."""
        self._models[model.name] = model

    def set_shortage(self, model: str, shortage: MemoryShortage) -> None:
        """Record that memory was too short for a model; see `Model.memory_shortage`."""
        self._models[model] = replace(self._models[model], memory_shortage=shortage)

    def add(
        self, model: str, subject: str, quantity: str, setting: Setting, values: Sequence[float], number: int
    ) -> None:
        """Add values of one round.

        Args:
            model: Its name.
            subject: Its name.
            quantity: A key of `QUANTITIES`.
            setting: Under which.
            values: In the quantity's unit; infinity is allowed.
            number: The round.
        """
        assert quantity in QUANTITIES, quantity
        entries = self._values.setdefault((model, subject, quantity, setting), [])
        entries += [(float(value), number) for value in values]

    def rounds(self, model: str, quantity: str, setting: Setting) -> int:
        """The first round's number that no subject has used yet for this."""
        used = [
            number
            for key, values in self._values.items()
            if (key[0], *key[2:]) == (model, quantity, setting)
            for _, number in values
        ]
        return max(used, default=-1) + 1

    def fail(self, model: str, subject: str, stage: str, error: object) -> None:
        """Record what could not be measured; reports are passed on, so a home folder is only ``~``."""
        words = " ".join(str(error).split()).replace(str(Path.home()), "~")
        self._failures.append(Failure(model, subject, stage, words))

    def probe(self) -> None:
        """Time the fixed piece of work."""
        self._probes.append(probe_seconds())
        self._loads.append(os.getloadavg()[0])

    def document(self, *, complete: bool) -> Document:
        """The report as it stands."""
        return Document(
            created=self._created,
            command=self._command,
            complete=complete,
            sdrt=self._version,
            machine=self._machine,
            noise=Noise(tuple(self._probes), tuple(self._loads)),
            ceilings=self.ceilings,
            subjects=tuple(self._subjects.values()),
            models=tuple(self._models.values()),
            measurements=tuple(_measurement(key, values) for key, values in self._values.items() if values),
            failures=tuple(self._failures),
        )

    def save(self, *, complete: bool = False) -> None:
        """Write the report as it stands, where one was asked for."""
        self._write(self.document(complete=complete))


def _measurement(key: tuple[str, str, str, Setting], values: Sequence[tuple[float, int]]) -> Measurement:
    model, subject, quantity, setting = key
    return Measurement(
        model,
        subject,
        quantity,
        *setting,
        values=tuple(None if math.isinf(value) else value for value, _ in values),
        rounds=tuple(number for _, number in values),
    )


def probe_seconds() -> float:
    """Seconds of a fixed piece of work in one thread: SHA-256 of 40 MiB."""
    started = time.perf_counter()
    digest = hashlib.sha256()
    for _ in range(_PROBE_REPEATS):
        digest.update(_PROBE_BYTES)
    return time.perf_counter() - started


def this_machine() -> Machine:
    """What this runs on."""
    return Machine(
        cpu=_cpu(),
        cores=usable_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.release()}, {_distribution()}",
        python=platform.python_version(),
        gpus=_gpus(),
    )


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return "unknown distribution"


def _gpus() -> tuple[str, ...]:
    from sdrt.runtime.devices.gpu.discovery import find_gpu
    from sdrt.runtime.errors import BackendError

    found: list[str] = []
    while len(found) < 64:
        try:
            found.append(find_gpu(len(found)).name)
        except BackendError:
            break
    return tuple(found)


def sdrt_version() -> str:
    """The version, and the commit where this is a checkout."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        # `ls-files`: an installed sdrt may lie inside somebody else's repository.
        subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name],
            check=True,
            capture_output=True,
        )
        commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return sdrt.__version__
    return f"{sdrt.__version__} ({commit})"
