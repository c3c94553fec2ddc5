"""One architecture on one GPU: sdrt's backends beside diffusers, eager and compiled, interleaved.

Runs as a child process of `sdrt.benchmarks.gpu`, which may end it at any time: what was measured is written
after every row of the table.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sdrt.benchmarks.gpu_peers import GUIDANCE, DiffusersPeer, Drawing, Texts
from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.parity.components import compare
from sdrt.runtime import Bundle, Pipeline
from sdrt.runtime.errors import SdrtError
from sdrt.runtime.text.tokenizer import Tokenizer

STAGES: Final = ("step", "text_encoder", "vae_decoder", "total")

Save = Callable[[dict[str, Any]], None]
_NUMBERS: Final = itertools.count()


def new_texts() -> Texts:
    """Texts that nobody has drawn yet: one seen before may come from a cache, its encoding free."""
    number = next(_NUMBERS)
    return Texts(f"a photograph of an astronaut riding a horse, number {number}", f"blurred, number {number}")


class Contender(Protocol):
    """Something that draws from given latents."""

    name: str

    def draw(self, texts: Texts, latents: NDArray[np.float32], steps: int) -> Drawing:
        """See `DiffusersPeer.draw`."""
        ...


class SdrtContender:
    """One of sdrt's backends."""

    def __init__(self, bundle: Bundle, backend: str) -> None:
        self.name = f"sdrt {backend}"
        self.pipeline = Pipeline.load(bundle, backend=backend, verify=False)

    def draw(self, texts: Texts, latents: NDArray[np.float32], steps: int) -> Drawing:
        """See `DiffusersPeer.draw`."""
        started = time.perf_counter()
        output = self.pipeline(
            [texts.prompt] * len(latents),
            negative_prompt=texts.negative,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            sampler="ddim",
            latents=latents,
            output_type="numpy",
        )
        seconds = {**output.timings, "total": time.perf_counter() - started}
        return Drawing(seconds, output.latents, output.images)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to time. ``deadline`` is a `time.monotonic` after which no new contender or row is begun.

    ``compiled`` adds torch.compile, which takes minutes at every batch: in a run of its own, after the rest.
    """

    size: int
    batches: Sequence[int]
    steps: Sequence[int]
    repeats: int
    deadline: float
    compiled: bool = False


def time_architecture(
    checkpoint: Checkpoint,
    bundle: Bundle,
    backends: Sequence[str],
    device: torch.device,
    plan: Plan,
    save: Save,
) -> dict[str, Any]:
    """Load every contender, then time all of them in turns at each batch and number of steps.

    Returns:
        ``contenders``: name → load seconds, or why it could not run; ``rows``: one per batch and steps with
        seconds per stage (medians) and ratios; ``fidelity``: errors against diffusers from equal latents.
    """
    found: dict[str, Any] = {"contenders": {}, "rows": [], "fidelity": {}}
    contenders = _load_all(checkpoint, bundle, backends, device, plan, found)
    save(found)
    generator = np.random.default_rng(0)
    for batch in plan.batches:
        latents = _latents(bundle, batch, plan.size, generator)
        running = _warmed_up(contenders, latents, plan, found)
        if batch == plan.batches[0]:
            found["fidelity"] = fidelity(running, latents, plan.steps[0])
        for steps in plan.steps:
            if time.monotonic() > plan.deadline:
                found["rows"].append({"batch": batch, "steps": steps, "not_run": "out of time"})
                continue
            found["rows"].append(time_row(running, latents, steps, plan.repeats))
            save(found)
    save(found)
    return found


def _load_all(
    checkpoint: Checkpoint,
    bundle: Bundle,
    backends: Sequence[str],
    device: torch.device,
    plan: Plan,
    found: dict[str, Any],
) -> list[Contender]:
    makers: dict[str, Callable[[], Contender]] = {
        f"sdrt {backend}": lambda backend=backend: SdrtContender(bundle, backend)  # type: ignore[misc]
        for backend in backends
    }
    makers["diffusers"] = lambda: DiffusersPeer(checkpoint, bundle_tokenizer(bundle), device, compiled=False)
    if plan.compiled:
        makers["torch.compile"] = lambda: DiffusersPeer(
            checkpoint, bundle_tokenizer(bundle), device, compiled=True
        )
    contenders = []
    for name, make in makers.items():
        started = time.perf_counter()
        try:
            contenders.append(make())
        except (SdrtError, ImportError, RuntimeError) as error:
            found["contenders"][name] = {"not_run": _one_line(error)}
            continue
        found["contenders"][name] = {"load_seconds": time.perf_counter() - started}
    return contenders


def _warmed_up(
    contenders: Sequence[Contender],
    latents: NDArray[np.float32],
    plan: Plan,
    found: dict[str, Any],
) -> list[Contender]:
    """Those that draw at this batch; compiling and capturing happen here, outside of what is timed."""
    running = []
    for contender in contenders:
        record = found["contenders"][contender.name]
        key = f"batch_{len(latents)}"
        if time.monotonic() > plan.deadline:
            record[key] = {"not_run": "out of time"}
            continue
        started = time.perf_counter()
        try:
            for _ in range(2):
                contender.draw(new_texts(), latents, 2)
        except (SdrtError, RuntimeError) as error:
            record[key] = {"not_run": _one_line(error)}
            continue
        record[key] = {"warm_up_seconds": time.perf_counter() - started}
        running.append(contender)
    return running


def time_row(
    contenders: Sequence[Contender],
    latents: NDArray[np.float32],
    steps: int,
    repeats: int,
) -> dict[str, Any]:
    """A B C A B C …: medians per stage, and each one's ratio to diffusers turn by turn."""
    turns = [
        {one.name: one.draw(new_texts(), latents, steps).seconds for one in contenders}
        for _ in range(repeats)
    ]
    row: dict[str, Any] = {"batch": len(latents), "steps": steps, "repeats": repeats, "contenders": {}}
    for contender in contenders:
        runs = [turn[contender.name] for turn in turns]
        stages = {stage: summary([run[stage] for run in runs]) for stage in STAGES}
        if "diffusers" in turns[0]:
            stages["ratio_to_diffusers"] = summary(
                [turn[contender.name]["total"] / turn["diffusers"]["total"] for turn in turns]
            )
        row["contenders"][contender.name] = stages
    return row


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def fidelity(contenders: Sequence[Contender], latents: NDArray[np.float32], steps: int) -> dict[str, Any]:
    """Every contender's final latents beside diffusers', from one prompt and the same initial latents.

    Each is a chain of its own roundings in the precision of the run; the tests marked ``gpu`` hold every
    component to a tolerance, this shows what is left after a whole run.
    """
    texts = new_texts()
    drawn: Mapping[str, Drawing] = {one.name: one.draw(texts, latents, steps) for one in contenders}
    reference = drawn.get("diffusers")
    figures: dict[str, Any] = {}
    for name, drawing in drawn.items():
        figures[name] = {
            "finite": bool(np.isfinite(drawing.latents).all()),
            "latents_rms": float(np.sqrt(np.mean(np.square(drawing.latents, dtype=np.float64)))),
        }
        if reference is not None:
            l2, largest = compare(drawing.latents, reference.latents)
            figures[name] |= {"relative_l2_to_diffusers": l2, "largest": largest}
    return figures


def bundle_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer of a bundle."""
    facts = bundle.manifest.tokenizers[0]
    return Tokenizer.from_file(
        bundle.file(facts.file), max_length=facts.max_length, bos=facts.bos, eos=facts.eos, pad=facts.pad
    )


def _latents(bundle: Bundle, batch: int, size: int, generator: np.random.Generator) -> NDArray[np.float32]:
    geometry = bundle.manifest.latents
    side = size // geometry.factor
    return generator.standard_normal((batch, geometry.channels, side, side), dtype=np.float32)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"
