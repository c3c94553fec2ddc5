"""Checkpoints whose U-Net reads a given picture, from bundles through the runtime: diffusers' own pictures.

Both start from the same noise, with the same deterministic sampler, in fp32.
"""

from __future__ import annotations

import shutil
import warnings
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
from sdrt.runtime.cli.interactive import _warm_up_request
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
    with pytest.raises(
        UsageError, match="image_guidance_scale is given: only a bundle of InstructPix2Pix or"
    ):
        opened(tiny_bundle)(PROMPT, image=picture(SIDE), image_guidance_scale=2)


# --- Stable unCLIP


@pytest.fixture(scope="module")
def unclip_reference(unclip_checkpoint: Path) -> Any:
    return loaded_reference(unclip_checkpoint)


@pytest.fixture(scope="module")
def unclip(unclip_bundle: Path) -> Pipeline:
    return opened(unclip_bundle)


def with_callback(task: Any, **options: Any) -> tuple[Array, Image.Image]:
    """`drawn_by_diffusers` of pipelines with the older callback."""
    kept: list[torch.Tensor] = []
    drawn = task(
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(SEED),
        callback=lambda _step, _timestep, latents: kept.append(latents),
        **options,
    )
    return kept[-1].numpy(), drawn.images[0]


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (PROMPT, GUIDED),
        (PROMPT, {**GUIDED, "noise_level": 700}),
        (None, {"noise_level": 20}),
        (PROMPT, {"guidance_scale": 1.0, "noise_level": 999}),
    ],
)
def test_a_picture_is_varied_beside_a_prompt_as_diffusers_does(
    unclip_reference: Any, unclip: Pipeline, prompt: str | None, options: dict[str, Any]
) -> None:
    image = picture(40)[:33]  # to be resized and cut
    task = as_task(unclip_reference, diffusers.StableUnCLIPImg2ImgPipeline, unclip, "dpmpp_2m")
    given = {"image": Image.fromarray(image), "prompt": prompt, "height": SIDE, "width": SIDE, **options}
    drawn = draw(unclip, prompt, image=image, sampler="dpmpp_2m", **options)
    assert_same_picture(drawn, with_callback(task, **given))


def test_a_picture_is_read_once_and_each_variation_has_noise_of_its_own(unclip_bundle: Path) -> None:
    pipeline = opened(unclip_bundle)
    encoder = spy(pipeline, "image_encoder")
    given: dict[str, Any] = {"image": picture(), "num_inference_steps": 2, "noise_level": 500, "seed": 3}
    three = pipeline(PROMPT, num_images_per_prompt=3, **given)
    assert encoder.evaluations == 1
    second = pipeline(PROMPT, **{**given, "seed": 4})
    assert np.array_equal(three.latents[1:2], second.latents)
    (recipe,) = second.recipes
    assert recipe["noise_level"] == 500
    assert np.array_equal(pipeline(**{**recipe, "image": picture()}).latents, second.latents)
    less = pipeline(PROMPT, **{**given, "seed": 4, "noise_level": 100})
    assert not np.allclose(less.latents, second.latents, rtol=1e-2)


