"""Tasks through the runtime against diffusers' own pipelines: equal latents.

Noise is that of PyTorch's CPU generator; `test_generators` has every sampler with each task.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support.references.diffusers_tasks import SIDE, as_task, loaded_reference, mask_image, opened, picture
from support.references.solver_reference import diffusers_scheduler
from support.runs.pipeline_spies import spy
from transformers import CLIPImageProcessor

import tolerances
from sdrt.runtime.errors import UsageError
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.samplers.noise import noise_source

pytestmark = pytest.mark.usefixtures("one_thread")

Array = NDArray[Any]
FACTOR, STEPS = 2, 5
PROMPT, SEED = "a red apple", 5
JUST_GUIDED = 1.0 + 2.0**-23  # both halves run, and the conditional one is used
GUIDED: dict[str, Any] = {"negative_prompt": "a dog", "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Any:
    return loaded_reference(tiny_checkpoint)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Pipeline:
    return opened(tiny_bundle)


@pytest.fixture(scope="module")
def inpainting_reference(inpainting_checkpoint: Path) -> Any:
    return loaded_reference(inpainting_checkpoint)


@pytest.fixture(scope="module")
def inpainting_pipeline(inpainting_bundle: Path) -> Pipeline:
    return opened(inpainting_bundle)


@pytest.fixture(scope="module")
def variations_reference(variations_checkpoint: Path) -> Any:
    return loaded_reference(variations_checkpoint)


@pytest.fixture(scope="module")
def variations_pipeline(variations_bundle: Path) -> Pipeline:
    return opened(variations_bundle)


@pytest.fixture(scope="module")
def lcm_reference(lcm_checkpoint: Path) -> Any:
    return loaded_reference(lcm_checkpoint)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def error(latents: Array, expected: Array) -> float:
    """Over the largest latent, as a share of the tolerance."""
    return float(np.max(np.abs(latents - expected)) / np.max(np.abs(expected))) / tolerances.TASK_RUN


def noise_of(number: int) -> Array:
    """A draw of the seed's stream, float32 [1, 4, h, w]."""
    return noise_source("cpu", [SEED]).draw(number, (4, SIDE // FACTOR, SIDE // FACTOR))


def draw(pipeline: Pipeline, prompt: Any = PROMPT, **options: Any) -> Array:
    given = {"num_inference_steps": STEPS, "seed": SEED, "rng": "cpu", "output_type": "latents", **options}
    return np.asarray(pipeline(prompt, **given).latents)


# --- image to image


def image_to_image(reference: Any, pipeline: Pipeline, sampler: str, **options: Any) -> Array:
    task = as_task(reference, diffusers.StableDiffusionImg2ImgPipeline, pipeline, sampler)
    drawn = task(
        PROMPT,
        image=Image.fromarray(picture()),
        num_inference_steps=STEPS,
        generator=generators(SEED),
        output_type="latent",
        **options,
    )
    return np.asarray(drawn.images)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "pndm"])
@pytest.mark.parametrize("strength", [0.2, 0.99, 1.0])
def test_image_to_image(reference: Any, pipeline: Pipeline, sampler: str, strength: float) -> None:
    options = {**GUIDED, "strength": strength}
    expected = image_to_image(reference, pipeline, sampler, **options)
    assert error(draw(pipeline, image=picture(), sampler=sampler, **options), expected) <= 1


def test_a_strength_of_less_than_a_step_is_one_step(pipeline: Pipeline) -> None:
    """Where diffusers fails."""
    drawn = [draw(pipeline, image=picture(), strength=strength) for strength in (1e-9, 0.1, 0.2)]
    assert np.array_equal(drawn[0], drawn[2])
    assert np.array_equal(drawn[1], drawn[2])


def test_given_latents_are_the_noise_of_the_picture(pipeline: Pipeline) -> None:
    """diffusers takes none here: they stand for the noise of the seed, as without a picture."""
    options: dict[str, Any] = {"image": picture(), "strength": 0.6, "sampler": "euler_a"}
    noise = noise_of(1)
    assert np.array_equal(draw(pipeline, latents=noise, **options), draw(pipeline, **options))
    assert not np.array_equal(draw(pipeline, latents=-noise, **options), draw(pipeline, **options))


