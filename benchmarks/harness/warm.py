"""Warm drawings: workers that are loaded stay alive, and all but the one that works are stopped.

Rounds go A B C A B C …, so that what one round compares was measured under the same conditions. Where memory
does not suffice for all subjects at once, they are measured in groups that each hold the first one. Where it
does not suffice for two, each turn of a round starts its subject anew and ends it: one is held at a time, and
loading is not in the figures.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from sdrt.benchmarks.document.document import MemoryShortage, Setting
from sdrt.benchmarks.harness.fidelity import drawing_files
from sdrt.benchmarks.harness.free_memory import available_memory, free_gpu_memory
from sdrt.benchmarks.harness.run import Run, SubjectPlan, WorkerErrors
from sdrt.benchmarks.harness.worker_process import RefusedError, Worker, WorkerError
from sdrt.runtime.errors import BackendError, SdrtError

STAGE_SECONDS: Final = 0.1  # a stage that is shorter is timed several times in a round
MAX_REPEATS: Final = 5
# What a subject may need beyond the weights: copies while loading, packed weights, activations.
WEIGHTS_FACTOR: Final = 2.5
BASE_BYTES: Final = 1 << 30
WARM_UP_STEPS: Final = 2  # the second one finds what the first one allocated


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
    """One setting to be measured, for some rounds, with the stages alone or without.

    Attributes:
        setting: The setting.
        rounds: How many.
        stages: Whether the stages are timed alone, too.
        first: The number of its first round.
    """

    setting: Setting
    rounds: int
    stages: bool
    first: int = 0


def measure_warm(run: Run) -> None:
    """Measure drawings, stages, memory and growth of every subject; one that fails is a row."""
    waiting = _that_can_be_tried(run)
    first: Live | None = None
    with contextlib.ExitStack() as held:
        while True:
            # The one that the others are compared with stays loaded; another takes its place if it dies.
            while waiting and (first is None or first.plan.name in run.broken):
                first = _load(run, waiting.pop(0), held)
            if first is None or first.plan.name in run.broken:
                return
            if waiting and not fits(free := room([first]), run.weights_bytes):
                held.close()
                _measure_alone(run, first, waiting, free)
                return
            with contextlib.ExitStack() as others:
                group = [first]
                while waiting and fits(room(group), run.weights_bytes):
                    if live := _load(run, waiting.pop(0), others):
                        group.append(live)
                names = ", ".join(live.plan.name for live in group)
                _measure_group(run, group)
            if not waiting:
                return
            run.progress.note(f"memory does not suffice for more subjects beside {names}: another group")


def _that_can_be_tried(run: Run) -> list[SubjectPlan]:
    """The usable subjects; without free memory for the weights alone, those on the CPU become rows."""
    plans, free = run.usable(), available_memory()
    if free >= needed(run.weights_bytes):
        return plans
    # A GPU's weights are in its own memory, for the most part.
    on_cpu = [plan for plan in plans if plan.subject.device == "cpu"]
    facts = f"{in_gb(free)} of memory are free, and the weights alone take {in_gb(run.weights_bytes)} in fp32"
    if free < run.weights_bytes:
        for plan in on_cpu:
            run.fail(plan, "loading", SdrtError(f"{facts}: it would read them from the disk in every step"))
            run.broken.add(plan.name)
        return run.usable()
    run.progress.note(f"memory may be too short even for one subject: {facts}")
    run.recorder.set_shortage(run.model, MemoryShortage(0, free, needed(run.weights_bytes)))
    return plans


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
    return available >= needed(weights_bytes)


def needed(weights_bytes: int) -> int:
    """Bytes that a subject may need, from those of the model's weights in fp32."""
    return int(WEIGHTS_FACTOR * weights_bytes) + BASE_BYTES


def in_gb(size: int) -> str:
    """Bytes in words."""
    return f"{size / 1e9:.1f} GB"


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
        on_gpu = any(plan.subject.device == "cuda" for plan in run.plans)
        found += [Point(main._replace(batch=batch), rounds, stages=on_gpu) for batch in wanted.batches]
    unique: dict[Setting, Point] = {}
    for point in found:
        unique.setdefault(point.setting, point)
    return list(unique.values())