@pytest.mark.parametrize("kind", ["unclip", "upscaler"])
def test_steps_with_two_rows_and_with_one_in_one_run(kind: str, request: pytest.FixtureRequest) -> None:
    pipeline, scales = request.getfixturevalue(kind), [3.0, 1.0, 3.0, 1.0, 1.0]
    just = [scale if scale > 1 else 1.0 + 2.0**-23 for scale in scales]
    image = picture(SIDE // 2)
    (mixed, _), (both, _) = (draw(pipeline, image=image, guidance_scale=one) for one in (scales, just))
    assert np.max(np.abs(mixed - both)) <= tolerances.TASK_RUN * np.max(np.abs(both))


@pytest.mark.parametrize(
    ("kind", "prompt", "options", "words"),
    [
        ("unclip", PROMPT, {"image": None}, "this bundle is of Stable unCLIP: it needs an image"),
        (
            "unclip",
            PROMPT,
            {"noise_level": 1000},
            "noise_level is 1000: allowed are whole numbers from 0 to 999",
        ),
        ("unclip", PROMPT, {"noise_level": 0.5}, "noise_level is 0.5"),
        (
            "unclip",
            PROMPT,
            {"strength": 0.5},
            "strength is given: a bundle of Stable unCLIP has no such thing",
        ),
        (
            "unclip",
            PROMPT,
            {"image_guidance_scale": 2.0},
            "only a bundle of InstructPix2Pix or InstructPix2Pix of SDXL",
        ),
        ("upscaler", PROMPT, {"image": None}, "this bundle is of the x4 upscaler: it needs an image"),
        (
            "upscaler",
            PROMPT,
            {"noise_level": 51},
            "noise_level is 51: allowed are whole numbers from 0 to 50",
        ),
        (
            "upscaler",
            PROMPT,
            {"image": picture(9)},
            "the image is 9x9 pixels .* this bundle enlarges up to 8x8",
        ),
        ("upscaler", PROMPT, {"height": 8}, "height is 8: this bundle draws 16 pixels"),
        ("upscaler", PROMPT, {"mask_image": picture()}, "mask_image is given"),
        (
            "pix2pix",
            PROMPT,
            {"noise_level": 3},
            "noise_level is given: only a bundle of Stable unCLIP or the x4 upscaler has it",
        ),
    ],
)
def test_what_a_kind_has_no_use_for_is_refused(
    kind: str, prompt: str, options: dict[str, Any], words: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(UsageError, match=words):
        request.getfixturevalue(kind)(prompt, **{"image": picture(SIDE // 2), **options})


@pytest.mark.parametrize("kind", ["pix2pix", "unclip", "upscaler"])
def test_a_service_warms_up_with_a_picture(kind: str, request: pytest.FixtureRequest) -> None:
    pipeline: Pipeline = request.getfixturevalue(kind)
    asked = pipeline.request(**_warm_up_request(pipeline, {}))
    assert (asked.height, asked.width) == (SIDE, SIDE)


# --- the x4 upscaler; the tiny one enlarges two times


@pytest.fixture(scope="module")
def upscaler_reference(upscaler_checkpoint: Path) -> Any:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of the VAE's scaling_factor
        return loaded_reference(upscaler_checkpoint)


@pytest.fixture(scope="module")
def upscaler(upscaler_bundle: Path) -> Pipeline:
    return opened(upscaler_bundle)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (PROMPT, GUIDED),
        (PROMPT, {**GUIDED, "noise_level": 50}),
        (PROMPT, {"guidance_scale": 1.0, "noise_level": 0}),
    ],
)
def test_a_picture_is_enlarged_as_diffusers_does(
    upscaler_reference: Any, upscaler: Pipeline, prompt: str, options: dict[str, Any]
) -> None:
    small = picture(SIDE // 2)
    task = as_task(upscaler_reference, diffusers.StableDiffusionUpscalePipeline, upscaler, "dpmpp_2m")
    expected = with_callback(task, image=Image.fromarray(small), prompt=prompt, **options)
    latents, image = draw(upscaler, prompt, image=small, sampler="dpmpp_2m", **options)
    assert image.size == (SIDE, SIDE)
    assert_same_picture((latents, image), expected)


def test_a_picture_of_any_size_is_enlarged_pixel_by_pixel(upscaler: Pipeline) -> None:
    """What is added to a picture to reach a size of the bundle is cut off again."""
    small = picture(SIDE // 2)
    _, whole = draw(upscaler, image=small, **GUIDED)
    padded = np.pad(small[:7, :5], ((0, 1), (0, 3), (0, 0)), mode="edge")
    _, expected = draw(upscaler, image=padded, **GUIDED)
    output = upscaler(PROMPT, image=small[:7, :5], num_inference_steps=STEPS, seed=SEED, rng="cpu", **GUIDED)
    assert output.images[0].size == (10, 14)
    assert np.array_equal(np.asarray(output.images[0]), np.asarray(expected)[:14, :10])
    (recipe,) = output.recipes
    again = upscaler(**{**recipe, "image": small[:7, :5]})
    assert np.array_equal(again.latents, output.latents)
    # Asked for a size, it is resized first.
    _, resized = draw(upscaler, image=small[:4], height=SIDE, width=SIDE, **GUIDED)
    assert resized.size == whole.size == (SIDE, SIDE)


def test_sd_run_enlarges(upscaler_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(SIDE // 2)).save("small.png")
    bundle = ("--bundle", str(upscaler_bundle), "--backend", "onnxruntime-cpu", "-q")
    given = ("--image", "small.png", "--noise-level", "10", "--steps", "2", "--seed", "4")
    assert main([PROMPT, *bundle, *given, "-o", "large.png"]) == 0
    assert main(["--from", "large.png", *bundle, "-o", "again.png"]) == 0
    assert main([*bundle, *given, "-o", "without.png"]) == 0  # a picture says enough
    large, again, without = (Image.open(f"{name}.png") for name in ("large", "again", "without"))
    assert large.size == (SIDE, SIDE)
    assert np.array_equal(np.asarray(large), np.asarray(again))
    assert not np.array_equal(np.asarray(large), np.asarray(without))
