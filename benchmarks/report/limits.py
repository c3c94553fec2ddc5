"""What share of the machine's limits a network reaches, and what makes a report's figures doubtful."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from sdrt.benchmarks.document.document import Ceilings, Document, Measurement, Model, Setting, Work
from sdrt.benchmarks.report.derive import NETWORKS, median_of, percentile, ratios
from sdrt.benchmarks.report.formatting import one

# The probe is a fixed piece of work: on a quiet machine its times differ by one or two per cent.
PROBE_SPREAD: Final = 1.10
# Threads that spin add to the load: a run that has the machine for itself may read a little above it.
LOAD_PER_CORE: Final = 1.25
FEWEST_ROUNDS: Final = 5
# Counted work and measured ceilings are each good to some per cent; beyond this one of them is wrong.
HIGHEST_SHARE: Final = 1.05


@dataclass(frozen=True, slots=True)
class Share:
    """One network of one subject beside what the machine can do (the roofline of Williams et al. 2009).

    Attributes:
        model: `Model.name`.
        subject: `Subject.name`.
        component: Name of the network.
        setting: Of the measurement.
        seconds: Median of a call.
        flop_per_s: Counted operations over that.
        bytes_per_s: Counted bytes over that.
        intensity: Counted operations per counted byte.
        attainable: flop/s that the machine allows at this intensity: the lower of its peak and of intensity
            times bandwidth.
        share: ``flop_per_s`` over ``attainable``.
    """

    model: str
    subject: str
    component: str
    setting: Setting
    seconds: float
    flop_per_s: float
    bytes_per_s: float
    intensity: float
    attainable: float
    share: float


def attainable(ceilings: Ceilings, intensity: float) -> float:
    """flop/s at an intensity in flop/B: min(peak, intensity · bandwidth)."""
    return min(ceilings.flop_per_s, intensity * ceilings.bytes_per_s)


def ceilings_of(document: Document, device: str) -> Ceilings | None:
    """The measured ones of a device; None without."""
    found = (entry for entry in document.ceilings if entry.device == device)
    return next((entry for entry in found if entry.flop_per_s and entry.bytes_per_s), None)


def shares(document: Document, model: str | None = None) -> list[Share]:
    """Of every network that was timed, whose work was counted at that setting, and whose device has ceilings.

    Work is counted of what the quantity times: one call on all pictures, both halves where it is guided.
    """
    devices = {subject.name: ceilings_of(document, subject.device) for subject in document.subjects}
    found = []
    for entry in document.measurements:
        ceilings = devices.get(entry.subject, ceilings_of(document, "cpu"))
        if ceilings and entry.quantity in NETWORKS and entry.values and model in (None, entry.model):
            work = _work_of(document, entry)
            if work is not None and work.flop and work.bytes_moved and 0 < median_of(entry) < math.inf:
                found.append(_share(ceilings, entry, work))
    return found


def main_shares(document: Document, model: Model, device: str) -> list[Share]:
    """Of the main size, one picture at a time, on one device."""
    there = {subject.name for subject in document.subjects if subject.device == device}
    main = model.sizes[:1]
    return [
        share
        for share in shares(document, model.name)
        if share.subject in there
        and share.setting.batch == 1
        and (share.component == "text_encoder" or (share.setting.height, share.setting.width) in main)
    ]


def _share(ceilings: Ceilings, entry: Measurement, work: Work) -> Share:
    seconds, intensity = median_of(entry), work.flop / work.bytes_moved
    speed, limit = work.flop / seconds, attainable(ceilings, intensity)
    return Share(
        *(entry.model, entry.subject, entry.quantity, entry.setting),
        seconds=seconds,
        flop_per_s=speed,
        bytes_per_s=work.bytes_moved / seconds,
        intensity=intensity,
        attainable=limit,
        share=speed / limit,
    )


def _work_of(document: Document, entry: Measurement) -> Work | None:
    """The text encoder knows no pixels: for it the batch alone decides."""
    found = (work for model in document.models if model.name == entry.model for work in model.work)
    for work in found:
        same = entry.quantity == "text_encoder" or (work.height, work.width) == (entry.height, entry.width)
        if same and work.component == entry.quantity and work.batch == entry.batch:
            return work
    return None


def warnings(document: Document) -> list[str]:
    """What a reader must know before trusting the figures, a sentence each; empty for a good run."""
    return [
        *_course(document),
        *_memory(document),
        *_devices(document),
        *_noise(document),
        *_rounds(document),
        *_impossible(document),
    ]


def _course(document: Document) -> Iterator[str]:
    if not document.complete:
        yield "The run was interrupted: what is here was measured, and what is missing was not reached."
    if document.failures:
        names = sorted({failure.subject for failure in document.failures})
        yield f"{_count(len(document.failures), 'measurement')} failed ({', '.join(names)}); see Failures."


def _memory(document: Document) -> Iterator[str]:
    for model in document.models:
        short = model.memory_shortage
        if short is None:
            continue
        free, needed = one(max(short.free_bytes, 0), "B"), one(short.needed_bytes, "B")
        if short.held:
            yield (
                f"{model.name}: memory did not suffice for two subjects ({free} were free beside the first, "
                f"another one may need {needed}), so they were measured one at a time, each started anew for "
                "its turn in every round. Loading is not in the warm figures."
            )
        else:
            yield (
                f"{model.name}: memory may have been too short even for one subject ({free} were free, it "
                f"may need {needed}): a figure may hold reading weights from the disk again."
            )


def _devices(document: Document) -> Iterator[str]:
    labels: dict[str, list[str]] = {"cpu": [], "cuda": []}
    for subject in document.subjects:
        labels[subject.device].append(subject.label)
    if labels["cuda"] and ceilings_of(document, "cuda") is None:
        yield f"The limits of the GPU are not measured: there are no shares of {', '.join(labels['cuda'])}."
    if labels["cuda"] and labels["cpu"]:
        yield (
            f"{', '.join(labels['cuda'])} ran on the GPU and {', '.join(labels['cpu'])} on the processor: "
            "ratios between them compare two devices."
        )


def _noise(document: Document) -> Iterator[str]:
    """The slowest tenth of the probe beyond `PROBE_SPREAD`, the load beyond `LOAD_PER_CORE`."""
    probe = document.noise.probe_seconds
    load, cores = max(document.noise.load_average, default=0.0), document.machine.cores
    busy = load > LOAD_PER_CORE * cores
    if len(probe) > 1 and percentile(probe, 50) > 0:
        spread = percentile(probe, 90) / percentile(probe, 50)
        if spread > PROBE_SPREAD:
            advice = "" if busy else " Trust the ratios, taken pair by pair, before the times."
            yield (
                f"The machine was noisy: a fixed piece of work took {spread:.2f} times its median in its "
                f"slowest tenth (more than {PROBE_SPREAD:.2f} is noisy).{advice}"
            )
    elif document.measurements:
        yield f"The noise of the machine was {'measured only once' if probe else 'not measured'}."
    if busy:
        yield (
            f"Something else was running: the load average reached {load:.1f} on {_count(cores, 'core')} "
            f"(more than {LOAD_PER_CORE * cores:.1f} is suspicious). Threads that wait for each other lose "
            "more than their share then, some libraries' more than others': not even the ratios hold."
        )


def _rounds(document: Document) -> Iterator[str]:
    found = [
        ratio.pairs for quantity in ("cold_total", "image", "step") for ratio in ratios(document, quantity)
    ]
    if found and min(found) < FEWEST_ROUNDS:
        few = sum(pairs < FEWEST_ROUNDS for pairs in found)
        yield (
            f"{_count(few, 'ratio')} of {len(found)} rest on fewer than {FEWEST_ROUNDS} rounds "
            f"(the least on {min(found)}): their spread says little."
        )


def _impossible(document: Document) -> Iterator[str]:
    beyond = [share for share in shares(document) if share.share > HIGHEST_SHARE]
    if beyond:
        worst = max(beyond, key=lambda share: share.share)
        yield (
            f"{worst.subject} reached {worst.share:.0%} of what the machine can do in {worst.component}: "
            "a ceiling or the count of operations is wrong, or it skips some of the work."
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
