"""The figures of the README: import, first picture, warm picture and fidelity, beside diffusers.

    python -m sdrt.benchmarks.first_picture [--json FILE] [--repeats N]

Both sides draw the same prompt from the same checkpoint with DDIM, 20 steps, guidance 7.5, in fp32 on the
same cores. Runs are interleaved (A B A B …) and compared pair by pair, since the machine may be noisy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import sdrt
from sdrt.runtime.files import write_atomically

CHECKPOINT: Final = Path(sdrt.__file__).parent / "models" / "emoji"
PROMPT: Final = "a red apple"
STEPS: Final = 20
GUIDANCE: Final = 7.5

# What must hold; the same numbers stand in the README.
MAX_IMPORT_SECONDS: Final = 0.35
MAX_IMPORT_MB: Final = 70.0
MAX_PROCESS_SECONDS: Final = 4.0
MAX_PROCESS_RATIO: Final = 0.25
MAX_WARM_RATIO: Final = 1.0
MIN_PSNR_DB: Final = 50.0

IMPORT_PROBE: Final = """
import resource, time
start = time.perf_counter()
import sdrt.runtime
from sdrt.runtime import Pipeline
import onnxruntime
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

DIFFUSERS_PROCESS: Final = """
import sys
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
size = dict(height=int(sys.argv[3]), width=int(sys.argv[3]))
image = pipeline(sys.argv[2], num_inference_steps=20, guidance_scale=7.5, generator=generator, **size)
image.images[0].save(sys.argv[4])
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and return 1 if a figure is missed."""
    parser = argparse.ArgumentParser(description="the figures of the README, measured here")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of interleaved runs (5)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    figures: dict[str, Any] = {"machine": machine(), "repeats": arguments.repeats}
    figures["import"] = measure_import(arguments.repeats)
    figures["process"] = measure_process(arguments.repeats)
    figures.update(measure_warm_and_fidelity(4 * arguments.repeats))
    missed = report(figures)
    if arguments.json:
        if math.isinf(figures["psnr_db"]):
            figures["psnr_db"] = None  # the two pictures are equal; JSON has no infinity
        write_atomically(arguments.json, (json.dumps(figures, indent=2, allow_nan=False) + "\n").encode())
    return 1 if missed else 0


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    packages = ("torch", "diffusers", "transformers", "onnxruntime", "numpy")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def measure_import(repeats: int) -> dict[str, float]:
    """Seconds and peak megabytes of a fresh process that imports the runtime and its executor."""
    runs = []
    for _ in range(repeats):
        probe = subprocess.run(
            [sys.executable, "-c", IMPORT_PROBE], capture_output=True, text=True, check=True
        )
        runs.append([float(number) for number in probe.stdout.split()])
    seconds, megabytes = zip(*runs, strict=True)
    return {"seconds": statistics.median(seconds), "megabytes": statistics.median(megabytes)}


def measure_process(repeats: int) -> dict[str, float]:
    """Seconds of a whole process from start to a picture on disk, ours and diffusers'."""
    with tempfile.TemporaryDirectory() as folder:
        picture = str(Path(folder) / "picture.png")
        size = _native_size()
        command = ["-m", "sdrt.runtime.cli", PROMPT, "--sampler", "ddim", "--steps", str(STEPS)]
        ours = [sys.executable, *command, "--guidance-scale", str(GUIDANCE), "--quiet", "-o", picture]
        theirs = [sys.executable, "-c", DIFFUSERS_PROCESS, str(CHECKPOINT), PROMPT, str(size), picture]

        def run(command: list[str]) -> Callable[[], object]:
            return lambda: subprocess.run(command, check=True, capture_output=True)

        for command in (ours, theirs):  # fill the page cache
            run(command)()
        pairs = interleaved(run(ours), run(theirs), repeats)
    return summary(pairs)


