"""sdrt itself as a worker of ``sd-bench``; its model is a bundle.

python worker_sdrt.py [--backend NAME]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sdrt.benchmarks.peer_workers.worker import (
        STAGE_PROMPT,
        STAGES,
        Drawing,
        Drawn,
        random_array,
        serve,
    )
else:
    from worker import STAGE_PROMPT, STAGES, Drawing, Drawn, random_array, serve

Event = tuple[str, str]  # where it was, and its name
PROFILED_STEPS: Final = (10, 30)
MOST_KERNELS: Final = 25
NAME_WIDTH: Final = 90
# Calls of the CUDA runtime and driver that the profiler sees, by what they cost the host.
HOST_CALLS: Final = {
    "launches": ("cudaGraphLaunch", "cuGraphLaunch", "cudaLaunchKernel", "cuLaunchKernel"),
    "waits": ("cudaStreamSync", "cudaDeviceSync", "cudaEventSync", "cuStreamSync"),
    "copies": ("cudaMemcpy", "cuMemcpy"),
    "allocations": ("cudaMalloc", "cuMemAlloc", "cudaFree", "cuMemFree"),
}


class Sdrt:
    """A pipeline on one backend."""

    packages: Sequence[str] = (
        "sdrt",
        "onnxruntime",
        "onnxruntime-gpu",
        "openvino",
        "tensorrt-rtx-cu13-libs",
        "tensorrt-cu13",
        "numpy",
    )
    stages: Sequence[str] = STAGES

    def __init__(self, backend: str) -> None:
        """``backend`` is a name in `sdrt.runtime.backends.backend.BACKENDS`, or ``auto``."""
        self._backend = backend
        self._pipeline: Any = None
        self.notes: Sequence[str] = [
            "keeps the embeddings of texts that it has encoded: of the warm drawings, whose prompts differ, "
            "each encodes its own prompt and none the empty negative one"
        ]

    def import_packages(self) -> None:
        """See `Subject.import_packages`; the engine library is imported by what loads it."""
        import sdrt.runtime.pipeline  # noqa: F401

    def load(self, model: Path, threads: int) -> None:
        """See `Subject.load`."""
        from sdrt.runtime import Pipeline

        self._pipeline = Pipeline.load(model, backend=self._backend, threads=threads)

    def draw(self, drawing: Drawing) -> Drawn:
        """See `Subject.draw`."""
        ends: list[float] = []

        def step_ended(*_: object) -> None:
            ends.append(time.perf_counter())

        output = self._pipeline(
            drawing.prompt,
            negative_prompt=drawing.negative_prompt,
            num_images_per_prompt=drawing.images,
            latents=drawing.latents,
            seed=drawing.seed,
            sampler="ddim",
            num_inference_steps=drawing.steps,
            guidance_scale=drawing.guidance_scale,
            height=drawing.height,
            width=drawing.width,
            output_type="numpy",
            callback_on_step_end=step_ended,
            callback_on_step_end_tensor_inputs=(),  # nothing is copied for it
        )
        if self._pipeline._device.name.startswith("cuda"):
            # The host hears of a step when it is queued; the device's clock knows the mean.
            ends = [0.0, output.timings["step"]]
        return Drawn(output.images, ends, output.latents)

    def stage(self, name: str, height: int, width: int, images: int) -> Callable[[], object]:
        """See `Subject.stage`: the executor alone, on buffers of its device."""
        if name == "text_encoder":
            return self._text_encoder()
        from sdrt.runtime.backends.backend import RequestShape

        manifest = self._pipeline.bundle.manifest
        axes = RequestShape(images, height, width).axes(manifest.latents.factor, manifest.tokens)
        _, evaluate = self._bound(name, axes)
        return self._waited(evaluate)

    def _text_encoder(self) -> Callable[[], object]:
        """Both texts through each tokenizer and encoder, one after the other as the pipeline does it."""
        from sdrt.runtime.bundle.families.components import INPUT_IDS
        from sdrt.runtime.drawing.text_encoders import open_tokenizers

        bundle, device = self._pipeline.bundle, self._pipeline._device
        names = [encoder.component for encoder in bundle.manifest.record.encoders]
        axes = {"batch": bundle.manifest.limits.min_batch}
        tokenizers = zip(open_tokenizers(bundle), names, strict=True)
        encoders = [(tokenizer, *self._bound(name, axes)) for tokenizer, name in tokenizers]

        def run() -> None:
            for text in ("", STAGE_PROMPT):
                for tokenizer, buffers, evaluate in encoders:
                    ids = buffers[INPUT_IDS]
                    rows = tokenizer.encode(text).ids
                    device.upload(rows[None].repeat(ids.shape[0], axis=0), ids)
                    evaluate()

        return self._waited(run)

    def _bound(self, name: str, axes: dict[str, int]) -> tuple[dict[str, Any], Callable[[], None]]:
        """A component's inputs, filled with random numbers, and the call that evaluates it on them."""
        from sdrt.runtime.bundle.families.components import CUSTOM_EMBEDDINGS
        from sdrt.runtime.drawing.loading import executor_of

        pipeline, device = self._pipeline, self._pipeline._device
        executor = executor_of(pipeline._executors, pipeline._load_more, name)
        inputs, outputs = (
            {entry.name: device.zeros(entry.concrete(axes), entry.dtype) for entry in entries}
            for entries in (executor.spec.inputs, executor.spec.outputs)
        )
        for entry in executor.spec.inputs:
            if entry.dtype != "int64" and entry.name != CUSTOM_EMBEDDINGS:
                buffer = inputs[entry.name]
                device.upload(random_array(*buffer.shape).astype(entry.dtype), buffer)
        return inputs, executor.bind(inputs, outputs)

    def _waited(self, run: Callable[[], None]) -> Callable[[], object]:
        device = self._pipeline._device

        def run_and_wait() -> None:
            run()
            device.synchronize()

        return run_and_wait

    def profile(self, images: int) -> dict[str, Any]:
        """What a step of that many pictures does on the GPU, and the host for it, as PyTorch's profiler says.

        Runs of two lengths are subtracted, so that what a call does once (texts, decoder) is not counted.
        """
        short, long = PROFILED_STEPS
        for steps in PROFILED_STEPS:
            self._profiled(images, steps, warm=True)
        few, many = (self._profiled(images, steps) for steps in PROFILED_STEPS)
        return per_step(few, many, long - short)

    def _profiled(self, images: int, steps: int, *, warm: bool = False) -> dict[Event, tuple[float, int]]:
        from torch.profiler import ProfilerActivity, profile

        def draw() -> None:
            self._pipeline(["warm"] * images, num_inference_steps=steps, seed=0)

        if warm:
            draw()
            return {}
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            draw()
        return by_name(trace.events())


