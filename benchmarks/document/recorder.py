"""A report while it grows: measurements as they come in, and how quiet the machine was meanwhile."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from sdrt.benchmarks.document.document import (
    QUANTITIES,
    Ceilings,
    Document,
    Failure,
    Measurement,
    MemoryShortage,
    Model,
    Noise,
    Profile,
    Setting,
    Subject,
    Work,
)
from sdrt.benchmarks.document.machine import probe_seconds, sdrt_version, this_machine


class Recorder:
    """Collects a report's content; `document` is valid at every moment.

    Attributes:
        ceilings: By device, those that were measured.
        profiles: Of steps on a GPU.
    """

    def __init__(self, command: Sequence[str], write: Callable[[Document, bool], None] | None = None) -> None:
        """Begin a report.

        Args:
            command: The words of the command.
            write: What `save` does with the document, and whether it is the last one.
        """
        self.ceilings: dict[str, Ceilings] = {}
        self.profiles: list[Profile] = []
        self._write = write
        created = datetime.now(UTC).isoformat(timespec="seconds")
        self._head = Document(created, tuple(command), False, sdrt_version(), this_machine())
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

    def set_work(self, model: str, work: Sequence[Work]) -> None:
        """Record the counted operations of a model."""
        self._models[model] = replace(self._models[model], work=tuple(work))

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
        return replace(
            self._head,
            complete=complete,
            noise=Noise(tuple(self._probes), tuple(self._loads)),
            ceilings=tuple(self.ceilings.values()),
            subjects=tuple(self._subjects.values()),
            models=tuple(self._models.values()),
            measurements=tuple(
                Measurement(
                    *key[:3],
                    *key[3],
                    values=tuple(None if math.isinf(value) else value for value, _ in values),
                    rounds=tuple(number for _, number in values),
                )
                for key, values in self._values.items()
                if values
            ),
            profiles=tuple(self.profiles),
            failures=tuple(self._failures),
        )

    def save(self, *, complete: bool = False, last: bool = False) -> None:
        """Write the report as it stands, where one was asked for."""
        if self._write is not None:
            self._write(self.document(complete=complete), last or complete)
