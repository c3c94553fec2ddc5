"""One run of ``sd-bench`` on one model: what all measurements share, and how they ask workers."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sdrt.benchmarks.document.document import Setting, Subject
from sdrt.benchmarks.document.recorder import Recorder
from sdrt.benchmarks.harness.progress import Progress
from sdrt.benchmarks.harness.worker_process import RefusedError, Worker, WorkerError, worker_environment
from sdrt.benchmarks.options import ONLY

SAMPLER: Final = "ddim"
WorkerErrors: Final = (WorkerError, RefusedError)


@dataclass(frozen=True, slots=True)
class SubjectPlan:
    """How one subject is run.

    Attributes:
        subject: Its entry in the report.
        words: The command of its worker.
        model: What it loads: a bundle, or a peer's form of the checkpoint.
        environment: What its worker needs in the environment beyond the usual.
        installed_bytes: Files of the distributions it needs; None where that is unknown.
    """

    subject: Subject
    words: tuple[str, ...]
    model: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    installed_bytes: int | None = None

    @property
    def name(self) -> str:
        """As on the command line."""
        return self.subject.name


@dataclass(frozen=True, slots=True)
class Settings:
    """What was asked for, the same for every subject.

    Attributes:
        steps: Of a picture.
        sizes: Height and width in pixels, the main one first.
        batches: Pictures drawn together.
        growth_steps: Numbers of steps for growth.
        rounds: Of warm measurements.
        growth_rounds: Of each point of growth.
        cold_rounds: Of fresh processes.
        threads: Of each subject.
        guidance_scale: Of every step.
        blocks: Which of `sdrt.benchmarks.options.ONLY`.
        prompt: Text.
        seed: Of the latents.
        quick: A smoke run: small ceilings.
        load_seconds: That loading may take.
        draw_seconds: That a drawing or a stage may take.
    """

    steps: int
    sizes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    growth_steps: tuple[int, ...]
    rounds: int
    growth_rounds: int
    cold_rounds: int
    threads: int
    guidance_scale: float = 7.5
    blocks: tuple[str, ...] = ONLY
    prompt: str = "a red apple"
    seed: int = 0
    quick: bool = False
    load_seconds: float = 900.0
    draw_seconds: float = 1800.0

    @property
    def main(self) -> Setting:
        """Where subjects are compared in one number."""
        return Setting(*self.sizes[0], 1, self.steps)


@dataclass(slots=True)
class Run:
    """What measuring one model shares.

    Attributes:
        model: Its name in the report.
        weights_bytes: Of all components in fp32.
        channels: Of the latents.
        factor: Pixels per latent.
        plans: The subjects, the one that others are compared with first.
        settings: What was asked for.
        recorder: Takes the figures.
        progress: Tells people.
        folder: For files that last as long as the run.
        reference: What fidelity is measured against, a subject or not; None where it cannot be run.
        deadline: ``time.monotonic()`` at which the run should be over.
        broken: Names of subjects that cannot even load: they are not tried again.
        drawn: Subjects whose picture and latents at the main setting are in `folder`.
    """

    model: str
    weights_bytes: int
    channels: int
    factor: int
    plans: tuple[SubjectPlan, ...]
    settings: Settings
    recorder: Recorder
    progress: Progress
    folder: Path
    reference: SubjectPlan | None = None
    deadline: float = math.inf
    broken: set[str] = field(default_factory=set)
    drawn: set[str] = field(default_factory=set)

    def usable(self) -> list[SubjectPlan]:
        """The subjects that were not found broken."""
        return [plan for plan in self.plans if plan.name not in self.broken]

    def share(self, part: float) -> float:
        """The moment, by ``time.monotonic()``, when a block is over that may use a part of the time left."""
        now = time.monotonic()
        return now + max(self.deadline - now, 0.0) * part

    def start(self, plan: SubjectPlan) -> Worker:
        """Start a subject's worker, without a model.

        Raises:
            WorkerError: It does not start.
        """
        environment = worker_environment(self.settings.threads, plan.environment)
        if plan.words[0] != sys.executable:
            environment.pop("PYTHONPATH", None)  # of this interpreter, not of a peer's
        return Worker(
            plan.words, environment=environment, log=self.folder / f"{plan.name}.log", cwd=self.folder
        )

    def load(self, worker: Worker, plan: SubjectPlan, *, sample: bool = False) -> dict[str, Any]:
        """Load the model and record what the subject says of itself.

        Raises:
            WorkerError: The worker is gone.
            RefusedError: It cannot load this model.
        """
        answer = worker.request(
            "load",
            timeout=self.settings.load_seconds,
            sample=sample,
            model=str(plan.model),
            threads=self.settings.threads,
        )
        if plan in self.plans:
            self.recorder.describe(plan.name, answer.get("versions", {}), answer.get("notes", ()))
        return answer

    def draw(
        self,
        worker: Worker,
        setting: Setting,
        *,
        sample: bool = False,
        prompt: str | None = None,
        files: Mapping[str, Path] | None = None,
    ) -> dict[str, Any]:
        """Draw.

        Args:
            worker: Loaded.
            setting: Size, batch and steps.
            sample: See `Worker.request`.
            prompt: In place of the settings' own.
            files: Where to write ``image``, ``pixels``, ``final_latents``; what is left out is not written.

        Raises:
            WorkerError: The worker is gone.
            RefusedError: It cannot draw this.
        """
        names = ("image", "pixels", "final_latents")
        return worker.request(
            "draw",
            timeout=self.settings.draw_seconds,
            sample=sample,
            prompt=self.settings.prompt if prompt is None else prompt,
            negative_prompt="",
            latents=str(self.latents(setting)),
            seed=self.settings.seed,
            steps=setting.steps,
            guidance_scale=self.settings.guidance_scale,
            sampler=SAMPLER,
            height=setting.height,
            width=setting.width,
            **{name: str(files[name]) if files and name in files else None for name in names},
        )

    def latents(self, setting: Setting) -> Path:
        """A file of the initial latents: float32 [N, C, h, w], the same for every subject."""
        import numpy as np

        shape = (setting.batch, self.channels, setting.height // self.factor, setting.width // self.factor)
        file = self.folder / f"latents-{'x'.join(map(str, shape))}.npy"
        if not file.exists():
            generator = np.random.default_rng(self.settings.seed)
            np.save(file, generator.standard_normal(shape, dtype=np.float32))
        return file

    def add(
        self, plan: SubjectPlan, quantity: str, setting: Setting, values: list[float], number: int
    ) -> None:
        """Record values of one round."""
        self.recorder.add(self.model, plan.name, quantity, setting, values, number)

    def fail(self, plan: SubjectPlan, stage: str, error: Exception) -> None:
        """Record what could not be measured, and say so."""
        self.recorder.fail(self.model, plan.name, stage, error)
        self.progress.note(f"{plan.name}: {stage} failed: {error}")