def by_name(events: Iterable[Any]) -> dict[Event, tuple[float, int]]:
    """Seconds and number of a profile's events on the GPU, and of CUDA's calls on the host, by name."""
    found: dict[Event, tuple[float, int]] = {}
    for event in events:
        key = (event.device_type.name, event.name)
        if key[0] == "CUDA" or (key[0] == "CPU" and key[1].startswith("cu")):
            seconds, count = found.get(key, (0.0, 0))
            found[key] = (seconds + event.time_range.elapsed_us() / 1e6, count + 1)
    return found


def per_step(
    few: Mapping[Event, tuple[float, int]], many: Mapping[Event, tuple[float, int]], steps: int
) -> dict[str, Any]:
    """What ``steps`` steps more added, for one of them: the answer to a request for a profile."""
    added = {}
    for key, (seconds, count) in many.items():
        before, less = few.get(key, (0.0, 0))
        added[key] = ((seconds - before) / steps, (count - less) / steps)
    kernels = [(name, *spent) for (where, name), spent in added.items() if where == "CUDA"]
    calls = [(name, count) for (where, name), (_, count) in added.items() if where == "CPU"]
    kernels.sort(key=lambda kernel: -kernel[1])
    return {
        "seconds": sum(seconds for _, seconds, _ in kernels),
        "launches": sum(count for *_, count in kernels),
        "host": {
            kind: sum(count for name, count in calls if name.startswith(prefixes))
            for kind, prefixes in HOST_CALLS.items()
        },
        "kernels": [
            {"name": name[:NAME_WIDTH], "seconds": seconds, "launches": count}
            for name, seconds, count in kernels[:MOST_KERNELS]
        ],
    }


def main() -> int:
    """Serve until the parent closes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="auto")
    return serve(Sdrt(parser.parse_args().backend))


if __name__ == "__main__":
    sys.exit(main())
