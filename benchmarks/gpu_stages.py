"""The measuring stages of ``make gpu``, each run as a process of its own.

    python -m sdrt.benchmarks.gpu_stages STAGE RESULT.json [options]

A stage writes its result as JSON, whole after every row; the process may be ended at any time.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from sdrt.benchmarks.gpu_memory import free_gpu_memory
from sdrt.runtime.errors import BackendError, SdrtError
from sdrt.runtime.system.files import write_atomically

NATIVE_SIZES: Final = {"sd15": 512, "sd21": 768, "sdxl": 1024}
PACKAGES: Final = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13-libs",
    "onnxruntime-gpu",
    "onnxruntime",
    "cuda-bindings",
    "polygraphy",
    "numpy",
)
# Calls of the CUDA runtime and driver that the profiler sees, by what they cost the host.
LAUNCHES: Final = ("cudaGraphLaunch", "cuGraphLaunch", "cudaLaunchKernel", "cuLaunchKernel")
WAITS: Final = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cuStreamSynchronize",
)
COPIES: Final = ("cudaMemcpy", "cuMemcpy")
ALLOCATIONS: Final = ("cudaMalloc", "cuMemAlloc", "cudaFree", "cuMemFree")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("result", type=Path)
    parser.add_argument("--model", default="", help="sd15, sd21, sdxl, or a checkpoint's folder")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--backends", nargs="*", default=[])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 4])
    parser.add_argument("--steps", nargs="*", type=int, default=[20, 50])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=240.0, help="begin nothing new after this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compiled", action="store_true", help="timings: beside torch.compile too")
    arguments = parser.parse_args(argv)

    def save(found: dict[str, Any]) -> None:
        write_atomically(arguments.result, (json.dumps(found, indent=2) + "\n").encode())

    try:
        save(STAGES[arguments.stage](arguments, save))
    except SdrtError as error:
        print(error)
        return error.exit_status
    return 0


def facts(_arguments: argparse.Namespace, _save: object) -> dict[str, Any]:
    """The GPU, its driver and the packages that matter."""
    from sdrt.runtime.devices.gpu.discovery import find_gpu

    gpu = find_gpu()
    found: dict[str, Any] = {
        "gpu": gpu.name,
        "compute_capability": ".".join(str(number) for number in gpu.capability),
        "memory_free_bytes": _free_memory(),
        "python": platform.python_version(),
        "versions": {},
    }
    for package in PACKAGES:
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = None
    return found


def _free_memory() -> int | None:
    """None where nvidia-smi cannot be asked: a container may lack it and have CUDA all the same."""
    try:
        return free_gpu_memory()
    except BackendError:
        return None


def ceilings(_arguments: argparse.Namespace, _save: object) -> dict[str, Any]:
    """See `sdrt.benchmarks.gpu_ceilings`."""
    import torch

    from sdrt.benchmarks.gpu_ceilings import measure_ceilings

    return dict(measure_ceilings(torch.device("cuda")))


def timings(arguments: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """See `sdrt.benchmarks.gpu_timings`."""
    import torch

    from sdrt.benchmarks.gpu_ceilings import guided_step_flop
    from sdrt.benchmarks.gpu_timings import Plan, time_architecture
    from sdrt.runtime import Bundle

    checkpoint = _checkpoint(arguments.model)
    size = NATIVE_SIZES.get(arguments.model, checkpoint.native_size)
    plan = Plan(
        size=size,
        batches=arguments.batches,
        steps=arguments.steps,
        repeats=arguments.repeats,
        deadline=time.monotonic() + arguments.seconds,
        compiled=arguments.compiled,
    )
    head = {"size": size, "guided_step_flop": guided_step_flop(checkpoint, size)}
    found = time_architecture(
        checkpoint,
        Bundle.open(arguments.bundle, verify=False),
        arguments.backends,
        torch.device(arguments.device),
        plan,
        lambda rows: save({**head, **rows}),
    )
    return {**head, **found}


def _checkpoint(model: str) -> Any:
    if model in NATIVE_SIZES:
        from sdrt.export.checkpoint.architectures import open_architecture

        return open_architecture(model)
    from sdrt.export.checkpoint.reader import open_checkpoint

    return open_checkpoint(model)


def launches(arguments: argparse.Namespace, _save: object) -> dict[str, Any]:
    """What the host does per step, counted by the profiler: runs of two lengths are subtracted.

    So what a call does once (uploads, text encoder, decoder, download) is not counted.
    """
    from sdrt.runtime import Bundle

    bundle = Bundle.open(arguments.bundle, verify=False)
    return {
        backend: _each(lambda name: _host_calls_per_step(bundle, name), backend)
        for backend in arguments.backends
    }


def _host_calls_per_step(bundle: Any, backend: str) -> dict[str, float]:
    from sdrt.runtime import Pipeline

    with Pipeline.load(bundle, backend=backend, verify=False) as pipeline:
        short, long = 10, 30
        for steps in (short, long):
            pipeline("warm", num_inference_steps=steps, seed=0)
        few, many = _profiled(pipeline, short), _profiled(pipeline, long)
    per_step = {name: (many[name] - few[name]) / (long - short) for name in many}
    groups = {"launches": LAUNCHES, "waits": WAITS, "copies": COPIES, "allocations": ALLOCATIONS}
    totals = {
        group: sum(count for name, count in per_step.items() if name.startswith(prefixes))
        for group, prefixes in groups.items()
    }
    return {**totals, **{f"call {name}": count for name, count in per_step.items() if count}}


def _profiled(pipeline: Any, steps: int) -> Counter[str]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        pipeline("warm", num_inference_steps=steps, seed=0)
    return Counter(
        event.name
        for event in trace.events()
        if event.name.startswith("cu") and event.device_type.name == "CPU"  # kernels may begin so, too
    )


def profile(arguments: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """See `sdrt.benchmarks.gpu_profile`: a backend's kernels at each batch."""
    from sdrt.benchmarks.gpu_profile import kernels_of_a_step
    from sdrt.runtime import Bundle

    bundle = Bundle.open(arguments.bundle, verify=False)
    (backend,) = arguments.backends
    found: dict[str, Any] = {}
    for batch in arguments.batches:
        found[f"batch {batch}"] = _each(partial(kernels_of_a_step, bundle, batch=batch), backend)
        save({backend: found})
    return {backend: found}


def memory(arguments: argparse.Namespace, _save: object) -> dict[str, Any]:
    """GPU memory that one backend holds after drawing, in a process that does nothing else.

    Everything counts: the CUDA context, engines, scratch, buffers, graphs.
    """
    from sdrt.runtime import Bundle, Pipeline

    (backend,) = arguments.backends

    def measure(name: str) -> dict[str, float]:
        before = free_gpu_memory()
        with Pipeline.load(
            Bundle.open(arguments.bundle, verify=False), backend=name, verify=False
        ) as pipeline:
            pipeline("warm", num_inference_steps=2, seed=0)
            return {"bytes": float(before - free_gpu_memory())}

    return {backend: _each(measure, backend)}


def _each(measure: Callable[[str], Mapping[str, Any]], backend: str) -> dict[str, Any]:
    try:
        return dict(measure(backend))
    except (SdrtError, ImportError, RuntimeError, OSError) as error:
        return {"not_run": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}


STAGES: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "facts": facts,
    "ceilings": ceilings,
    "timings": timings,
    "launches": launches,
    "profile": profile,
    "memory": memory,
}

if __name__ == "__main__":
    sys.exit(main())
