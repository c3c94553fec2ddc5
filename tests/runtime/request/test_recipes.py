"""Recipes: each draws its picture again bit for bit, out of any file, or says what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file
from support.runs.pipeline_spies import assert_equal
from support.runs.task_calls import MASK, PICTURE, TASKS

from sdrt.runtime.errors import UsageError
from sdrt.runtime.pictures.metadata import parameters_text, read_recipe
from sdrt.runtime.pictures.writing import save_image
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.request.recipes import RecipeWarning
from sdrt.runtime.samplers.registry import SAMPLERS, find_sampler

SHORT: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 3.0}
FREE: dict[str, Any] = {"num_inference_steps": None}
# What a recipe has to hold beyond the calls of `TASKS`, whose pictures are files here.
CALLS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "a cat"},
    "a list": {"prompt": ["a", "b, c"], "negative_prompt": ["d", ""], "num_images_per_prompt": 2},
    "noise": {"prompt": "a cat", "sampler": "DPM++ 2M SDE Karras", "rng": "cpu"},
    "eta": {"prompt": "a cat", "sampler": "DDIM", "eta": 0.5},
    "levels": {"prompt": "a cat", "sampler": "euler", "sigmas": [9.0, 5.0, 0.0], **FREE},
    "timesteps": {"prompt": "a cat", "sampler": "ddim", "timesteps": [900, 500, 100], **FREE},
    "order": {"prompt": "a cat", "sampler": "deis", "solver_order": 3, "lower_order_final": False},
    "plain": {"prompt": "a (cat", "plain_prompt": True, "spacing": "trailing"},
    "size": {"prompt": "a cat", "height": 20, "width": 24},
    "distilled": {"prompt": "a cat", "sampler": "lcm", "original_inference_steps": 20},
    "word": {"prompt": "a <toy>", "negative_prompt": "TOY"},
    "mask of a size": {"prompt": "a cat", "image": PICTURE, "mask_image": MASK, "height": 20, "width": 20},
    "odd picture": {"prompt": "a cat", "image": PICTURE[:, :13], "expand": (1, 0, 0, 3)},
    "large picture": {"prompt": "a cat", "image": np.tile(PICTURE, (3, 2, 1)), "strength": 0.5},
    **TASKS,
}


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    loaded = Pipeline.load(tiny_bundle)
    file = tmp_path_factory.mktemp("embedding") / "toy.safetensors"
    save_file({"emb_params": np.ones((2, 16), np.float32)}, file)
    loaded.load_textual_inversion(file, "<toy>")
    return loaded


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_files(call: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The call with its pictures written to files."""
    files: dict[str, Any] = {}
    for name in ("image", "mask_image"):
        if name in call:
            Image.fromarray(call[name]).save(folder / f"{name}.png")
            files[name] = f"{name}.png"
    return {**call, **files}


@pytest.mark.parametrize("name", CALLS)
def test_a_recipe_draws_its_picture_again(pipeline: Pipeline, work: Path, name: str) -> None:
    """Of every image of the call; once straight, once out of a file."""
    output = pipeline(**{"seed": 5, **SHORT, **with_files(CALLS[name], work)})
    suffix = (".png", ".jpg", ".webp")[len(name) % 3]
    for image, latents, recipe in zip(output.images, output.latents, output.recipes, strict=True):
        save_image(image, f"a{suffix}", recipe)
        found = read_recipe(f"a{suffix}")
        assert found == recipe
        again = pipeline(**found)
        assert np.array_equal(np.asarray(again.images[0]), np.asarray(image))
        assert np.array_equal(again.latents[0], latents)
        assert again.recipes == (recipe,)
        _check_a1111_text(parameters_text(recipe), image, recipe)


def _check_a1111_text(text: str, image: Image.Image, recipe: dict[str, Any]) -> None:
    """What the text for A1111's web UI says is what the recipe says."""
    *lines, last = text.split("\n")
    negative = recipe["negative_prompt"]
    assert lines == [recipe["prompt"], *([f"Negative prompt: {negative}"] if negative else [])]
    pairs = dict(pair.split(": ") for pair in last.split(", "))
    assert pairs["Size"] == f"{image.width}x{image.height}"
    sampler, implied = find_sampler(pairs["Sampler"])
    levels = {"sigma_schedule": "karras"} if recipe["karras"] else {}
    spacing = {"spacing": "sgm_uniform"} if recipe.get("spacing") == "trailing" else {}
    named = {name: recipe[name] for name in ("sigma_schedule",) if name in recipe}
    assert (sampler, implied) == (recipe["sampler"], {**levels, **named, **spacing})
    for key, name in (("Steps", "num_inference_steps"), ("Seed", "seed"), ("Denoising strength", "strength")):
        assert pairs.get(key, "None") == str(recipe.get(name))
    scale = recipe["guidance_scale"]
    assert pairs.get("CFG scale") == (None if isinstance(scale, list) else str(scale))
    assert pairs.get("Clip skip", "1") == str(1 + recipe.get("clip_skip", 0))


