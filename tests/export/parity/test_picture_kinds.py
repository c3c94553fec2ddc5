"""Checkpoints whose U-Net reads a given picture, from bundles through the runtime: diffusers' own pictures.

Both start from the same noise, with the same deterministic sampler, in fp32.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support.checkpoints.checkpoint_damage import UNET_CONFIG, configure
from support.references.diffusers_tasks import SIDE, as_task, loaded_reference, opened, picture
from support.runs.pipeline_spies import spy
from support.runs.reading import compare_reading, is_equal

import tolerances
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.runtime.cli.main import main
from sdrt.runtime.errors import UsageError
from sdrt.runtime.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

Array = NDArray[Any]
PROMPT, SEED, STEPS = "make it green", 5, 5
GUIDED: dict[str, Any] = {"negative_prompt": "a dog", "guidance_scale": 3.0}


def assert_same_picture(drawn: Any, expected: Any) -> None:
    """Latents to the loop's tolerance, and pictures: 50 dB and more."""
    (latents, image), (wanted, other) = drawn, expected
    assert np.max(np.abs(latents - wanted)) <= tolerances.TASK_RUN * np.max(np.abs(wanted))
    error = np.mean((np.asarray(image, np.float64) - np.asarray(other, np.float64)) ** 2)
    assert error == 0 or 10 * np.log10(255**2 / error) >= 50


def drawn_by_diffusers(task: Any, prompt: str, **options: Any) -> tuple[Array, Image.Image]:
    """Latents [1, C, h, w] of the last step, and the picture."""
    kept: list[torch.Tensor] = []

    def keep(_task: Any, _step: int, _timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        kept.append(state["latents"])
        return state

    drawn = task(
        prompt=prompt,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(SEED),
        callback_on_step_end=keep,
        **options,
    )
    return kept[-1].numpy(), drawn.images[0]


def draw(pipeline: Pipeline, prompt: Any = PROMPT, **options: Any) -> tuple[Array, Image.Image]:
    output = pipeline(prompt, **{"num_inference_steps": STEPS, "seed": SEED, "rng": "cpu", **options})
    return np.asarray(output.latents), output.images[0]


# --- InstructPix2Pix


@pytest.fixture(scope="module")
def pix2pix_reference(pix2pix_checkpoint: Path) -> Any:
    return loaded_reference(pix2pix_checkpoint)


@pytest.fixture(scope="module")
def pix2pix(pix2pix_bundle: Path) -> Pipeline:
    return opened(pix2pix_bundle)


def edited(reference: Any, pipeline: Pipeline, sampler: str, **options: Any) -> tuple[Array, Image.Image]:
    task = as_task(reference, diffusers.StableDiffusionInstructPix2PixPipeline, pipeline, sampler)
    return drawn_by_diffusers(task, PROMPT, image=Image.fromarray(picture()), **options)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ddim", GUIDED),
        ("dpmpp_2m", {**GUIDED, "image_guidance_scale": 2.25}),
        ("euler_a", {**GUIDED, "image_guidance_scale": 1.0}),
        ("euler", {"guidance_scale": 1.0}),
    ],
)
def test_a_picture_is_edited_as_diffusers_does(
    pix2pix_reference: Any, pix2pix: Pipeline, sampler: str, options: dict[str, Any]
) -> None:
    expected = edited(pix2pix_reference, pix2pix, sampler, **options)
    assert_same_picture(draw(pix2pix, image=picture(), sampler=sampler, **options), expected)


def test_sdxl_edits_as_diffusers_does(sdxl_checkpoint: Path, tmp_path: Path) -> None:
    """Through the runtime on PyTorch's networks: the graphs are as those of the others."""
    folder = Path(shutil.copytree(sdxl_checkpoint, tmp_path / "xl"))
    configure(UNET_CONFIG, in_channels=8)(folder)
    configure("model_index.json", _class_name="StableDiffusionXLInstructPix2PixPipeline")(folder)
    config = diffusers.UNet2DConditionModel.load_config(folder / "unet")
    diffusers.UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    assert open_checkpoint(str(folder)).family == "sdxl-instruct-pix2pix"
    assert is_equal(compare_reading(folder))


