"""Stable Diffusion 2 depth through the runtime: equal to diffusers' pipeline with the same depth map."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support.references.diffusers_tasks import SIDE, loaded_reference, opened, picture
from support.references.solver_reference import diffusers_scheduler

import tolerances
from sdrt.runtime.cli.interactive import serve
from sdrt.runtime.cli.main import main
from sdrt.runtime.cli.saving import BASE64
from sdrt.runtime.errors import UsageError
from sdrt.runtime.pictures.metadata import read_recipe
from sdrt.runtime.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

Array = NDArray[Any]
STEPS, SEEDS, PROMPTS = 5, [5, 8], ["a red apple", "a cat"]
CALL: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "seed": SEEDS, "rng": "cpu"}
GUIDED: dict[str, Any] = {"negative_prompt": "a dog"}


def depth(rows: int, columns: int) -> Array:
    """A slope with a ball on it, float32 of no particular scale."""
    y, x = np.mgrid[0:rows, 0:columns] / np.float32(rows - 1)
    ball = np.maximum(0, 0.1 - (y - 0.4) ** 2 - (x - 0.6) ** 2)
    return np.asarray(700 + 300 * y + 9000 * ball, np.float32)


@pytest.fixture(scope="module")
def pipeline(depth_bundle: Path) -> Pipeline:
    return opened(depth_bundle)


@pytest.fixture(scope="module")
def reference(depth_checkpoint: Path) -> Any:
    return loaded_reference(depth_checkpoint)


def of_diffusers(reference: Any, pipeline: Pipeline, sampler: str, levels: Array, **options: Any) -> Array:
    scheduler = diffusers_scheduler(sampler, pipeline.bundle.manifest.schedule)
    task = diffusers.StableDiffusionDepth2ImgPipeline(**{**reference.components, "scheduler": scheduler})
    task.set_progress_bar_config(disable=True)
    drawn = task(
        PROMPTS,
        image=[Image.fromarray(picture())] * len(PROMPTS),
        depth_map=torch.from_numpy(levels)[None],
        num_inference_steps=STEPS,
        guidance_scale=CALL["guidance_scale"],
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        **{"output_type": "latent", "negative_prompt": ["a dog"] * len(PROMPTS), **options},
    )
    return np.asarray(drawn.images)


def error(drawn: Array, expected: Array) -> float:
    """Over the largest latent, as a share of the tolerance."""
    return float(np.max(np.abs(drawn - expected)) / np.max(np.abs(expected))) / tolerances.TASK_RUN


def draw(pipeline: Pipeline, **options: Any) -> Array:
    return np.asarray(pipeline(PROMPTS, **{**CALL, **GUIDED, "output_type": "latent", **options}).latents)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler"])
@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("side", [4, SIDE, 50])
def test_a_picture_and_a_depth_map(
    pipeline: Pipeline, reference: Any, sampler: str, strength: float, side: int
) -> None:
    """The map may be of any size in the picture's proportions."""
    levels = depth(side, side)
    expected = of_diffusers(reference, pipeline, sampler, levels, strength=strength)
    drawn = draw(pipeline, image=picture(), depth_map=levels, sampler=sampler, strength=strength)
    assert error(drawn, expected) <= 1


def test_the_picture_is_diffusers(pipeline: Pipeline, reference: Any) -> None:
    levels = depth(SIDE, SIDE)
    expected = of_diffusers(reference, pipeline, "ddim", levels, strength=0.8, output_type="np")
    drawn = pipeline(
        PROMPTS,
        **{**CALL, **GUIDED, "sampler": "ddim", "output_type": "np"},
        image=picture(),
        depth_map=levels,
    )
    assert drawn.recipes[0]["strength"] == 0.8  # the default of both
    squares = np.mean((drawn.images.astype(np.float64) - np.round(expected * 255) / 255) ** 2)
    assert squares <= 10 ** (-tolerances.PICTURE_PSNR / 10)


def test_from_noise_alone(pipeline: Pipeline, reference: Any) -> None:
    """diffusers' pipeline wants a picture; without one the run starts from noise, as text to image does."""
    levels = depth(SIDE, SIDE)
    scheduler = diffusers_scheduler("ddim", pipeline.bundle.manifest.schedule)
    latents = torch.from_numpy(pipeline.initial_latents(SEEDS, rng="cpu"))
    task = diffusers.StableDiffusionDepth2ImgPipeline(**{**reference.components, "scheduler": scheduler})
    task.set_progress_bar_config(disable=True)
    task.prepare_latents = lambda *_given: latents  # what a picture would have become
    expected = task(
        PROMPTS,
        image=[Image.fromarray(picture())] * len(PROMPTS),
        depth_map=torch.from_numpy(levels)[None],
        negative_prompt=["a dog"] * len(PROMPTS),
        num_inference_steps=STEPS,
        guidance_scale=CALL["guidance_scale"],
        strength=1.0,
        output_type="latent",
    ).images
    assert error(draw(pipeline, depth_map=levels, sampler="ddim"), np.asarray(expected)) <= 1


