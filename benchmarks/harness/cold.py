"""Cold starts: a fresh process to the first picture on disk, A B C A B C …"""

from __future__ import annotations

import time
from typing import Final

from sdrt.benchmarks.harness.run import Run, SubjectPlan, WorkerErrors

SLOW_SECONDS: Final = 60.0  # a subject that takes longer has a third of the rounds


def measure_cold(run: Run) -> None:
    """Measure the quantities ``cold_…`` of every subject; one that fails is a row, the others go on."""
    rounds, over = run.settings.cold_rounds, run.share(0.35)
    plans = run.usable()
    run.progress.block(f"{run.model}: cold start", len(plans) * (rounds + 1))
    wanted: dict[str, int] = {}
    for plan in plans:
        seconds = _round(run, plan, None)  # files come into the page cache, compilers fill theirs
        if seconds is not None:
            wanted[plan.name] = rounds if seconds <= SLOW_SECONDS else max(1, rounds // 3)
    for number in range(rounds):
        if number and time.monotonic() > over:
            run.progress.note(f"cold start: {number} of {rounds} rounds in the time that was given")
            break
        run.recorder.probe()
        for plan in plans:
            if number < wanted.get(plan.name, 0) and _round(run, plan, number) is None:
                wanted[plan.name] = 0
        run.recorder.save()


def _round(run: Run, plan: SubjectPlan, number: int | None) -> float | None:
    """One fresh process; None if it failed. Without a number nothing is recorded."""
    run.progress.working(plan.name)
    setting, stage = run.settings.main, "cold start"
    image = run.folder / f"{plan.name}.png"
    image.unlink(missing_ok=True)
    run.latents(setting)  # made before the clock starts
    try:
        with run.start(plan) as worker:
            loaded = run.load(worker, plan, sample=True)
            drawn = run.draw(worker, setting, sample=True, files={"image": image})
            total = time.perf_counter() - worker.started_at
            memory = worker.memory()
    except WorkerErrors as error:
        if number is None:
            run.broken.add(plan.name)
        run.fail(plan, stage, error)
        return None
    run.progress.advance()
    if number is None:
        return total
    if number == 0 and plan.installed_bytes is not None:
        run.add(plan, "installed_size", setting, [plan.installed_bytes], number)
    values = {
        "cold_total": total,
        "cold_start": worker.start_seconds,
        "cold_import": loaded["import_seconds"],
        "cold_load": loaded["load_seconds"],
        "cold_image": drawn["seconds"],
        "cold_save": drawn["save_seconds"],
        "cold_peak_memory": memory["VmHWM"],
        "cold_peak_anonymous": worker.peak_anonymous,
    }
    for quantity, value in values.items():
        run.add(plan, quantity, setting, [value], number)
    return total