def _load(run: Run, plan: SubjectPlan, stack: contextlib.ExitStack, *, again: bool = False) -> Live | None:
    """Load a subject, draw once at the main setting, and stop it; None if it fails.

    ``again`` is a process of a subject that was loaded before: it draws just enough to be warm.
    """
    run.progress.block(f"{run.model}: loading", 1)
    run.progress.working(plan.name)
    stage = "loading"
    before = None if again else _free_on_gpu(run, plan)
    try:
        worker = run.start(plan)
        stack.callback(worker.kill)
        loaded = run.load(worker, plan)
        stage = "first drawing"
        setting = run.settings.main
        if again:
            run.draw(worker, setting._replace(steps=min(WARM_UP_STEPS, setting.steps)))
        else:
            run.draw(worker, setting, files=drawing_files(run, plan))
    except WorkerErrors as error:
        run.broken.add(plan.name)
        run.fail(plan, stage, error)
        return None
    run.drawn.add(plan.name)
    if "warm" in run.settings.blocks and not again:
        memory = worker.memory()
        run.add(plan, "memory", setting, [memory["VmRSS"]], 0)
        run.add(plan, "peak_memory", setting, [memory["VmHWM"]], 0)
        after = None if before is None else _free_on_gpu(run, plan)
        if before is not None and after is not None:
            run.add(plan, "gpu_memory", setting, [max(before - after, 0)], 0)
    worker.pause()
    return Live(plan, worker, tuple(loaded["stages"]))


def _free_on_gpu(run: Run, plan: SubjectPlan) -> int | None:
    """Free bytes of the GPU, for a subject that runs there; None for others, and where nobody knows."""
    if plan.subject.device != "cuda" or "warm" not in run.settings.blocks:
        return None
    try:
        return free_gpu_memory()
    except BackendError as error:
        run.fail(plan, "gpu_memory", error)
        return None


def _measure_alone(run: Run, first: Live, waiting: Sequence[SubjectPlan], free: int) -> None:
    """Rounds in which each subject is started, warmed up, measured at every point, and ended.

    Args:
        run: The run.
        first: Loaded once already and ended since.
        waiting: The others.
        free: Bytes that there were beside the first one.
    """
    run.recorder.set_shortage(run.model, MemoryShortage(1, free, needed(run.weights_bytes)))
    run.progress.note(
        f"memory does not suffice for two subjects ({in_gb(free)} are free beside {first.plan.name}, another "
        f"one may need {in_gb(needed(run.weights_bytes))}): each is started anew for its turn in every round"
    )
    wanted, plans, over = points(run), [first.plan, *waiting], run.share(1.0)
    rounds = max((point.rounds for point in wanted), default=0)
    begin = {point: run.recorder.rounds(run.model, "image", point.setting) for point in wanted}
    known = {first.plan.name: first}
    for number in range(rounds):
        if number and time.monotonic() > over:
            run.progress.note(f"one subject at a time: {number} of {rounds} rounds in the time given")
            break
        now = [point for point in wanted if number < point.rounds]
        for plan in plans:
            if plan.name not in run.broken:
                run.recorder.probe()
                _turn(run, plan, known, [replace(point, first=begin[point] + number) for point in now])
        run.recorder.save()


def _turn(run: Run, plan: SubjectPlan, known: dict[str, Live], now: Sequence[Point]) -> None:
    """One subject's part of a round: a fresh process that draws each point once after a warm-up.

    ``known`` keeps, from one process to the next, what a subject refused and how long its stages take.
    """
    with contextlib.ExitStack() as held:
        live = _load(run, plan, held, again=plan.name in known)
        if live is None:
            return
        before = known.setdefault(plan.name, live)
        live.refused, live.seconds = before.refused, before.seconds
        run.progress.block(f"{run.model}: {plan.name}, alone, round {now[0].first + 1}", len(now))
        group, warm = [live], run.settings.main
        for point in now:
            same = point.setting._replace(steps=warm.steps) == warm
            if not same and point.setting not in live.refused:
                steps = min(WARM_UP_STEPS, point.setting.steps)
                _warm_up(run, group, point.setting._replace(steps=steps), point.setting)
            warm = point.setting
            _round(run, live, point, point.first, group)


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


def _warm_up(run: Run, group: list[Live], setting: Setting, of: Setting | None = None) -> None:
    """A drawing that does not count: buffers of a new size, and compilers; ``of`` is what it prepares for."""
    of = of or setting
    for live in list(group):
        with _awake(run, live, f"drawing {of}", group, of):
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
