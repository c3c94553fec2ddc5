"""SDXL through the runtime: equal to diffusers' own pipeline, and on a GPU's device equal to the host's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.fakes.recording import RecordedExecutor, RecordingDriver, recording_device
from support.references.lora_files import as_kohya, checkpoint_map, layers, pairs, write

import tolerances
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.parity.reference import reference_pipeline
from sdrt.runtime.errors import UsageError
from sdrt.runtime.pipeline import Pipeline

SIDE = 16  # pixels of the tiny bundle
PROMPTS = ["a red apple", "a cat"]
OPTIONS: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "no negative prompt": {},
    "an empty negative prompt": {"negative_prompt": ""},
    "a negative prompt": {"negative_prompt": "a dog"},
    "no guidance": {"guidance_scale": 1.0},
    "another original size": {"negative_prompt": "", "original_size": (64, 48)},
    "a crop": {"negative_prompt": "", "crops_coords_top_left": (3, 5)},
    "another target size": {"negative_prompt": "", "target_size": (32, 20)},
}


@pytest.fixture(scope="module")
def pipeline(sdxl_bundle: Path) -> Pipeline:
    return Pipeline.load(sdxl_bundle, backend="onnxruntime-cpu")


@pytest.fixture(scope="module")
def reference(sdxl_checkpoint: Path) -> Any:
    return reference_pipeline(open_checkpoint(str(sdxl_checkpoint)))


@pytest.fixture(scope="module")
def recorded(pipeline: Pipeline) -> Pipeline:
    """The same networks on the recording driver's GPU."""
    driver = RecordingDriver()
    device = recording_device(driver)
    executors = {name: RecordedExecutor(one, device, driver) for name, one in pipeline._executors.items()}
    return Pipeline(pipeline.bundle, executors, device, "recording")


def draw(pipeline: Pipeline, case: str) -> Any:
    latents = pipeline.initial_latents([1, 2])
    options = {**OPTIONS, **CASES[case]}
    return pipeline(PROMPTS, sampler="ddim", latents=latents, output_type="numpy", **options)


def expected(reference: Any, latents: NDArray[np.float32], case: str) -> NDArray[np.float32]:
    import torch

    options = {"original_size": (SIDE, SIDE), "target_size": (SIDE, SIDE), **OPTIONS, **CASES[case]}
    if "negative_prompt" in options:
        options["negative_prompt"] = [options["negative_prompt"]] * len(PROMPTS)
    drawn = reference(
        PROMPTS,
        latents=torch.from_numpy(latents.copy()),
        height=64,  # only checked: the latents decide
        width=64,
        output_type="latent",
        **options,
    )
    result: NDArray[np.float32] = drawn.images.numpy()
    return result


@pytest.mark.parametrize("case", CASES)
def test_latents_are_those_of_diffusers(pipeline: Pipeline, reference: Any, case: str) -> None:
    drawn = draw(pipeline, case).latents
    wanted = expected(reference, pipeline.initial_latents([1, 2]), case)
    assert np.max(np.abs(drawn - wanted)) <= tolerances.SDXL_RUN * np.max(np.abs(wanted))


def test_every_case_draws_something_else(pipeline: Pipeline) -> None:
    """By far more than the tolerance: an argument that did nothing would show."""
    drawn = [draw(pipeline, case).latents for case in CASES]
    for index, one in enumerate(drawn):
        for other in drawn[index + 1 :]:
            assert np.max(np.abs(one - other)) > 100 * tolerances.SDXL_RUN * np.max(np.abs(one))