_SAMPLERS = st.sampled_from([*SAMPLERS, "DPM++ 2M Karras", "Euler a Exponential", "LMS Beta"])
_MIXED = st.fixed_dictionaries(
    {"prompt": st.sampled_from(["a cat", "(a:1.3) b BREAK c", "", 'café — 🍎\n"x"']), "sampler": _SAMPLERS},
    optional={
        "negative_prompt": st.sampled_from(["b", ""]),
        "seed": st.sampled_from([-1, 0, 2**64 - 1]),
        "clip_skip": st.sampled_from([0, 1]),
        "plain_prompt": st.booleans(),
        "height": st.sampled_from([16, 20]),
        "num_images_per_prompt": st.sampled_from([1, 3]),
        "rng": st.sampled_from(["cpu", "philox"]),
        "num_inference_steps": st.integers(1, 5),
        "guidance_scale": st.sampled_from([0, 1.0, 7]),
        "guidance_rescale": st.sampled_from([0.0, 0.5]),
        "spacing": st.sampled_from(["trailing", "linspace", "leading"]),
        "eta": st.sampled_from([0, 0.5, 1]),
        "lower_order_final": st.booleans(),
        "strength": st.sampled_from([0.3, 1.0]),
        "image": st.just(PICTURE[:, :13]),
        "mask_image": st.just(MASK[:, :13]),
        "expand": st.sampled_from([(1, 2, 3, 4), [0, 0, 5, 0]]),
    },
)


@given(call=_MIXED)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_options_together(pipeline: Pipeline, work: Path, call: dict[str, Any]) -> None:
    try:
        output = pipeline(**with_files(call, work))
    except UsageError:  # some contradict each other
        reject()
    for image, recipe in zip(output.images, output.recipes, strict=True):
        again = pipeline(**json.loads(json.dumps(recipe)))
        assert np.array_equal(np.asarray(again.images[0]), np.asarray(image))
        assert again.recipes == (recipe,)


@pytest.mark.parametrize("ends", [{"to_prompt": "a dog"}, {"to_seed": 9}, {"to_prompt": "b", "to_seed": 8}])
def test_a_recipe_of_frames(pipeline: Pipeline, ends: dict[str, Any]) -> None:
    """One frame's draws that frame, and without the frame's number all of them."""
    output = pipeline.interpolate("a cat", frames=3, seed=5, **ends, **SHORT)
    for image, recipe in zip(output.images, output.recipes, strict=True):
        assert np.array_equal(np.asarray(pipeline(**recipe).images[0]), np.asarray(image))
    every = {name: value for name, value in output.recipes[0].items() if name != "frame"}
    assert_equal(pipeline(**every), output)
    assert_equal(pipeline.interpolate(**every), output)


@pytest.mark.parametrize("kind", ["inpainting", "lcm", "variations"])
def test_recipes_of_other_kinds_of_bundles(request: pytest.FixtureRequest, kind: str, work: Path) -> None:
    calls: dict[str, dict[str, Any]] = {
        "inpainting": {"prompt": "a cat", "image": PICTURE, "mask_image": MASK},
        "lcm": {"prompt": "a cat"},
        "variations": {"image": PICTURE},
    }
    with Pipeline.load(request.getfixturevalue(f"{kind}_bundle"), verify=False) as pipeline:
        output = pipeline(**with_files(calls[kind], work), seed=5, num_inference_steps=2)
        assert_equal(pipeline(**output.recipes[0]), output)


# --- what is not as it was


def test_what_is_missing_is_said(pipeline: Pipeline, tiny_bundle: Path, work: Path) -> None:
    def recipe(**call: Any) -> dict[str, Any]:
        return pipeline(**{"prompt": "x", "seed": 5, "num_inference_steps": 1, **call}).recipes[0]

    from_array, from_file = recipe(image=PICTURE), recipe(**with_files({"image": PICTURE}, work))
    assert "image" not in from_array
    assert_equal(pipeline(**{**from_array, "image": PICTURE}), pipeline(**from_file))
    taught = recipe(prompt="a <toy>")
    latents = recipe(latents=np.zeros((1, 4, 8, 8), np.float32))
    with Pipeline.load(tiny_bundle, verify=False) as other:
        for given, words in (
            (from_array, "from a picture that was not a file .*: give it as image"),
            ({**from_array, "image": 255 - PICTURE}, "image that is given is not the one that the recipe"),
            (taught, "textual inversion '<toy>' .* is not loaded: give it with load_textual_inversion"),
            ({**taught, "embeddings": ["<toy>"]}, "embeddings is list"),
            (latents, "latents that the caller gave: give them"),
            ({**from_file, "interrupted_after_step": 2}, "was interrupted after step 2"),
            ({**from_file, "imagine": 2}, "the pipeline has no imagine, did you mean image"),
        ):
            with pytest.raises(UsageError, match=words):
                other(**given)
        (work / "image.png").write_bytes((work / "image.png").read_bytes())
        Image.fromarray(255 - PICTURE).save(work / "image.png")
        with pytest.raises(UsageError, match=r"the image image.png is not the one .*give that one, or leave"):
            other(**from_file)
        other(**{**from_file, "image_sha256": None})
        (work / "image.png").unlink()
        with pytest.raises(UsageError, match=r"image image.png does not exist"):
            other(**from_file)


def test_a_recipe_of_another_model_warns(pipeline: Pipeline) -> None:
    recipe = pipeline("x", seed=5, num_inference_steps=1).recipes[0]
    with pytest.warns(RecipeWarning, match=r"of the model other .* this bundle is of tiny .*be another"):
        pipeline(**{**recipe, "model": "other", "model_sha256": "0" * 64})
