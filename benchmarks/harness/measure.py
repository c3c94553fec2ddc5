"""A whole run of ``sd-bench``: every model, block after block."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from sdrt.benchmarks.document.document import Ceilings, Document, Model
from sdrt.benchmarks.document.recorder import Recorder
from sdrt.benchmarks.harness.cold import measure_cold
from sdrt.benchmarks.harness.fidelity import REFERENCES, measure_fidelity
from sdrt.benchmarks.harness.operations import count_bundle, weight_elements
from sdrt.benchmarks.harness.plan import (
    ModelPlan,
    backend_plans,
    check_peers,
    find_model,
    peer_plans,
    reference_plan,
    settings_for,
)
from sdrt.benchmarks.harness.profiles import measure_profiles
from sdrt.benchmarks.harness.progress import Progress
from sdrt.benchmarks.harness.run import SAMPLER, Run, Settings, SubjectPlan
from sdrt.benchmarks.harness.warm import measure_warm
from sdrt.benchmarks.harness.worker_process import worker_environment
from sdrt.runtime.errors import SdrtError, UsageError
from sdrt.runtime.system.child_process import run_told

FLOAT32_BYTES: Final = 4
CEILINGS_SECONDS: Final = 600.0


def measure(
    arguments: argparse.Namespace,
    command: Sequence[str],
    write: Callable[[Document, bool], None],
    interrupted: Callable[[str], Exception],
) -> Recorder:
    """Measure what the command asks for.

    Args:
        arguments: Of `bench_options.parser`.
        command: The words of the command.
        write: Writes the report as it stands, after each block; told whether it is the last time.
        interrupted: Makes the error for Ctrl-C from its message.

    Raises:
        SdrtError: Nothing can be measured; what fails later is a row of the report.
    """
    words = arguments.models or ["emoji"]
    with (
        Progress(quiet=arguments.quiet) as progress,
        tempfile.TemporaryDirectory(prefix="sd-bench-") as folder,
    ):
        check_peers(arguments)
        models = [find_model(word, arguments, progress) for word in dict.fromkeys(words)]
        _check_models(models, arguments)
        recorder = Recorder(command, write)
        ends = math.inf if arguments.seconds is None else time.monotonic() + arguments.seconds
        try:
            for index, model in enumerate(models):
                place = Path(folder) / str(index)
                place.mkdir()
                run = _prepare(model, arguments, recorder, progress, place)
                now = time.monotonic()
                run.deadline = now + (ends - now) / (len(models) - index)
                measure_model(run, model)
        except KeyboardInterrupt:
            recorder.save(last=True)
            where = "nothing was kept, for want of --report"
            if arguments.report is not None:
                where = f"what was measured until then is in {arguments.report}"
            raise interrupted(f"interrupted; {where}") from None
        recorder.save(complete=True)
        return recorder


def _check_models(models: list[ModelPlan], arguments: argparse.Namespace) -> None:
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise UsageError(f"two models have one name: {', '.join(names)}; rename a folder")
    if arguments.checkpoint is not None and len(models) > 1:
        raise UsageError("--checkpoint goes with one MODEL")


def _prepare(
    model: ModelPlan, arguments: argparse.Namespace, recorder: Recorder, progress: Progress, folder: Path
) -> Run:
    manifest = model.bundle.manifest
    settings = settings_for(manifest, arguments, progress.note)
    weights = weight_elements(model.bundle) * FLOAT32_BYTES
    entry = Model(
        name=model.name,
        source=model.source,
        weights_bytes=weights,
        sampler=SAMPLER,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        prompt=settings.prompt,
        threads=settings.threads,
        sizes=settings.sizes,
    )
    recorder.set_model(entry)
    plans = backend_plans(model, arguments, settings, recorder, progress)
    for plan in plans:
        recorder.set_subject(plan.subject)  # ours first: the first one is what ratios compare
    recorder.save()  # a folder that cannot be written is found before the minutes of measuring
    plans += peer_plans(model, arguments, recorder, progress)
    if not plans:
        raise UsageError(f"there is nothing to measure {model.name} with: see --backends and --peers")
    for plan in plans:
        recorder.set_subject(plan.subject)
    reference = _reference(model, settings, plans, progress)
    if reference is not None and reference.subject.device == "cuda":
        recorder.set_model(replace(entry, reference="diffusers in fp16 on the GPU"))
    return Run(
        model=model.name,
        weights_bytes=weights,
        channels=manifest.latents.channels,
        factor=manifest.latents.factor,
        plans=tuple(plans),
        settings=settings,
        recorder=recorder,
        progress=progress,
        folder=folder,
        reference=reference,
    )


def _reference(
    model: ModelPlan, settings: Settings, plans: list[SubjectPlan], progress: Progress
) -> SubjectPlan | None:
    """diffusers for fidelity: as a peer, first that on the processor, or else for this alone."""
    known = {plan.name: plan for plan in plans}
    for name in REFERENCES:
        if name in known:
            return known[name]
    if "fidelity" not in settings.blocks or all(plan.subject.device == "cuda" for plan in plans):
        return None
    try:
        progress.block(f"{model.name}: the reference's form of the model", 1)
        return reference_plan(model, progress.ongoing)
    except SdrtError as error:
        progress.note(f"no reference: {error}")
        return None


def measure_model(run: Run, model: ModelPlan) -> None:
    """Every block that was asked for; the report is written after each."""
    blocks = run.settings.blocks
    if "limits" in blocks:
        _measure_limits(run, model)
    if "cold" in blocks:
        measure_cold(run)
    if "warm" in blocks or "growth" in blocks:
        measure_warm(run)
    if "fidelity" in blocks:
        measure_fidelity(run)
    if "profile" in blocks:
        measure_profiles(run)
    run.recorder.save()


def _measure_limits(run: Run, model: ModelPlan) -> None:
    run.progress.block(f"{run.model}: the machine's limits", 1)
    recorder, settings = run.recorder, run.settings
    devices = {plan.subject.device for plan in run.plans}
    wanted = [(*size, 1) for size in settings.sizes]
    if "cuda" in devices:  # where networks are timed at every batch, too
        wanted += [(*settings.sizes[0], batch) for batch in settings.batches if batch > 1]
    try:
        work = [entry for size in wanted for entry in count_bundle(model.bundle, *size)]
        recorder.set_work(run.model, work)
    except SdrtError as error:
        recorder.fail(run.model, "", "counting operations", error)
        run.progress.note(f"operations were not counted: {error}")
    for device in sorted(devices - set(recorder.ceilings)):
        try:
            recorder.ceilings[device] = measured_ceilings(settings.threads, device, quick=settings.quick)
        except SdrtError as error:
            recorder.fail("", "", "ceilings", error)
            run.progress.note(str(error))
    recorder.save()


def measured_ceilings(threads: int, device: str, *, quick: bool) -> Ceilings:
    """The ceilings of ``cpu`` or ``cuda``, measured by a process of its own.

    Raises:
        SdrtError: It failed.
    """
    words = [sys.executable, "-m", "sdrt.benchmarks.harness.ceilings", "--threads", str(threads)]
    done = run_told(
        [*words, "--device", device, *(["--quick"] if quick else [])],
        environment=worker_environment(threads, {"OPENBLAS_NUM_THREADS": str(threads)}),
        seconds=CEILINGS_SECONDS,
    )
    if done.status != 0:
        last = done.last_line or "it gave no reason"
        raise SdrtError(f"the ceilings were not measured: exit status {done.status}: {last}")
    return Ceilings(**json.loads(done.output))
