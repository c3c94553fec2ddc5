"""Fidelity: each subject's picture and final latents beside those of PyTorch in fp32, from equal latents."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.benchmarks.harness.run import Run, SubjectPlan, WorkerErrors

REFERENCES: Final = ("diffusers", "diffusers-cuda")


def measure_fidelity(run: Run) -> None:
    """Compare every subject with the reference, which is drawn if need be; none without a reference."""
    reference = run.reference
    if reference is None:
        why = "no diffusers: `sd-bench peers install diffusers`, and name the checkpoint with --checkpoint"
        run.recorder.fail(run.model, REFERENCES[0], "fidelity", why)
        run.progress.note(f"fidelity is not measured: {why}")
        return
    plans = [reference, *(plan for plan in run.usable() if plan is not reference)]
    run.progress.block(f"{run.model}: fidelity", len(plans))
    for plan in plans:
        run.progress.working(plan.name)
        if plan.name not in run.drawn and not _draw(run, plan):
            if plan is reference:
                return
            continue
        if plan is not reference:
            _compare(run, plan, reference)
        run.progress.advance()
    run.recorder.save()


def drawing_files(run: Run, plan: SubjectPlan) -> dict[str, Path]:
    """Where a subject's picture and latents at the main setting are kept."""
    names = ("pixels", "final_latents")
    return {name: run.folder / f"fidelity-{plan.name}-{name}.npy" for name in names}


def _draw(run: Run, plan: SubjectPlan) -> bool:
    try:
        with run.start(plan) as worker:
            run.load(worker, plan)
            run.draw(worker, run.settings.main, files=drawing_files(run, plan))
    except WorkerErrors as error:
        run.fail(plan, "fidelity", error)
        return False
    run.drawn.add(plan.name)
    return True


def _compare(run: Run, plan: SubjectPlan, reference: SubjectPlan) -> None:
    mine, expected = drawing_files(run, plan), drawing_files(run, reference)
    measures = {"pixels": ("psnr", psnr), "final_latents": ("latent_error", latent_error)}
    for name, (quantity, measure) in measures.items():
        if not mine[name].exists() or not expected[name].exists():
            who = plan if not mine[name].exists() else reference
            run.recorder.fail(run.model, plan.name, quantity, f"{who.name} does not give its {name}")
            continue
        value = measure(np.load(mine[name]), np.load(expected[name]))
        if math.isnan(value):
            run.recorder.fail(run.model, plan.name, quantity, "NaN, or arrays of different shapes")
            continue
        run.add(plan, quantity, run.settings.main, [value], 0)


def psnr(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB; infinite if equal, NaN for other shapes."""
    if actual.shape != expected.shape:
        return math.nan
    error = float(np.mean((actual.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def latent_error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """Norm of the difference over the norm of what is expected; NaN for other shapes."""
    if actual.shape != expected.shape:
        return math.nan
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