def test_what_the_map_says_is_seen_and_its_scale_is_not(pipeline: Pipeline) -> None:
    levels = depth(SIDE, SIDE)
    first = draw(pipeline, depth_map=levels)
    assert error(draw(pipeline, depth_map=-levels), first) > 100
    assert error(draw(pipeline, depth_map=levels * 4 - 1000), first) <= 1
    unguided = draw(pipeline, depth_map=levels, guidance_scale=1.0)
    assert error(draw(pipeline, depth_map=-levels, guidance_scale=1.0), unguided) > 100


def test_maps_as_files(pipeline: Pipeline, tmp_path: Path) -> None:
    """16 bits are all read; of 8 and of colours there are fewer levels. Of a wide one the middle is taken."""
    levels = np.round(depth(SIDE, SIDE)).astype(np.uint16) * 40
    Image.fromarray(levels).save(tmp_path / "fine.png")
    array = draw(pipeline, depth_map=levels)
    assert np.array_equal(draw(pipeline, depth_map=tmp_path / "fine.png"), array)
    assert np.array_equal(draw(pipeline, depth_map=Image.open(tmp_path / "fine.png")), array)
    assert np.array_equal(draw(pipeline, depth_map=np.pad(levels, ((0, 0), (3, 3)))), array)
    coarse = (levels >> 8).astype(np.uint8)
    Image.fromarray(np.stack([coarse] * 3, axis=-1)).save(tmp_path / "grey.png")
    assert np.array_equal(draw(pipeline, depth_map=tmp_path / "grey.png"), draw(pipeline, depth_map=coarse))


def test_the_command_and_its_recipe(depth_bundle: Path, tmp_path: Path, pipeline: Pipeline) -> None:
    levels = np.round(depth(SIDE, SIDE)).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "depth.png")
    shared = ["--bundle", str(depth_bundle), "--backend", "onnxruntime-cpu", "--quiet", "-o"]
    given = ["a cat", "--depth", str(tmp_path / "depth.png"), "--seed", "3", "--steps", "3"]
    assert main([*given, *shared, str(tmp_path / "a.png")]) == 0
    recipe = read_recipe(tmp_path / "a.png")
    drawn = pipeline("a cat", depth_map=levels, seed=3, num_inference_steps=3)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(drawn.images[0]))
    assert recipe["depth_map_sha256"] == drawn.recipes[0]["depth_map_sha256"]
    assert main(["--from", str(tmp_path / "a.png"), *shared, str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    with pytest.raises(UsageError, match="a picture that was not a file"):
        pipeline(**drawn.recipes[0])
    with pytest.raises(UsageError, match="is not the one that the recipe was drawn from"):
        pipeline(**{**recipe, "depth_map": levels[::-1]})


def test_a_loop_that_stays_loaded(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    """It warms up with a map of its own, and reads maps from the requests themselves."""
    png = io.BytesIO()
    Image.fromarray(np.round(depth(SIDE, SIDE)).astype(np.uint16)).save(png, "PNG")
    address = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    requests = [{"prompt": "a", "num_inference_steps": 2, **given} for given in ({"depth_map": address}, {})]
    stream = io.BytesIO("".join(f"{json.dumps(request)}\n" for request in requests).encode())
    serve(pipeline, {}, Path(BASE64), load_seconds=0.0, warm_up=True, stream=stream)
    ready, drawn, refused = map(json.loads, capsys.readouterr().out.splitlines())
    assert "warm_up" in ready["ready"]["seconds"]
    assert drawn["recipes"][0]["depth_map_sha256"]
    assert "it needs a depth_map" in refused["error"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "it needs a depth_map"),
        ({"depth_map": np.ones((8, 8))}, "of one level all over"),
        ({"depth_map": np.full((8, 8), np.nan)}, "depth_map holds NaN"),
        ({"depth_map": "missing.png"}, "depth_map missing.png does not exist"),
        ({"depth_map": 3}, "depth_map is int: a path"),
        (
            {"depth_map": np.eye(8), "image": picture(), "expand": (8, 0, 0, 0)},
            "expand is given: a bundle of",
        ),
        ({"depth_map": np.eye(8), "image": picture(), "mask_image": picture()}, "has no such thing"),
    ],
)
def test_what_is_refused(pipeline: Pipeline, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        pipeline.request("a", **options)


def test_other_bundles_have_no_use_for_it(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="only a bundle of Stable Diffusion with depth maps has it"):
        opened(tiny_bundle).request("a", depth_map=np.eye(8))
