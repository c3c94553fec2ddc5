"""One seed, one picture: every sampler and task against diffusers' own pipelines, generators and all.

Both sides get the picture itself and a fresh generator of the same seed, so what is compared is also which
draw goes where: a picture's latents, the noise, a masked picture's latents, the steps. PyTorch's CPU
generator is the real one. In place of its CUDA generator, which needs a GPU, stands what it draws:
`sdrt.kernels.philox`, each call of diffusers' ``randn_tensor`` one draw further.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from PIL import Image
from support.references.diffusers_tasks import SIDE, as_task, loaded_reference, mask_image, opened, picture
from support.references.solver_reference import BROWNIAN
from support.runs.pipeline_spies import OpenPipeline

import tolerances
from sdrt.kernels.philox import philox_normal
from sdrt.runtime.samplers.registry import SAMPLERS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # diffusers hands tensors to NumPy in a way that NumPy will stop to accept.
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
]

Array = NDArray[Any]
SEED = 2**32 + 5  # PyTorch's CPU generator knows the low half alone
OPTIONS: dict[str, Any] = {"negative_prompt": "a dog", "guidance_scale": 3.0, "num_inference_steps": 5}
ETA = {"ddim": 0.7, "tcd": 0.3}  # of pipelines and ours; others have none in diffusers

# Kind of pipeline, and what it is asked beside a prompt.
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "text to image": ("", {}),
    "image to image": ("Img2Img", {"strength": 0.6}),
    "inpainting": ("Inpaint", {"strength": 1.0}),
    "inpainting, in part": ("Inpaint", {"strength": 0.6}),
}
# A sampler of each way to draw: never, in every step, in every other row, in all steps but the last.
WAYS = ("euler", "euler_a", "dpm2_a", "lcm")


@dataclass
class CudaGenerator:
    """Stands for a ``torch.Generator("cuda")``: its seed, and how often it was drawn from."""

    seed: int
    drawn: int = 0


def philox_tensor(shape: Sequence[int], generator: Any = None, **_options: Any) -> torch.Tensor:
    """``randn_tensor`` of `CudaGenerator`, or a list of them, one for each image."""
    generators = generator if isinstance(generator, list) else [generator]
    each = (shape[0] // len(generators), *shape[1:])
    drawn = []
    for one in generators:
        drawn.append(philox_normal(each, one.seed, offset=one.drawn))
        one.drawn += 1
    return torch.from_numpy(np.concatenate(drawn))


@pytest.fixture(scope="module")
def sides(tiny_checkpoint: Path, tiny_bundle: Path) -> tuple[Any, OpenPipeline]:
    return loaded_reference(tiny_checkpoint), opened(tiny_bundle)


@pytest.fixture(scope="module")
def inpainting_sides(inpainting_checkpoint: Path, inpainting_bundle: Path) -> tuple[Any, OpenPipeline]:
    """Of a U-Net that reads the mask."""
    return loaded_reference(inpainting_checkpoint), opened(inpainting_bundle)


@pytest.fixture(scope="module")
def sdxl_sides(sdxl_checkpoint: Path, sdxl_bundle: Path) -> tuple[Any, OpenPipeline]:
    return loaded_reference(sdxl_checkpoint), opened(sdxl_bundle)


def shown(options: dict[str, Any], kind: str, images: int) -> dict[str, Any]:
    """What diffusers is given: the picture once for each generator, or it would draw from the first alone."""
    result = dict(options)
    if kind:
        result["image"] = [Image.fromarray(picture())] * images
    if kind == "Inpaint":
        result["mask_image"] = [Image.fromarray(mask_image())] * images
    if kind != "Img2Img":
        result |= {"height": SIDE, "width": SIDE}
    return result


def drawn_by_diffusers(
    reference: Any, ours: OpenPipeline, sampler: str, task: str, rng: str, seeds: Any
) -> Array:
    kind, options = TASKS[task]
    family = "StableDiffusionXL" if ours.bundle.manifest.family == "sdxl" else "StableDiffusion"
    theirs = as_task(reference, getattr(diffusers, f"{family}{kind}Pipeline"), ours, sampler)
    real = rng == "cpu"
    generators: list[Any] = [
        torch.Generator("cpu").manual_seed(seed) if real else CudaGenerator(seed) for seed in seeds
    ]
    if sampler in BROWNIAN:
        move_by_generator(theirs.scheduler, generators, randn_tensor if real else philox_tensor)
    modules = [module for module in sys.modules.values() if vars(module).get("randn_tensor") is randn_tensor]
    with pytest.MonkeyPatch.context() as change:
        for module in () if real else modules:
            change.setattr(module, "randn_tensor", philox_tensor)
        drawn = theirs(
            ["a cat"] * len(seeds),
            generator=generators,
            output_type="latent",
            **{**OPTIONS, "negative_prompt": ["a dog"] * len(seeds)},
            **({"eta": ETA[sampler]} if sampler in ETA else {}),
            **shown(options, kind, len(seeds)),
        )
    return np.asarray(drawn.images)


def move_by_generator(scheduler: Any, generators: list[Any], draw: Any) -> None:
    """Let Brownian motion come from the generators, a draw for each row that adds noise, as in `dpmpp_sde`.

    diffusers itself takes a seed of PyTorch's global generator for it, not the pipeline's generator.
    """
    assert "generator" not in inspect.signature(scheduler.step).parameters
    before: list[torch.Tensor] = []

    def motion(begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        fresh: torch.Tensor = draw((len(generators), 4, SIDE // 2, SIDE // 2), generator=generators)
        if scheduler.state_in_first_order:
            before[:] = [fresh]
            return fresh
        middle = scheduler.mid_point_sigma
        moved: torch.Tensor = (begin - middle).sqrt() * before[0] + (middle - end).sqrt() * fresh
        return moved / (begin - end).sqrt()

    original = scheduler.set_timesteps

    def set_timesteps(*arguments: Any, **options: Any) -> None:
        original(*arguments, **options)
        scheduler.noise_sampler = motion

    scheduler.set_timesteps = set_timesteps


def difference(
    sides: tuple[Any, OpenPipeline], sampler: str, task: str, rng: str = "cpu", seeds: Sequence[int] = (SEED,)
) -> float:
    """Relative L2 of the two sides' latents, the largest of any picture."""
    reference, ours = sides
    expected = drawn_by_diffusers(reference, ours, sampler, task, rng, seeds)
    kind, options = TASKS[task]
    given: dict[str, Any] = {
        **({"image": picture()} if kind else {}),
        **({"mask_image": mask_image()} if kind == "Inpaint" else {}),
        **({"eta": ETA[sampler]} if sampler in ETA else {}),
    }
    given |= {"sampler": sampler, "rng": rng, "seed": list(seeds), "output_type": "latents"}
    drawn = ours(["a cat"] * len(seeds), **OPTIONS, **options, **given).latents
    norms = [np.linalg.norm(array.reshape(len(seeds), -1), axis=1) for array in (drawn - expected, expected)]
    return float(np.max(norms[0] / norms[1]))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_of_the_cpu(sides: tuple[Any, OpenPipeline], sampler: str, task: str) -> None:
    assert difference(sides, sampler, task) <= tolerances.SAME_SEED


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("sampler", WAYS)
def test_a_seed_of_a_gpu(sides: tuple[Any, OpenPipeline], sampler: str, task: str) -> None:
    assert difference(sides, sampler, task, "philox") <= tolerances.SAME_SEED


@pytest.mark.parametrize("rng", ["cpu", "philox"])
@pytest.mark.parametrize("task", ["inpainting", "inpainting, in part"])
def test_a_unet_that_reads_the_mask(inpainting_sides: tuple[Any, OpenPipeline], task: str, rng: str) -> None:
    assert difference(inpainting_sides, "dpm2_a", task, rng) <= tolerances.SAME_SEED


@pytest.mark.parametrize("rng", ["cpu", "philox"])
@pytest.mark.parametrize("task", TASKS)
def test_a_generator_for_each_picture(sides: tuple[Any, OpenPipeline], task: str, rng: str) -> None:
    """More than a batch holds, so that the last is drawn alone."""
    assert difference(sides, "euler_a", task, rng, [3, 2**63 + 1, SEED]) <= tolerances.SAME_SEED


@pytest.mark.parametrize("task", TASKS)
def test_sdxl(sdxl_sides: tuple[Any, OpenPipeline], task: str) -> None:
    assert difference(sdxl_sides, "euler_a", task) <= tolerances.SAME_SEED