def measure_warm_and_fidelity(repeats: int) -> dict[str, Any]:
    """Seconds per picture inside a warm process, and the PSNR between the two pictures."""
    draw_ours, draw_theirs = same_picture()
    decibels = psnr(draw_ours(), draw_theirs())
    return {"warm": summary(interleaved(draw_ours, draw_theirs, repeats)), "psnr_db": decibels}


def same_picture() -> tuple[Callable[[], NDArray[np.uint8]], Callable[[], NDArray[np.uint8]]]:
    """Two functions that draw one picture from the same latents: ours, and diffusers' own pipeline.

    Both return uint8 [H, W, 3].
    """
    import torch

    from sdrt.export.checkpoint import open_checkpoint
    from sdrt.export.reference import reference_pipeline
    from sdrt.runtime import Pipeline

    ours = Pipeline.load()
    theirs = reference_pipeline(open_checkpoint(str(CHECKPOINT)))
    latents = ours.initial_latents(0)
    factor = ours.bundle.manifest.latents.factor
    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    sides = {"height": latents.shape[2] * factor, "width": latents.shape[3] * factor}

    def draw_ours() -> NDArray[np.uint8]:
        output = ours(PROMPT, sampler="ddim", latents=latents, output_type="numpy", **options)
        drawn: NDArray[np.uint8] = output.images[0]
        return drawn

    def draw_theirs() -> NDArray[np.uint8]:
        output = theirs(PROMPT, latents=torch.from_numpy(latents), **sides, **options)
        return np.asarray(output.images[0])

    return draw_ours, draw_theirs


def _native_size() -> int:
    from sdrt.runtime import Bundle

    return Bundle.open().manifest.defaults.height


def interleaved(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int
) -> list[tuple[float, float]]:
    """Seconds of A B A B …, as pairs."""
    pairs = []
    for _ in range(repeats):
        seconds = []
        for run in (ours, theirs):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        pairs.append((seconds[0], seconds[1]))
    return pairs


def summary(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Medians of both sides and of the ratio pair by pair, with the ratio's range."""
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    return {
        "sdrt_seconds": statistics.median(ours for ours, _ in pairs),
        "diffusers_seconds": statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(ratios),
        "ratio_lowest": ratios[0],
        "ratio_highest": ratios[-1],
    }


def psnr(actual: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB; infinite for equal ones."""
    error = float(np.mean((actual.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def report(figures: dict[str, Any]) -> list[str]:
    """Print what was measured beside what is asked; return the names of the figures that are missed."""
    process, warm = figures["process"], figures["warm"]
    rows = [
        ("import, seconds", figures["import"]["seconds"], "<=", MAX_IMPORT_SECONDS),
        ("import, MB", figures["import"]["megabytes"], "<=", MAX_IMPORT_MB),
        ("process to picture, seconds", process["sdrt_seconds"], "<=", MAX_PROCESS_SECONDS),
        ("  diffusers", process["diffusers_seconds"], "", math.nan),
        ("  ratio to diffusers", process["ratio"], "<=", MAX_PROCESS_RATIO),
        ("warm picture, seconds", warm["sdrt_seconds"], "", math.nan),
        ("  diffusers", warm["diffusers_seconds"], "", math.nan),
        ("  ratio to diffusers", warm["ratio"], "<=", MAX_WARM_RATIO),
        ("PSNR to diffusers, dB", figures["psnr_db"], ">=", MIN_PSNR_DB),
    ]
    here = figures["machine"]
    print(f"{here['cpu']}, {here['cores']} cores, Python {here['python']}, {here['versions']}")
    missed = []
    for name, value, sign, bound in rows:
        good = {"<=": value <= bound, ">=": value >= bound, "": True}[sign]
        verdict = "" if not sign else f"asked {sign} {bound:g}{'' if good else '   MISSED'}"
        print(f"{name:30} {value:8.3f}   {verdict}")
        if not good:
            missed.append(name.strip())
    return missed


if __name__ == "__main__":
    sys.exit(main())
