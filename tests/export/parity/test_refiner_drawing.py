"""SDXL's refiner through the runtime, alone and as the end of an ensemble: equal to diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file
from support.checkpoints.tiny_sdxl import WIDTHS
from support.references.diffusers_tasks import as_task, loaded_reference, picture

import tolerances
from sdrt.runtime.cli.main import main
from sdrt.runtime.errors import UsageError
from sdrt.runtime.pictures.metadata import read_recipe
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.text.syntax import PromptSyntaxWarning

pytestmark = pytest.mark.usefixtures("one_thread")

Array = NDArray[Any]
SIDE, STEPS, SHARE = 16, 10, 0.8
PROMPTS, SEEDS = ["a red apple", "a cat"], [3, 9]
CALL: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "seed": SEEDS, "rng": "cpu"}
SCORES: dict[str, Any] = {"aesthetic_score": 9.0, "negative_aesthetic_score": 1.0}


@pytest.fixture(scope="module")
def pipeline(sdxl_bundle: Path, refiner_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sdxl_bundle, refiner=refiner_bundle, backend="onnxruntime-cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def refiner(refiner_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(refiner_bundle, backend="onnxruntime-cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def references(sdxl_checkpoint: Path, refiner_checkpoint: Path) -> tuple[Any, Any]:
    return loaded_reference(sdxl_checkpoint), loaded_reference(refiner_checkpoint)


def error(drawn: Array, expected: Array) -> float:
    """Over the largest latent, as a share of the tolerance."""
    return float(np.max(np.abs(drawn - expected)) / np.max(np.abs(expected))) / tolerances.REFINER_RUN


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def as_refiner(reference: Any, pipeline: Pipeline, sampler: str) -> Any:
    task = as_task(reference, diffusers.StableDiffusionXLImg2ImgPipeline, pipeline, sampler)
    task.register_to_config(requires_aesthetics_score=True, force_zeros_for_empty_prompt=False)
    return task


def ensemble_of_diffusers(
    references: tuple[Any, Any],
    pipeline: Pipeline,
    sampler: str,
    output_type: str = "latent",
    **scores: float,
) -> Array:
    """Its two pipelines one after the other, as its documentation has them."""
    base = as_task(references[0], diffusers.StableDiffusionXLPipeline, pipeline, sampler)
    given: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 4.0}
    sizes = {"original_size": (SIDE, SIDE), "target_size": (SIDE, SIDE)}
    latents = torch.from_numpy(pipeline.initial_latents(SEEDS, rng="cpu"))
    own = generators()
    for generator in own:  # whose first draw the latents are
        torch.randn(latents.shape[1:], generator=generator)
    noisy = base(
        PROMPTS,
        latents=latents,
        denoising_end=SHARE,
        output_type="latent",
        **{"height": 64, "width": 64, "generator": own},  # the size is only checked: the latents decide
        **given,
        **sizes,
    ).images
    second = as_refiner(references[1], pipeline, sampler)
    drawn = second(
        PROMPTS, image=noisy, denoising_start=SHARE, generator=own, output_type=output_type, **given, **scores
    )
    return np.asarray(drawn.images)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "unipc", "euler_a"])
def test_an_ensemble_of_denoisers(pipeline: Pipeline, references: tuple[Any, Any], sampler: str) -> None:
    drawn = pipeline(PROMPTS, refine_from=SHARE, sampler=sampler, output_type="latent", **CALL)
    assert error(drawn.latents, ensemble_of_diffusers(references, pipeline, sampler)) <= 1


def test_its_pictures(pipeline: Pipeline, references: tuple[Any, Any]) -> None:
    drawn = pipeline(PROMPTS, refine_from=SHARE, sampler="euler", output_type="np", **CALL, **SCORES)
    expected = ensemble_of_diffusers(references, pipeline, "euler", "np", **SCORES)
    squares = np.mean((drawn.images.astype(np.float64) - np.round(expected * 255) / 255) ** 2)
    assert squares <= 10 ** (-tolerances.PICTURE_PSNR / 10)


def test_two_calls_are_the_same(pipeline: Pipeline, refiner: Pipeline, sdxl_bundle: Path) -> None:
    """diffusers' names on two pipelines; the number of a step goes on, and so does the stream of noise."""
    whole = pipeline(PROMPTS, refine_from=SHARE, sampler="ddim", output_type="latent", **CALL, **SCORES)
    with Pipeline.load(sdxl_bundle, backend="onnxruntime-cpu") as base:
        noisy = base(PROMPTS, denoising_end=SHARE, sampler="ddim", output_type="latent", **CALL).images
    given: dict[str, Any] = {
        "denoising_start": SHARE,
        "sampler": "ddim",
        "output_type": "latent",
        **CALL,
        **SCORES,
    }
    for name in ("image", "latents"):
        assert np.array_equal(refiner(PROMPTS, **{name: noisy}, **given).latents, whole.latents)
    assert error(noisy, whole.latents) > 100


