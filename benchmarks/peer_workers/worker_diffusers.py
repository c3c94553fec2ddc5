"""diffusers as a worker of ``sd-bench``: in fp32 on the CPU, in fp16 on a GPU.

python worker_diffusers.py [--device cuda] [--compile]

Its model is a folder in diffusers' format, of Stable Diffusion 1.x, 2.x or XL.
"""

from __future__ import annotations

import argparse
import json
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
    """Any of diffusers' text-to-image pipelines that was loaded as ``_pipe``, on the CPU or a GPU."""

    _pipe: Any
    _device = "cpu"

    def _tensor(self, array: Any) -> Any:
        """An array where the networks are, in their precision."""
        import torch

        tensor = torch.from_numpy(array)
        return tensor if self._device == "cpu" else tensor.to(self._device, torch.float16)

    def _now(self) -> Any:
        """A moment: of the wall clock, or of the GPU's stream, which the host is ahead of."""
        if self._device == "cpu":
            return time.perf_counter()
        import torch

        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def draw(self, drawing: Drawing) -> Drawn:
        """See `Subject.draw`."""
        import numpy as np

        ends: list[Any] = []
        last: dict[str, Any] = {}

        def step_ended(_pipe: Any, _step: int, _timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
            ends.append(self._now())
            last.update(state)
            return state

        images = self._pipe(
            drawing.prompt,
            negative_prompt=drawing.negative_prompt,
            num_images_per_prompt=drawing.images,
            latents=self._tensor(drawing.latents),
            num_inference_steps=drawing.steps,
            guidance_scale=drawing.guidance_scale,
            height=drawing.height,
            width=drawing.width,
            callback_on_step_end=step_ended,
        ).images
        if self._device != "cpu":
            ends = [ends[0].elapsed_time(end) / 1000 for end in ends]
        return Drawn(
            lambda: np.stack([np.asarray(image) for image in images]),
            ends,
            lambda: last["latents"].float().cpu().numpy(),
        )

    def stage(self, name: str, height: int, width: int, images: int) -> Callable[[], object]:
        """See `Subject.stage`."""
        import torch

        pipe = self._pipe
        factor, channels = pipe.vae_scale_factor, pipe.unet.config.in_channels

        def tensor(*shape: int) -> Any:
            return self._tensor(random_array(*shape))

        latents = (channels, height // factor, width // factor)
        if name == "text_encoder":
            texts: dict[str, Any] = {"prompt": STAGE_PROMPT, "negative_prompt": ""}

            def run() -> object:
                return pipe.encode_prompt(
                    **texts,
                    device=self._device,
                    num_images_per_prompt=images,
                    do_classifier_free_guidance=True,
                )

        elif name == "unet":
            sample, timestep = tensor(2 * images, *latents), torch.tensor(500, device=self._device)
            tokens = pipe.tokenizer.model_max_length
            inputs: dict[str, Any] = {
                "encoder_hidden_states": tensor(2 * images, tokens, pipe.unet.config.cross_attention_dim)
            }
            if (second := getattr(pipe, "text_encoder_2", None)) is not None:
                pooled = tensor(2 * images, second.config.projection_dim)
                sizes = tensor(2 * images, 6)  # of the picture and of its crop
                inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}

            def run() -> object:
                return pipe.unet(sample, timestep, **inputs, return_dict=False)

        elif name == "vae_decoder":
            decoded = tensor(images, *latents)

            def run() -> object:
                return pipe.vae.decode(decoded, return_dict=False)

        else:
            picture = tensor(images, 3, height, width)

            def run() -> object:
                return pipe.vae.encode(picture, return_dict=False)

        def run_and_wait() -> None:
            run()
            if self._device != "cpu":
                torch.cuda.synchronize()

        # What the pipeline itself runs under; a compiled network would be compiled once more for another.
        return torch.no_grad()(run_and_wait)


class Diffusers(DiffusersPipeline):
    """Its own pipeline, eager or compiled."""

    packages: Sequence[str] = ("diffusers", "torch", "transformers", "accelerate", "numpy")
    stages: Sequence[str] = STAGES

    def __init__(self, *, device: str = "cpu", compiled: bool) -> None:
        """``compiled`` puts the U-Net and the VAE's decoder through torch.compile."""
        self._device, self._compiled = device, compiled
        self.notes: Sequence[str] = ()
        if compiled:
            self.notes = (
                "compiles anew for each size and batch, in the first drawing; what one process compiled "
                "the next one takes from the cache on the disk, as by default",
            )
        if compiled and device != "cpu":
            # `max-autotune`, which also tries out kernels, had not compiled SD 1.5 after 330 s on an H100.
            self.notes = (*self.notes, 'mode="reduce-overhead": default kernels, in CUDA graphs')

    def import_packages(self) -> None:
        """See `Subject.import_packages`."""
        import torch  # noqa: F401
        from diffusers import DDIMScheduler, StableDiffusionPipeline  # noqa: F401

    def load(self, model: Path, threads: int) -> None:
        """See `Subject.load`; on a GPU in fp16, with the layout that tensor cores want."""
        import torch
        from diffusers import DiffusionPipeline

        torch.set_num_threads(threads)
        on_cpu = self._device == "cpu"
        dtype = torch.float32 if on_cpu else torch.float16
        index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
        checker = {"safety_checker": None} if "safety_checker" in index else {}
        loaded = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, local_files_only=True, **checker)
        self._pipe = pipe = ddim(loaded)
        if not on_cpu:
            pipe.to(self._device)
            for part in (pipe.unet, pipe.vae):
                part.to(memory_format=torch.channels_last)
        if self._compiled:
            # One program for each shape, and no way back to eager in silence.
            options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
            if not on_cpu:
                options["mode"] = "reduce-overhead"
            torch._dynamo.config.recompile_limit = 64
            pipe.unet = torch.compile(pipe.unet, **options)
            pipe.vae.decode = torch.compile(pipe.vae.decode, **options)


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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile of U-Net and VAE decoder")
    arguments = parser.parse_args()
    return serve(Diffusers(device=arguments.device, compiled=arguments.compile))


if __name__ == "__main__":
    sys.exit(main())