def test_frames_between_seeds_start_with_the_first_ones_picture(pipeline: Pipeline) -> None:
    options: dict[str, Any] = {"image": picture(), "strength": 0.6, "sampler": "euler_a", "rng": "cpu"}
    options |= {"num_inference_steps": STEPS, "seed": SEED, "output_type": "latents"}
    frames = pipeline.interpolate(PROMPT, frames=2, to_seed=SEED + 1, **options).latents
    alone = pipeline(PROMPT, **options).latents
    assert error(frames[:1], alone) <= 1
    assert error(frames[1:], alone) > 100


# --- inpainting


def inpainted(reference: Any, pipeline: Pipeline, sampler: str, mask: Array, **options: Any) -> Array:
    task = as_task(reference, diffusers.StableDiffusionInpaintPipeline, pipeline, sampler)
    drawn = task(
        PROMPT,
        image=Image.fromarray(picture()),
        # Not Pillow's picture: of a mask of Pillow's diffusers makes black and white.
        mask_image=torch.from_numpy(mask.astype(np.float32) / 255)[None, None],
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        generator=generators(SEED),
        output_type="latent",
        **options,
    )
    return np.asarray(drawn.images)


def test_what_is_kept_are_the_pictures_own_latents(reference: Any, pipeline: Pipeline) -> None:
    drawn = draw(pipeline, image=picture(), mask_image=mask_image(), **GUIDED)
    kept = np.broadcast_to(mask_image()[::FACTOR, ::FACTOR] == 0, drawn.shape)
    with torch.no_grad():
        pixels = reference.image_processor.preprocess(Image.fromarray(picture()))
        posterior = reference.vae.encode(pixels).latent_dist
        known = (posterior.sample(*generators(SEED)) * reference.vae.config.scaling_factor).numpy()
    assert error(drawn[kept], known[kept]) <= 1
    assert error(drawn[~kept], known[~kept]) > 1000


def test_all_white_is_drawn_as_without_a_picture(pipeline: Pipeline) -> None:
    white = np.full((SIDE, SIDE), 255, np.uint8)
    drawn = draw(pipeline, image=picture(), mask_image=white, **GUIDED)
    assert error(drawn, draw(pipeline, latents=noise_of(1), **GUIDED)) <= 1


def test_inpainting_unguided_reads_the_same_rows(
    inpainting_reference: Any, inpainting_pipeline: Pipeline
) -> None:
    expected = inpainted(
        inpainting_reference, inpainting_pipeline, "ddim", mask_image(), guidance_scale=1.0, strength=1.0
    )
    options: dict[str, Any] = {"image": picture(), "mask_image": mask_image(), "sampler": "ddim"}
    assert error(draw(inpainting_pipeline, guidance_scale=1.0, **options), expected) <= 1
    # Half of the steps with both halves, half with one: each has to be told of the picture.
    drawn = draw(inpainting_pipeline, guidance_scale=[3.0, 1.0, 3.0, 1.0, 1.0], **options)
    both = draw(
        inpainting_pipeline, guidance_scale=[3.0, JUST_GUIDED, 3.0, JUST_GUIDED, JUST_GUIDED], **options
    )
    assert error(drawn, both) <= 1


# --- variations of a picture


def varied(reference: Any, pipeline: Pipeline, image: Array, *seeds: int, **options: Any) -> Array:
    parts = dict(reference.components)
    del parts["feature_extractor"]
    task = diffusers.StableDiffusionImageVariationPipeline(
        **{**parts, "scheduler": diffusers_scheduler("ddim", pipeline.bundle.manifest.schedule)},
        feature_extractor=None,
        requires_safety_checker=False,
    )
    task.set_progress_bar_config(disable=True)
    facts = pipeline.bundle.manifest.image_processor
    assert facts is not None
    size = {"shortest_edge": facts.size}
    processor = CLIPImageProcessor(
        size=size, crop_size=facts.size, image_mean=list(facts.mean), image_std=list(facts.std)
    )
    pixels = processor(Image.fromarray(image), return_tensors="pt").pixel_values
    drawn = task(
        pixels,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        num_images_per_prompt=len(seeds),
        generator=generators(*seeds),
        output_type="latent",
        **options,
    )
    return np.asarray(drawn.images)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_image_variations(
    variations_reference: Any, variations_pipeline: Pipeline, guidance_scale: float
) -> None:
    image = picture(40)[:33]  # to be resized and cut
    expected = varied(variations_reference, variations_pipeline, image, 5, 6, guidance_scale=guidance_scale)
    options: dict[str, Any] = {"guidance_scale": guidance_scale, "sampler": "ddim"}
    drawn = draw(variations_pipeline, None, image=image, num_images_per_prompt=2, **options)
    assert error(drawn, expected) <= 1
    other = draw(variations_pipeline, None, image=image[::-1], num_images_per_prompt=2, **options)
    assert error(other, expected) > 100