def test_loras_are_those_of_diffusers(
    pipeline: Pipeline, reference: Any, sdxl_checkpoint: Path, tmp_path: Path
) -> None:
    """Of the U-Net and both text encoders, as PEFT computes them; and the first picture comes back."""
    weights = checkpoint_map(sdxl_checkpoint)
    networks = {name: layers(weights, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    file = write(tmp_path / "style.safetensors", as_kohya(pairs(weights, networks)))
    case = "a negative prompt"
    plain, latents = draw(pipeline, case).latents, pipeline.initial_latents([1, 2])
    name = pipeline.load_lora_weights(file)
    assert set(pipeline.get_list_adapters()) == set(networks)
    drawn = draw(pipeline, case).latents
    pipeline.unload_lora_weights(name)
    reference.load_lora_weights(file)
    try:
        wanted = expected(reference, latents, case)
    finally:
        reference.unload_lora_weights()
    assert np.max(np.abs(drawn - wanted)) <= tolerances.SDXL_RUN * np.max(np.abs(wanted))
    assert np.max(np.abs(drawn - plain)) > 100 * tolerances.SDXL_RUN * np.max(np.abs(wanted))
    assert np.array_equal(draw(pipeline, case).latents, plain)


@pytest.mark.parametrize(("kind", "sampler"), [("turbo", "euler_a"), ("lightning", "euler")])
@pytest.mark.parametrize("steps", [1, 4])
def test_few_steps_are_those_of_diffusers(
    pipeline: Pipeline, reference: Any, kind: str, sampler: str, steps: int
) -> None:
    """As SDXL Turbo's scheduler has it, and as Lightning's authors want SDXL's: trailing, unguided."""
    import diffusers
    import torch

    scheduler = {
        "turbo": diffusers.EulerAncestralDiscreteScheduler,
        "lightning": diffusers.EulerDiscreteScheduler,
    }
    own = scheduler[kind].from_config(reference.scheduler.config, timestep_spacing="trailing")
    task = diffusers.StableDiffusionXLPipeline(**{**reference.components, "scheduler": own})
    task.set_progress_bar_config(disable=True)
    latents = pipeline.initial_latents([1, 2], rng="cpu")
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    for generator in generators:  # whose first draw the latents are
        torch.randn(latents.shape[1:], generator=generator)
    wanted = task(
        PROMPTS,
        latents=torch.from_numpy(latents),
        **{"height": 64, "width": 64, "original_size": (SIDE, SIDE), "target_size": (SIDE, SIDE)},
        num_inference_steps=steps,
        guidance_scale=0.0,
        generator=generators,
        output_type="latent",
    ).images.numpy()
    options: dict[str, Any] = {"spacing": "trailing", "sampler": sampler, "guidance_scale": 1.0, "rng": "cpu"}
    drawn = pipeline(PROMPTS, seed=[1, 2], num_inference_steps=steps, output_type="latent", **options).latents
    assert np.max(np.abs(drawn - wanted)) <= tolerances.SDXL_RUN * np.max(np.abs(wanted))


@pytest.mark.parametrize("case", CASES)
def test_pictures_of_a_gpu_are_those_of_the_host(pipeline: Pipeline, recorded: Pipeline, case: str) -> None:
    one, other = draw(pipeline, case), draw(recorded, case)
    assert np.array_equal(one.latents, other.latents)
    assert np.array_equal(one.images, other.images)


@pytest.mark.parametrize("case", CASES)
def test_recipe_draws_the_same_picture_again(pipeline: Pipeline, case: str) -> None:
    """A negative prompt that was not given stays so: it is not the empty one."""
    first = pipeline("x", seed=7, output_type="numpy", **{**OPTIONS, **CASES[case]})
    about = {"backend", "model", "model_sha256", "version"}
    again = {name: value for name, value in first.recipes[0].items() if name not in about}
    assert "original_size" in again
    assert np.array_equal(pipeline(**again, output_type="latents").latents, first.latents)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"original_size": 16}, "original_size is 16: two whole numbers are wanted"),
        ({"original_size": (1, 2, 3)}, r"original_size is \(1, 2, 3\): two whole numbers"),
        ({"target_size": "16"}, "target_size is '16': two whole numbers"),
        ({"target_size": (16.0, 16)}, "target_size is 16.0: a whole number is wanted"),
        ({"crops_coords_top_left": (-1, 0)}, r"crops_coords_top_left is \(-1, 0\): from 0 to 16384 pixels"),
        ({"original_size": (10**9, 1)}, "from 0 to 16384 pixels"),
    ],
)
def test_bad_sizes(pipeline: Pipeline, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        pipeline("x", **OPTIONS, **options)
