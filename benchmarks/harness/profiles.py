"""Which kernels a step spends its time in, and what the host does for it: of every backend on a GPU."""

from __future__ import annotations

from typing import Any

from sdrt.benchmarks.document.document import Kernel, Profile
from sdrt.benchmarks.harness.run import Run, SubjectPlan, WorkerErrors


def measure_profiles(run: Run) -> None:
    """Profile each of our backends on a GPU at every batch, in a process of its own."""
    ours = [plan for plan in run.usable() if plan.subject.kind == "backend"]
    plans = [plan for plan in ours if plan.subject.device == "cuda"]
    if plans:
        run.progress.block(f"{run.model}: profile", len(plans))
    for plan in plans:
        run.progress.working(plan.name)
        try:
            with run.start(plan) as worker:
                run.load(worker, plan)
                for batch in run.settings.batches:
                    answer = worker.request("profile", timeout=run.settings.draw_seconds, batch=batch)
                    run.recorder.profiles.append(_profile(run, plan, batch, answer))
        except WorkerErrors as error:
            run.fail(plan, "profile", error)
        run.progress.advance()
        run.recorder.save()


def _profile(run: Run, plan: SubjectPlan, batch: int, answer: dict[str, Any]) -> Profile:
    kernels = tuple(Kernel(**kernel) for kernel in answer["kernels"])
    facts = {name: answer[name] for name in ("seconds", "launches", "host")}
    return Profile(run.model, plan.name, batch, kernels=kernels, **facts)
