"""Which kernels a denoising step spends its time in, as torch's profiler sees them.

Runs of two lengths are subtracted, so that what a call does once (texts, decoder, copies) is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from sdrt.runtime import Bundle

SHORT, LONG = 4, 14  # steps
MOST: Final = 25
NAME_WIDTH: Final = 90


class Kernel(NamedTuple):
    """Everything that ran under one name: milliseconds on the GPU, and how often."""

    ms: float
    launches: float


def kernels_of_a_step(bundle: Bundle, backend: str, batch: int) -> dict[str, Any]:
    """Profile guided drawings of ``batch`` pictures.

    Returns:
        ``gpu_ms`` and ``launches`` of a step in all, and ``kernels``, those that take longest first, each
        with ``name``, ``ms`` and ``launches`` per step.
    """
    from sdrt.runtime import Pipeline

    with Pipeline.load(bundle, backend=backend, verify=False) as pipeline:
        for steps in (SHORT, LONG):
            pipeline(["warm"] * batch, num_inference_steps=steps, seed=0)
        few, many = (_profiled(pipeline, batch, steps) for steps in (SHORT, LONG))
    return per_step(few, many, LONG - SHORT)


def _profiled(pipeline: Any, batch: int, steps: int) -> dict[str, Kernel]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        pipeline(["warm"] * batch, num_inference_steps=steps, seed=0)
    return by_name(trace.events())


def by_name(events: Iterable[Any]) -> dict[str, Kernel]:
    """Sums over a profile's events on the GPU, times of which are in microseconds."""
    found: dict[str, Kernel] = {}
    for event in events:
        if event.device_type.name == "CUDA":
            before = found.get(event.name, Kernel(0.0, 0.0))
            found[event.name] = Kernel(before.ms + event.time_range.elapsed_us() / 1e3, before.launches + 1)
    return found


def per_step(few: Mapping[str, Kernel], many: Mapping[str, Kernel], steps: int) -> dict[str, Any]:
    """What ``steps`` steps more added, for one of them; see `kernels_of_a_step`."""
    none = Kernel(0.0, 0.0)
    added = {
        name: Kernel(
            (kernel.ms - few.get(name, none).ms) / steps,
            (kernel.launches - few.get(name, none).launches) / steps,
        )
        for name, kernel in many.items()
    }
    longest = sorted(added.items(), key=lambda entry: -entry[1].ms)[:MOST]
    return {
        "gpu_ms": sum(kernel.ms for kernel in added.values()),
        "launches": sum(kernel.launches for kernel in added.values()),
        "kernels": [{"name": name[:NAME_WIDTH], **kernel._asdict()} for name, kernel in longest],
    }