def test_steps_count_on_and_batches_come_from_the_refiner(pipeline: Pipeline) -> None:
    steps: list[int] = []
    numbers: list[int] = []
    request = pipeline.request(["a", "b", "c"], refine_from=SHARE, num_inference_steps=5)
    output = pipeline.draw(
        request.with_callbacks(
            callback_on_step_end=lambda _p, step, _t, _s: steps.append(step),
            callback_on_batch_end=lambda _p, batch: numbers.extend(batch.numbers),
        )
    )
    assert steps == [0, 1, 2, 3] * 2 + [4] * 2
    assert numbers == [0, 1, 2]
    assert pipeline.count_rows(request) == len(steps)
    assert {"denoise", "step", "text_encoder", "vae_decoder", "total"} <= set(output.timings)


def test_an_interrupt_ends_both(pipeline: Pipeline) -> None:
    def stop(of: Any, step: int, _timestep: float, _state: Any) -> None:
        of._interrupt = step == 1

    drawn = pipeline("a", refine_from=SHARE, num_inference_steps=5, callback_on_step_end=stop)
    assert drawn.recipes[0]["interrupted_after_step"] == 2
    assert len(drawn.images) == 1


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_the_recipe_draws_it_again(pipeline: Pipeline, sampler: str) -> None:
    options: dict[str, Any] = {
        "refine_from": 0.6,
        "sampler": sampler,
        "seed": 5,
        "num_inference_steps": 6,
        **SCORES,
    }
    first = pipeline("a", guidance_interval=(0.2, 0.9), **options)
    (recipe,) = first.recipes
    assert recipe["refine_from"] == 0.6
    assert recipe["aesthetic_score"] == 9.0
    assert recipe["refiner"]
    assert recipe["refiner_sha256"] != recipe["model_sha256"]
    assert "denoising_end" not in recipe
    assert np.array_equal(pipeline(**recipe).latents, first.latents)


def test_guidance_is_counted_over_both(pipeline: Pipeline) -> None:
    """A list has one number for each step of the whole run, an interval is a share of it."""
    listed = [4.0] * 6 + [1.0] * 4
    options: dict[str, Any] = {**CALL, "refine_from": 0.5, "sampler": "ddim", "output_type": "latent"}
    one = pipeline(PROMPTS, **{**options, "guidance_scale": listed}).latents
    other = pipeline(PROMPTS, **options, guidance_interval=(0.0, 0.6)).latents
    assert np.array_equal(one, other)
    assert error(pipeline(PROMPTS, **options).latents, one) > 10


def test_image_to_image_with_a_refiner(pipeline: Pipeline, references: tuple[Any, Any]) -> None:
    base = as_task(references[0], diffusers.StableDiffusionXLImg2ImgPipeline, pipeline, "euler")
    given: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 4.0}
    image, own = Image.fromarray(picture()), [torch.Generator().manual_seed(3)]
    ends = {"denoising_end": SHARE, "output_type": "latent"}
    noisy = base("a", image=image, strength=0.7, generator=own, **ends, **given).images
    second = as_refiner(references[1], pipeline, "euler")
    expected = second("a", image=noisy, denoising_start=SHARE, output_type="latent", **given).images
    options: dict[str, Any] = {**CALL, "seed": 3, "sampler": "euler", "output_type": "latent"}
    drawn = pipeline("a", image=picture(), strength=0.7, refine_from=SHARE, **options)
    assert error(drawn.latents, np.asarray(expected)) <= 1


@pytest.mark.parametrize("options", [{}, {"negative_prompt": "a dog"}, SCORES, {"guidance_scale": 1.0}])
def test_the_refiner_alone(refiner: Pipeline, references: tuple[Any, Any], options: dict[str, Any]) -> None:
    task = as_refiner(references[1], refiner, "euler")
    given: dict[str, Any] = {"guidance_scale": 4.0, **options}
    own = [torch.Generator().manual_seed(3)]
    image = Image.fromarray(picture())
    expected = task(
        "a", image=image, generator=own, num_inference_steps=STEPS, output_type="latent", **given
    ).images
    call: dict[str, Any] = {**CALL, "seed": 3, "sampler": "euler", "output_type": "latent", **given}
    drawn = refiner("a", image=picture(), **call)
    assert drawn.recipes[0]["strength"] == 0.3  # the default of both
    assert error(drawn.latents, np.asarray(expected)) <= 1


def test_each_half_is_told_its_own_score(refiner: Pipeline) -> None:
    scores: dict[str, Any] = {"aesthetic_score": 6.0, "negative_aesthetic_score": 6.0}
    call: dict[str, Any] = {**CALL, "seed": 1, "output_type": "latent"}
    drawn = [refiner("a", **{**call, **given}).latents for given in ({}, scores, {"aesthetic_score": 7.0})]
    assert error(drawn[1], drawn[0]) > 10
    assert error(drawn[2], drawn[0]) > 10


