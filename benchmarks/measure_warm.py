"""Warm drawings: workers that are loaded stay alive, and all but the one that works are stopped.

Rounds go A B C A B C …, so that what one round compares was measured under the same conditions. Where memory
does not suffice for all subjects at once, they are measured in groups that each hold the first one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from sdrt.benchmarks.bench_run import Run, SubjectPlan, WorkerErrors
from sdrt.benchmarks.measure_fidelity import drawing_files
from sdrt.benchmarks.process_memory import available_memory
from sdrt.benchmarks.recorder import Setting
from sdrt.benchmarks.worker_process import RefusedError, Worker, WorkerError

STAGE_SECONDS: Final = 0.1  # a stage that is shorter is timed several times in a round
MAX_REPEATS: Final = 5
# What a subject may need beyond the weights: copies while loading, packed weights, activations.
WEIGHTS_FACTOR: Final = 2.5
BASE_BYTES: Final = 1 << 30


@dataclass(slots=True)
class Live:
    """A subject that is loaded.

    Attributes:
        plan: The subject.
        worker: Its process, stopped while it is idle.
        stages: What it can time alone.
        refused: Settings that it cannot draw, and (stage, setting) that it cannot time.
        seconds: The last time of each stage.
    """

    plan: SubjectPlan
    worker: Worker
    stages: tuple[str, ...]
    refused: set[object] = field(default_factory=set)
    seconds: dict[object, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Point:
    """One setting to be measured, for some rounds, with the stages alone or without."""

    setting: Setting
    rounds: int
    stages: bool


def measure_warm(run: Run) -> None:
    """Measure drawings, stages, memory and growth of every subject; one that fails is a row."""
    waiting = run.usable()
    first: Live | None = None
    with contextlib.ExitStack() as held:
        while True:
            # The one that the others are compared with stays loaded; another takes its place if it dies.
            while waiting and (first is None or first.plan.name in run.broken):
                first = _load(run, waiting.pop(0), held)
            if first is None or first.plan.name in run.broken:
                return
            with contextlib.ExitStack() as others:
                group = [first]
                while waiting and (len(group) == 1 or fits(room(group), run.weights_bytes)):
                    if live := _load(run, waiting.pop(0), others):
                        group.append(live)
                names = ", ".join(live.plan.name for live in group)
                _measure_group(run, group)
            if not waiting:
                return
            run.progress.note(f"memory does not suffice for more subjects beside {names}: another group")


def room(group: Sequence[Live]) -> int:
    """Bytes that one more subject can have without taking pages of files that the others have mapped.

    The system counts those as available; a subject whose weights were dropped reads them again in each step.
    """
    memory = [live.worker.memory() for live in group]
    mapped = sum(facts.get("VmRSS", 0) - facts.get("RssAnon", 0) for facts in memory)
    return available_memory() - mapped


def fits(available: int, weights_bytes: int) -> bool:
    """Whether one more subject can be loaded beside those that are.

    Args:
        available: Bytes that are free now, see `room`.
        weights_bytes: Of the model.
    """
    return available >= WEIGHTS_FACTOR * weights_bytes + BASE_BYTES


def points(run: Run) -> list[Point]:
    """What is measured, in its order: the main setting, then growth with steps, sizes and batch."""
    wanted, main = run.settings, run.settings.main
    found = [Point(main, wanted.rounds, stages=True)] if "warm" in wanted.blocks else []
    if "growth" in wanted.blocks:
        rounds = wanted.growth_rounds
        found += [Point(main._replace(steps=steps), rounds, stages=False) for steps in wanted.growth_steps]
        found += [
            Point(main._replace(height=height, width=width), rounds, stages=True)
            for height, width in wanted.sizes
        ]
        found += [Point(main._replace(batch=batch), rounds, stages=False) for batch in wanted.batches]
    unique: dict[Setting, Point] = {}
    for point in found:
        unique.setdefault(point.setting, point)
    return list(unique.values())


def _load(run: Run, plan: SubjectPlan, stack: contextlib.ExitStack) -> Live | None:
    """Load a subject, draw once at the main setting, and stop it; None if it fails."""
    run.progress.block(f"{run.model}: loading", 1)
    run.progress.working(plan.name)
    stage = "loading"
    try:
        worker = run.start(plan)
        stack.callback(worker.kill)
        loaded = run.load(worker, plan)
        stage = "first drawing"
        setting = run.settings.main
        run.draw(worker, setting, files=drawing_files(run, plan))
    except WorkerErrors as error:
        run.broken.add(plan.name)
        run.fail(plan, stage, error)
        return None
    run.drawn.add(plan.name)
    if "warm" in run.settings.blocks:
        memory = worker.memory()
        run.add(plan, "memory", setting, [memory["VmRSS"]], 0)
        run.add(plan, "peak_memory", setting, [memory["VmHWM"]], 0)
    worker.pause()
    return Live(plan, worker, tuple(loaded["stages"]))


def _measure_group(run: Run, group: list[Live]) -> None:
    wanted = points(run)
    for index, point in enumerate(wanted):
        over = run.share(0.7 if index == 0 and len(wanted) > 1 else 1 / (len(wanted) - index))
        run.progress.block(f"{run.model}: {point.setting}", point.rounds * len(group))
        first = run.recorder.rounds(run.model, "image", point.setting)
        if index:
            _warm_up(run, group, point.setting)
        for number in range(point.rounds):
            if number and time.monotonic() > over:
                run.progress.note(f"{point.setting}: {number} of {point.rounds} rounds in the time given")
                break
            run.recorder.probe()
            for live in list(group):
                _round(run, live, point, first + number, group)
        run.recorder.save()


def _warm_up(run: Run, group: list[Live], setting: Setting) -> None:
    """A drawing that does not count: buffers of a new size, and compilers."""
    for live in list(group):
        with _awake(run, live, f"drawing {setting}", group, setting):
            run.draw(live.worker, setting)


def _round(run: Run, live: Live, point: Point, number: int, group: list[Live]) -> None:
    """One drawing of one subject, and each of its stages."""
    setting = point.setting
    if setting in live.refused or live not in group:
        return
    run.progress.working(live.plan.name)
    with _awake(run, live, f"drawing {setting}", group, setting):
        # A prompt of its own: a subject that keeps what it has encoded would leave a part of the work out.
        drawn = run.draw(live.worker, setting, prompt=f"{run.settings.prompt} {number}")
        run.add(live.plan, "image", setting, [drawn["seconds"]], number)
        run.add(live.plan, "step", setting, drawn["step_seconds"], number)
    for stage in live.stages if point.stages else ():
        if (stage, setting) in live.refused or live not in group:
            continue
        with _awake(run, live, f"{stage} {setting.height} x {setting.width}", group, (stage, setting)):
            _time_stage(run, live, stage, setting, number)
    run.progress.advance()


def _time_stage(run: Run, live: Live, stage: str, setting: Setting, number: int) -> None:
    last = live.seconds.get((stage, setting))
    repeats = 1 if last is None else max(1, min(MAX_REPEATS, int(STAGE_SECONDS / max(last, 1e-6))))
    answer = live.worker.request(
        "stage",
        timeout=run.settings.draw_seconds,
        stage=stage,
        repeats=repeats,
        height=setting.height,
        width=setting.width,
        batch=setting.batch,
    )
    live.seconds[stage, setting] = answer["seconds"][-1]
    run.add(live.plan, stage, setting, answer["seconds"], number)


@contextlib.contextmanager
def _awake(run: Run, live: Live, what: str, group: list[Live], key: object) -> Iterator[None]:
    """Let one worker run inside. What it refuses is not asked again; a dead one leaves the group."""
    live.worker.resume()
    try:
        yield
    except RefusedError as error:
        live.refused.add(key)
        run.fail(live.plan, what, error)
    except WorkerError as error:
        group.remove(live)
        run.broken.add(live.plan.name)
        run.fail(live.plan, what, error)
        return
    live.worker.pause()