def test_both_guidances_and_the_picture_matter(pix2pix: Pipeline) -> None:
    usual, _ = draw(pix2pix, image=picture(), **GUIDED)
    for other in (
        {"image_guidance_scale": 2.0},
        {"guidance_scale": 4.0},
        {"image": picture()[::-1]},
        {"negative_prompt": "a cat"},
    ):
        latents, _ = draw(pix2pix, **{"image": picture(), **GUIDED, **other})
        assert np.max(np.abs(latents - usual)) > 100 * tolerances.TASK_RUN * np.max(np.abs(usual))


def test_steps_with_three_rows_and_with_one_in_one_run(pix2pix_bundle: Path) -> None:
    """Those of one row have a text and a picture's latents of their own, in the memory of three."""
    pipeline = opened(pix2pix_bundle)
    unet = spy(pipeline, "unet")
    scales = [3.0, 1.0, 3.0, 1.0, 1.0]
    mixed, _ = draw(pipeline, image=picture(), guidance_scale=scales)
    assert [bound["sample"][0] for bound in unet.bound] == [3, 1]
    just = [scale if scale > 1 else 1.0 + 2.0**-23 for scale in scales]
    # u + 1·(c − i) + 1·(i − u) is c.
    by_text, _ = draw(pipeline, image=picture(), guidance_scale=just, image_guidance_scale=1.0)
    plain, _ = draw(pipeline, image=picture(), guidance_scale=scales, image_guidance_scale=1.0)
    assert np.max(np.abs(by_text - plain)) <= tolerances.TASK_RUN * np.max(np.abs(plain))
    assert not np.array_equal(mixed, plain)


def test_a_recipe_edits_again(pix2pix: Pipeline, tmp_path: Path) -> None:
    given = tmp_path / "given.png"
    Image.fromarray(picture()).save(given)
    options: dict[str, Any] = {"num_inference_steps": 2, "seed": 3, "negative_prompt": "dark"}
    options["image_guidance_scale"] = 1.75
    first = pix2pix(PROMPT, image=given, **options)
    (recipe,) = first.recipes
    assert recipe["image_guidance_scale"] == 1.75
    assert "strength" not in recipe
    assert np.array_equal(pix2pix(**recipe).latents, first.latents)
    several = pix2pix(PROMPT, image=given, num_images_per_prompt=2, **options)
    assert np.array_equal(several.latents[:1], first.latents)


def test_sd_run_edits_and_draws_again(
    pix2pix_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture()).save("given.png")
    bundle = ("--bundle", str(pix2pix_bundle), "--backend", "onnxruntime-cpu", "-q")
    given = ("--image", "given.png", "--image-guidance-scale", "2", "--steps", "2", "--seed", "4")
    assert main([PROMPT, *bundle, *given, "-o", "edited.png"]) == 0
    assert main(["--from", "edited.png", *bundle, "-o", "again.png"]) == 0
    assert main(["--from", "edited.png", *bundle, "--image-guidance-scale", "1", "-o", "other.png"]) == 0
    edited, again, other = (np.asarray(Image.open(f"{name}.png")) for name in ("edited", "again", "other"))
    assert np.array_equal(edited, again)
    assert not np.array_equal(edited, other)


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        (PROMPT, {"image": None}, "this bundle is of InstructPix2Pix: it needs an image"),
        (None, {}, "the prompt is missing: what shall become of the image"),
        (PROMPT, {"strength": 0.5}, "strength is given: a bundle of InstructPix2Pix has no such thing"),
        (PROMPT, {"mask_image": picture()}, "mask_image is given"),
        (PROMPT, {"expand": (1, 1, 1, 1)}, "expand is given"),
        (PROMPT, {"variation": 0.5}, "variation is given"),
        (PROMPT, {"guidance_rescale": 0.5}, "guidance_rescale is given"),
        (PROMPT, {"image_guidance_scale": 0.5}, "image_guidance_scale is 0.5: allowed are numbers from 1"),
        (PROMPT, {"image_guidance_scale": "much"}, "image_guidance_scale is 'much'"),
    ],
)
def test_what_editing_has_no_use_for_is_refused(
    pix2pix: Pipeline, prompt: str | None, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        pix2pix(prompt, **{"image": picture(), **options})


def test_others_have_no_guidance_by_picture(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="image_guidance_scale is 2: only InstructPix2Pix and"):
        opened(tiny_bundle)(PROMPT, image=picture(SIDE), image_guidance_scale=2)
