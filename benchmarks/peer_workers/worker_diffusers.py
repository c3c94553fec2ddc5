"""diffusers on the CPU as a worker of ``sd-bench``; its model is a folder in diffusers' format.

python worker_diffusers.py [--compile]
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


class DiffusersPipeline:
    """Any of diffusers' text-to-image pipelines that was loaded as ``_pipe``."""

    _pipe: Any

    def draw(self, drawing: Drawing) -> Drawn:
        """See `Subject.draw`."""
        import numpy as np
        import torch

        ends: list[float] = []
        last: dict[str, Any] = {}

        def step_ended(_pipe: Any, _step: int, _timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
            ends.append(time.perf_counter())
            last.update(state)
            return state

        images = self._pipe(
            drawing.prompt,
            negative_prompt=drawing.negative_prompt,
            num_images_per_prompt=drawing.images,
            latents=torch.from_numpy(drawing.latents),
            num_inference_steps=drawing.steps,
            guidance_scale=drawing.guidance_scale,
            height=drawing.height,
            width=drawing.width,
            callback_on_step_end=step_ended,
        ).images
        return Drawn(
            lambda: np.stack([np.asarray(image) for image in images]), ends, lambda: last["latents"].numpy()
        )

    def stage(self, name: str, height: int, width: int, images: int) -> Callable[[], object]:
        """See `Subject.stage`."""
        import torch

        pipe = self._pipe
        factor, channels = pipe.vae_scale_factor, pipe.unet.config.in_channels

        def text_encoder() -> object:
            return pipe.encode_prompt(STAGE_PROMPT, "cpu", images, True, "")

        def tensor(*shape: int) -> torch.Tensor:
            return torch.from_numpy(random_array(*shape))

        latents = (channels, height // factor, width // factor)
        if name == "text_encoder":
            run: Callable[[], object] = text_encoder
        elif name == "unet":
            sample, timestep = tensor(2 * images, *latents), torch.tensor(500)
            tokens = pipe.tokenizer.model_max_length
            context = tensor(2 * images, tokens, pipe.unet.config.cross_attention_dim)

            def run() -> object:
                return pipe.unet(sample, timestep, encoder_hidden_states=context, return_dict=False)

        elif name == "vae_decoder":
            decoded = tensor(images, *latents)

            def run() -> object:
                return pipe.vae.decode(decoded, return_dict=False)

        else:
            picture = tensor(images, 3, height, width)

            def run() -> object:
                return pipe.vae.encode(picture, return_dict=False)

        # What the pipeline itself runs under; a compiled network would be compiled once more for another.
        return torch.no_grad()(run)


class Diffusers(DiffusersPipeline):
    """``StableDiffusionPipeline`` in fp32, eager or compiled."""

    packages: Sequence[str] = ("diffusers", "torch", "transformers", "accelerate", "numpy")
    stages: Sequence[str] = STAGES

    def __init__(self, *, compiled: bool) -> None:
        """``compiled`` puts the U-Net and the VAE's decoder through torch.compile."""
        self._compiled = compiled
        self.notes: Sequence[str] = ()
        if compiled:
            self.notes = (
                "compiles anew for each size and batch, in the first drawing; what one process compiled "
                "the next one takes from the cache on the disk, as by default",
            )

    def import_packages(self) -> None:
        """See `Subject.import_packages`."""
        import torch  # noqa: F401
        from diffusers import DDIMScheduler, StableDiffusionPipeline  # noqa: F401

    def load(self, model: Path, threads: int) -> None:
        """See `Subject.load`."""
        import torch
        from diffusers import StableDiffusionPipeline

        torch.set_num_threads(threads)
        self._pipe = ddim(
            StableDiffusionPipeline.from_pretrained(
                model, torch_dtype=torch.float32, safety_checker=None, local_files_only=True
            )
        )
        if self._compiled:
            # One program for each shape, and no way back to eager in silence.
            options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
            torch._dynamo.config.recompile_limit = 64
            self._pipe.unet = torch.compile(self._pipe.unet, **options)
            self._pipe.vae.decode = torch.compile(self._pipe.vae.decode, **options)


def ddim(pipe: Any) -> Any:
    """The pipeline with DDIM, and no bar on the terminal."""
    from diffusers import DDIMScheduler

    # Clipping predictions is for models that draw pixels.
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> int:
    """Serve until the parent closes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="torch.compile of U-Net and VAE decoder")
    return serve(Diffusers(compiled=parser.parse_args().compile))


if __name__ == "__main__":
    sys.exit(main())
