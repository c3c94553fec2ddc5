"""sdrt itself as a worker of ``sd-bench``; its model is a bundle.

python worker_sdrt.py [--backend NAME]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        """``backend`` is a name in `sdrt.runtime.backends.registry.BACKENDS`, or ``auto``."""
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
        factor = self._pipeline.bundle.manifest.latents.factor
        axes = {
            "rows": 2 * images,
            "batch": images,
            "height": height,
            "width": width,
            "latent_height": height // factor,
            "latent_width": width // factor,
        }
        if name == "unet":
            axes["context"] = self._pipeline.bundle.manifest.tokenizers[0].max_length
        _, evaluate = self._bound(name, axes)
        return self._waited(evaluate)

    def _text_encoder(self) -> Callable[[], object]:
        """Both texts through the tokenizer and the encoder, one after the other as the pipeline does it."""
        from sdrt.runtime.bundle.families.components import INPUT_IDS
        from sdrt.runtime.drawing.text_encoders import open_tokenizers

        bundle, device = self._pipeline.bundle, self._pipeline._device
        (tokenizer,) = open_tokenizers(bundle)
        buffers, evaluate = self._bound("text_encoder", {"batch": bundle.manifest.limits.min_batch})
        ids = buffers[INPUT_IDS]

        def run() -> None:
            for text in ("", STAGE_PROMPT):
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


def main() -> int:
    """Serve until the parent closes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="auto")
    return serve(Sdrt(parser.parse_args().backend))


if __name__ == "__main__":
    sys.exit(main())