def test_the_picture_is_encoded_once_for_all_of_its_variations(variations_bundle: Path) -> None:
    pipeline = opened(variations_bundle)
    encoder = spy(pipeline, "image_encoder")
    draw(pipeline, None, image=picture(), num_images_per_prompt=3)
    draw(pipeline, None, image=picture().copy())
    assert encoder.evaluations == 1
    draw(pipeline, None, image=picture()[::-1])
    assert encoder.evaluations == 2


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("a cat", {}, "a prompt is given: this bundle draws variations of an image and reads no text"),
        (None, {"image": None}, "the image is missing"),
        (None, {"negative_prompt": "a dog"}, "negative_prompt is given: a bundle of image variations"),
        (None, {"clip_skip": 1}, "clip_skip is given"),
        (None, {"plain_prompt": True}, "plain_prompt is given"),
        (None, {"strength": 0.5}, "strength is given"),
        (None, {"strength": 0.0}, "strength is given"),
        (None, {"mask_image": mask_image()}, "mask_image is given"),
        (None, {"expand": (1, 1, 1, 1)}, "expand is given"),
        (None, {"variation": 0.5}, "variation is given"),
        (None, {"num_images_per_prompt": 0}, "num_images_per_prompt is 0: a whole number from 1 to 1000"),
    ],
)
def test_image_variations_refuse(
    variations_pipeline: Pipeline, prompt: str | None, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        variations_pipeline(prompt, **{"image": picture(), **options})


def test_image_variations_learn_no_words(variations_pipeline: Pipeline) -> None:
    with pytest.raises(UsageError, match="this bundle reads no text"):
        variations_pipeline.load_textual_inversion("x.safetensors")
    with pytest.raises(UsageError, match="draws variations of an image: there are no prompts"):
        variations_pipeline.interpolate("a", "b", frames=2, image=picture())


# --- latent consistency


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the scheduler's offset
@pytest.mark.parametrize("guidance_scale", [1.0, 8.5])
@pytest.mark.parametrize("steps", [1, 4])
def test_latent_consistency(lcm_reference: Any, lcm_bundle: Path, guidance_scale: float, steps: int) -> None:
    pipeline = opened(lcm_bundle)
    unet = spy(pipeline, "unet")
    task = as_task(lcm_reference, diffusers.LatentConsistencyModelPipeline, pipeline, "lcm")
    drawn = task(
        PROMPT,
        height=SIDE,
        width=SIDE,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=generators(SEED),
        output_type="latent",
    )
    ours = draw(pipeline, num_inference_steps=steps, guidance_scale=guidance_scale)
    assert error(ours, np.asarray(drawn.images)) <= 1
    assert [bound["sample"][0] for bound in unet.bound] == [1]  # no unconditional half
    assert unet.evaluations == steps


def test_latent_consistency_is_told_its_guidance(lcm_bundle: Path) -> None:
    pipeline = opened(lcm_bundle)
    one, other = (draw(pipeline, guidance_scale=scale) for scale in (1.0, 8.5))
    assert error(one, other) > 100
    assert np.array_equal(
        draw(pipeline), draw(pipeline, num_inference_steps=5, sampler="lcm", guidance_scale=8.5)
    )
    with pytest.raises(UsageError, match="guidance_interval is given: this model is told its guidance"):
        pipeline(PROMPT, guidance_interval=(0.1, 0.5))
    with pytest.raises(UsageError, match="guidance_scale is a list: this model is told one number"):
        pipeline(PROMPT, guidance_scale=[1.0, 2.0, 3.0, 4.0])
    with pytest.raises(UsageError, match=r"guidance_rescale is 0\.5: this model is told its guidance"):
        pipeline(PROMPT, guidance_rescale=0.5)


# --- guidance


@pytest.mark.parametrize("phi", [0.3, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_guidance_rescale(reference: Any, pipeline: Pipeline, sampler: str, phi: float) -> None:
    task = as_task(reference, diffusers.StableDiffusionPipeline, pipeline, sampler)
    options = {**GUIDED, "guidance_rescale": phi}
    drawn = task(
        PROMPT,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        generator=generators(SEED),
        output_type="latent",
        **options,
    )
    ours = draw(pipeline, sampler=sampler, **options)
    assert error(ours, np.asarray(drawn.images)) <= 1
    assert error(draw(pipeline, sampler=sampler, **GUIDED), ours) > 2 * STEPS * phi
