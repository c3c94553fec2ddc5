"""stable-diffusion.cpp's Python package as a worker of ``sd-bench``.

Its model is a folder in diffusers' format. It has DDIM with trailing timesteps alone, and takes no latents.
So it is given the noise levels of the others' timesteps and runs Euler over them, which is DDIM in another
scale (Song et al. 2021, eq. 14), and starts from the seed: its generator ``cuda`` is Philox, as PyTorch has
it on a GPU and `sdrt.runtime.samplers.noise` too.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdrt.benchmarks.peer_workers.worker import Drawing, Drawn, serve
else:
    from worker import Drawing, Drawn, serve


class StableDiffusionCpp:
    """``StableDiffusion`` with weights and arithmetic in fp32."""

    packages: Sequence[str] = ("stable-diffusion-cpp-python",)
    stages: Sequence[str] = ()
    notes: Sequence[str] = (
        "cannot start from given latents: draws from the seed, with the generator that gave the latents",
        "runs Euler over the noise levels of the others' DDIM, which is the same but for the start: of 20 "
        "steps its noise is 0.4 % smaller, of fewer steps more",
        "draws the pictures of a batch one after the other",
    )

    def import_packages(self) -> None:
        """See `Subject.import_packages`."""
        self._package: Any = import_module("stable_diffusion_cpp")

    def load(self, model: Path, threads: int) -> None:
        """See `Subject.load`."""
        self._config = json.loads((model / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        self._pipe = self._package.StableDiffusion(
            model_path=str(model), n_threads=threads, wtype="f32", rng_type="cuda", sampler_rng_type="cuda"
        )
        if not self._pipe.model:  # a null pointer, which the package lets pass
            raise RuntimeError(
                f"stable-diffusion.cpp does not load {model}: it knows the published architectures alone "
                "(its log says why)"
            )

    def draw(self, drawing: Drawing) -> Drawn:
        """See `Subject.draw`."""
        import numpy as np

        ends: list[float] = []

        def step_ended(_step: int, steps: int, _seconds: float) -> None:
            if steps == drawing.steps:  # the decoder reports its tiles by the same way
                ends.append(time.perf_counter())

        images = self._pipe.generate_image(
            prompt=drawing.prompt,
            negative_prompt=drawing.negative_prompt,
            width=drawing.width,
            height=drawing.height,
            sample_method="euler",
            sample_steps=drawing.steps,
            sigmas=",".join(str(sigma) for sigma in ddim_sigmas(self._config, drawing.steps)),
            cfg_scale=drawing.guidance_scale,
            seed=drawing.seed,
            batch_count=drawing.images,
            progress_callback=step_ended,
        )
        return Drawn(
            lambda: np.stack([np.asarray(image.convert("RGB")) for image in images]),
            ends[: drawing.steps],
            why="stable-diffusion.cpp does not show them",
        )

    def stage(self, name: str, *_size: int, **_sizes: int) -> Callable[[], object]:
        """See `Subject.stage`; there is none that runs alone."""
        raise ValueError(f"{name} cannot be run alone")


def ddim_sigmas(config: dict[str, Any], steps: int) -> list[float]:
    """The noise levels that DDIM with leading timesteps visits, the last one included.

    Args:
        config: The scheduler's, of the kind that Stable Diffusion 1.x and 2.x come with.
        steps: Of the run.
    """
    count = config["num_train_timesteps"]
    first, last = math.sqrt(config["beta_start"]), math.sqrt(config["beta_end"])
    if config["beta_schedule"] != "scaled_linear":
        raise ValueError(f"beta_schedule is {config['beta_schedule']!r}: only scaled_linear is known here")
    alphas, product = [], 1.0
    for index in range(count):
        product *= 1 - (first + (last - first) * index / (count - 1)) ** 2
        alphas.append(product)
    timesteps = [step * (count // steps) + config["steps_offset"] for step in reversed(range(steps))]
    final = 1.0 if config.get("set_alpha_to_one", True) else alphas[0]
    return [math.sqrt(1 / alpha - 1) for alpha in (*(alphas[timestep] for timestep in timesteps), final)]


if __name__ == "__main__":
    sys.exit(serve(StableDiffusionCpp()))