def test_words_are_taught_to_both(sdxl_bundle: Path, refiner_bundle: Path, tmp_path: Path) -> None:
    widths = {"clip_l": WIDTHS[0], "clip_g": WIDTHS[1]}
    draws = np.random.default_rng(4)
    vectors = {name: draws.standard_normal((1, width), np.float32) for name, width in widths.items()}
    save_file(vectors, tmp_path / "cat-toy.safetensors")
    call: dict[str, Any] = {"seed": 2, "num_inference_steps": 5, "output_type": "latent"}
    with (
        Pipeline.load(sdxl_bundle, refiner=refiner_bundle, backend="onnxruntime-cpu") as both,
        Pipeline.load(refiner_bundle, backend="onnxruntime-cpu") as second,
    ):
        for one in (both, second):
            one.load_textual_inversion(tmp_path / "cat-toy.safetensors")
        noisy = both("a cat-toy", denoising_end=0.6, **call).latents
        rest = second("a cat-toy", denoising_start=0.6, latents=noisy, **call).latents
        assert np.array_equal(both("a cat-toy", refine_from=0.6, **call).latents, rest)
        assert not np.array_equal(both("a toy", refine_from=0.6, **call).latents, rest)


def test_variations_and_prompts_that_are_remarked_on(pipeline: Pipeline) -> None:
    """Without a prompt, and what is said of one is said once."""
    drawn = pipeline(image=picture(), refine_from=SHARE, seed=1, num_inference_steps=5)
    assert drawn.recipes[0]["variation"] == 0.3
    with pytest.warns(PromptSyntaxWarning) as caught:
        pipeline.request("a [cat|dog]", refine_from=SHARE)
    assert len(caught) == 1


def test_the_command(
    sdxl_bundle: Path,
    refiner_bundle: Path,
    tmp_path: Path,
    pipeline: Pipeline,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundles = ["--bundle", str(sdxl_bundle), "--refiner", str(refiner_bundle), "--backend", "onnxruntime-cpu"]
    shared = [*bundles, "--quiet", "-o"]
    assert main(["a", "--seed", "3", "--steps", "5", *shared, str(tmp_path / "a.png")]) == 0
    recipe = read_recipe(tmp_path / "a.png")
    assert recipe["refine_from"] == 0.8  # the default where there is a refiner
    drawn = pipeline("a", seed=3, num_inference_steps=5, refine_from=0.8)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(drawn.images[0]))
    assert main(["--from", str(tmp_path / "a.png"), *shared, str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    alone = ["--bundle", str(sdxl_bundle), "--quiet", "-o", str(tmp_path / "c.png")]
    assert main(["--from", str(tmp_path / "a.png"), *alone]) == 2
    assert "there is no refiner: give one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"refine_from": 1.0}, "refine_from is 1.0: a number above 0 and below 1"),
        ({"refine_from": "half"}, "refine_from is 'half': a number is wanted"),
        ({"refine_from": 0.9995}, "refine_from 0.9995 leaves none of 10 steps"),
        ({"refine_from": 0.8, "sampler": "pndm"}, "pndm does its first step twice"),
        ({"refine_from": 0.8, "denoising_end": 0.5}, "refine_from and denoising_end are given"),
        ({"refine_from": 0.8, "frames": 2, "to_prompt": "b"}, "frames are drawn by one bundle"),
        (
            {"refine_from": 0.5, "image": picture(), "strength": 0.1},
            "refine_from 0.5 is before the first step",
        ),
        ({"refine_from": 0.5, "aesthetic_score": -1}, "aesthetic_score is -1: a score from 0 to 100"),
        ({"aesthetic_score": 6}, "only a bundle of the SDXL refiner has it"),
        ({"denoising_start": 0.8}, "denoising_start is 0.8, and no latents are given"),
        ({"denoising_start": 0.8, "image": picture()}, "denoising_start and image are given"),
        ({"denoising_start": 0.8, "denoising_end": 0.8}, "the part ends before it begins"),
        (
            {"denoising_end": 0.8, "image": picture(), "mask_image": picture()},
            "denoising_end and a mask are given",
        ),
    ],
)
def test_what_does_not_go_together(pipeline: Pipeline, options: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"num_inference_steps": STEPS, **options}
    if given.get("denoising_end") == given.get("denoising_start") == 0.8:
        given["latents"] = pipeline.initial_latents([1])
    with pytest.raises(UsageError, match=words):
        pipeline.request("a", **given)


def test_bundles_that_do_not_fit(
    sdxl_bundle: Path, refiner_bundle: Path, tiny_bundle: Path, pipeline: Pipeline, refiner: Pipeline
) -> None:
    with pytest.raises(UsageError, match="of the family sd, the bundle of sdxl"):
        Pipeline.load(sdxl_bundle, refiner=tiny_bundle, backend="onnxruntime-cpu")
    with pytest.raises(UsageError, match="of the family sdxl, the bundle of sdxl-refiner"):
        Pipeline.load(refiner_bundle, refiner=sdxl_bundle, backend="onnxruntime-cpu")
    with pytest.raises(UsageError, match="there is no refiner: give one"):
        refiner.request("a", refine_from=0.5)
    pair = pipeline.request("a", refine_from=0.5)
    with (
        Pipeline.load(sdxl_bundle, backend="onnxruntime-cpu") as alone,
        pytest.raises(UsageError, match="a refiner that this pipeline was not loaded with"),
    ):
        alone.draw(pair)
