"""The pipeline on the tiny bundle: what each argument does, what is cached, and how failures are told."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.runs.pipeline_spies import OpenPipeline, assert_close, assert_differ, assert_equal, spy

from sdrt.runtime.backends.executor import FixedWeights
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.devices.gpu import discovery
from sdrt.runtime.drawing import shapes
from sdrt.runtime.drawing import text_conditioning as prompts
from sdrt.runtime.drawing.finished_images import BlackImageWarning
from sdrt.runtime.drawing.text_conditioning import PromptEncoder, PromptTruncatedWarning
from sdrt.runtime.errors import BackendError, BundleError, NumericsError, UsageError
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.samplers.noise import RNGS, noise_source
from sdrt.runtime.samplers.registry import SAMPLERS, make_table

Array = NDArray[Any]
SHORT: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "numpy"}
MAX_BATCH = 2  # of the tiny bundle


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Pipeline:
    return Pipeline.load(tiny_bundle)


@pytest.fixture
def fresh(tiny_bundle: Path) -> OpenPipeline:
    """A pipeline that a test may spoil, with empty caches."""
    loaded = OpenPipeline.load(tiny_bundle, verify=False)
    assert isinstance(loaded, OpenPipeline)
    return loaded


# --- what a call gives


def test_a_picture(pipeline: Pipeline) -> None:
    output = pipeline("a red apple", seed=3)
    (image,) = output.images
    assert image.size == (16, 16)
    assert image.mode == "RGB"
    assert output.latents.shape == (1, 4, 8, 8)
    assert output.latents.dtype == np.float32
    assert np.isfinite(output.latents).all()
    assert {"text_encoder", "denoise", "vae_decoder", "total", "step"} == set(output.timings)
    assert all(seconds > 0 for seconds in output.timings.values())
    stages = sum(output.timings[stage] for stage in ("text_encoder", "denoise", "vae_decoder"))
    assert stages <= output.timings["total"]
    assert output.timings["step"] == pytest.approx(output.timings["denoise"] / 20)


def test_recipe_is_everything_and_plain_data(pipeline: Pipeline) -> None:
    output = pipeline(["a", "b"], negative_prompt=["c", "d"], seed=2**64 - 1, **SHORT)
    assert [recipe["seed"] for recipe in output.recipes] == [2**64 - 1, 0]
    assert [recipe["prompt"] for recipe in output.recipes] == ["a", "b"]
    assert [recipe["negative_prompt"] for recipe in output.recipes] == ["c", "d"]
    recipe = json.loads(json.dumps(output.recipes[0]))
    assert recipe == output.recipes[0]
    assert recipe["sampler"] == "dpmpp_2m"  # the bundle's default, spelt out
    assert (recipe["height"], recipe["width"], recipe["num_inference_steps"]) == (16, 16, 3)
    assert recipe["model"] == "tiny"
    assert len(recipe["model_sha256"]) == 64


def test_output_types(pipeline: Pipeline) -> None:
    arguments = {**SHORT, "seed": 1, "num_images_per_prompt": 2}
    arrays = pipeline("x", **arguments)
    pictures = pipeline("x", **{**arguments, "output_type": "pil"})
    latents = pipeline("x", **{**arguments, "output_type": "latents"})
    assert arrays.images.shape == (2, 16, 16, 3)
    assert arrays.images.dtype == np.uint8
    assert len(pictures.images) == 2
    assert_equal(arrays, pictures)
    assert latents.images == []
    assert np.array_equal(latents.latents, arrays.latents)
    assert "vae_decoder" not in latents.timings


def test_output_types_of_diffusers(pipeline: Pipeline) -> None:
    arguments = {**SHORT, "seed": 1, "num_images_per_prompt": 3}
    arrays = pipeline("x", **arguments)
    floats = pipeline("x", **{**arguments, "output_type": "np"}).images
    assert (floats.dtype, floats.shape) == (np.float32, (3, 16, 16, 3))
    assert np.array_equal((floats * 255).round().astype(np.uint8), arrays.images)  # as its numpy_to_pil does
    latent = pipeline("x", **{**arguments, "output_type": "latent"})
    assert np.array_equal(latent.images, arrays.latents)
    assert np.array_equal(latent.latents, arrays.latents)
    with pytest.raises(UsageError, match=r"does without PyTorch; of output_type='np', torch.from_numpy"):
        pipeline("x", **{**arguments, "output_type": "pt"})


def test_latents_output_does_not_decode(fresh: OpenPipeline) -> None:
    decoder = spy(fresh, "vae_decoder")
    fresh("x", **{**SHORT, "output_type": "latents"})
    assert decoder.evaluations == 0


# --- seeds and noise


def test_same_call_twice_is_equal_bit_for_bit(pipeline: Pipeline, fresh: OpenPipeline) -> None:
    first = pipeline(["a", "b"], seed=5, **SHORT)
    assert_equal(pipeline(["a", "b"], seed=5, **SHORT), first)
    assert_equal(fresh(["a", "b"], seed=5, **SHORT), first)


@pytest.mark.parametrize("rng", RNGS)
def test_image_of_a_batch_is_that_of_its_own_seed(pipeline: Pipeline, rng: Any) -> None:
    """Five images in batches of two, two and one; DDIM with noise, so that every draw counts."""
    arguments = {**SHORT, "sampler": "ddim", "eta": 1.0, "rng": rng}
    batch = pipeline("a red apple", seed=2**32 - 2, num_images_per_prompt=5, **arguments)
    assert len(batch.images) == len(batch.latents) == len(batch.recipes) == 5
    for index, recipe in enumerate(batch.recipes):
        assert recipe["seed"] == 2**32 - 2 + index
        single = pipeline("a red apple", seed=recipe["seed"], **arguments)
        assert_close(batch.latents[index], single.latents[0])
        difference = np.abs(batch.images[index].astype(int) - single.images[0].astype(int))
        assert difference.max() <= 1


def test_list_of_seeds(pipeline: Pipeline) -> None:
    batch = pipeline(["a", "b"], seed=[7, 3], **SHORT)
    for index, (prompt, seed) in enumerate([("a", 7), ("b", 3)]):
        assert_close(batch.latents[index], pipeline(prompt, seed=seed, **SHORT).latents[0])


def test_no_seed_draws_another_picture_each_time_and_says_its_seed(pipeline: Pipeline) -> None:
    first, second = pipeline("x", **SHORT), pipeline("x", **SHORT)
    assert first.recipes[0]["seed"] != second.recipes[0]["seed"]
    assert_equal(pipeline("x", seed=first.recipes[0]["seed"], **SHORT), first)


def test_a_seed_of_minus_one_is_random(pipeline: Pipeline) -> None:
    """As in A1111's web UI; in a list each of its own."""
    first, second = (pipeline("x", seed=-1, **SHORT).recipes[0]["seed"] for _ in range(2))
    assert first != second
    seeds = [recipe["seed"] for recipe in pipeline(["x"] * 3, seed=[-1, 7, -1], **SHORT).recipes]
    assert seeds[1] == 7
    assert len({*seeds, first, second}) == 5


def test_seed_zero_is_a_seed(pipeline: Pipeline) -> None:
    output = pipeline("x", seed=0, **SHORT)
    assert output.recipes[0]["seed"] == 0
    assert_equal(pipeline("x", seed=0, **SHORT), output)


def test_generators_differ(pipeline: Pipeline) -> None:
    outputs = [pipeline("x", seed=1, rng=rng, **SHORT) for rng in RNGS]
    assert_differ(outputs[0].latents, outputs[1].latents)


@pytest.mark.parametrize("rng", RNGS)
def test_given_latents_take_the_place_of_the_seeds(pipeline: Pipeline, rng: Any) -> None:
    seeds = [4, 9]
    expected = pipeline(["a", "b"], seed=seeds, rng=rng, **SHORT)
    initial = pipeline.initial_latents(seeds, 16, 16, rng=rng)
    assert np.array_equal(initial, noise_source(rng, seeds).draw(0, (4, 8, 8)))
    kept = initial.copy()
    assert_equal(pipeline(["a", "b"], latents=initial, **SHORT), expected)
    assert np.array_equal(initial, kept)


def test_given_latents_with_a_noisy_sampler_take_the_step_noise_of_the_seed(pipeline: Pipeline) -> None:
    arguments = {**SHORT, "sampler": "ddim", "eta": 1.0, "seed": 4}
    expected = pipeline("a", **arguments)
    initial = pipeline.initial_latents([4], 16, 16)
    assert_equal(pipeline("a", latents=initial, **arguments), expected)


def test_eta(pipeline: Pipeline) -> None:
    outputs = [pipeline("x", seed=1, sampler="ddim", eta=eta, **SHORT) for eta in (0.0, 0.5, 1.0)]
    assert_differ(outputs[0].latents, outputs[1].latents)
    assert_differ(outputs[1].latents, outputs[2].latents)
    # A noisy run leaves noise in the buffers; it must not reach the next run.
    assert_equal(pipeline("x", seed=1, sampler="ddim", **SHORT), outputs[0])


# --- prompts and guidance


def test_eta_of_zero_is_no_noise(pipeline: Pipeline) -> None:
    """Not the sampler's own share, which is 1 for this one; a sampler without noise takes a zero too."""
    default, full, none, again = (
        pipeline("x", seed=1, sampler="euler_a", eta=eta, **SHORT) for eta in (None, 1.0, 0.0, 0)
    )
    plain = pipeline("x", seed=1, sampler="euler", eta=0.0, **SHORT)
    assert_equal(default, full)
    assert_equal(none, again)
    assert_differ(none.latents, full.latents)
    assert_close(none.latents, plain.latents)
    assert [output.recipes[0]["eta"] for output in (default, full, none)] == [None, 1.0, 0.0]


def test_lists_of_prompts_and_of_negative_prompts(pipeline: Pipeline) -> None:
    """Two prompts, two images of each, each with its own negative prompt: prompt by prompt."""
    prompts, negatives = ["a red apple", "a blue car"], ["green", "wheels"]
    batch = pipeline(prompts, negative_prompt=negatives, num_images_per_prompt=2, seed=10, **SHORT)
    assert [recipe["prompt"] for recipe in batch.recipes] == [prompts[0]] * 2 + [prompts[1]] * 2
    for index in range(4):
        single = pipeline(
            prompts[index // 2], negative_prompt=negatives[index // 2], seed=10 + index, **SHORT
        )
        assert_close(batch.latents[index], single.latents[0])


def test_one_negative_prompt_for_all(pipeline: Pipeline) -> None:
    one = pipeline(["a", "b"], negative_prompt="c", seed=1, **SHORT)
    assert_equal(pipeline(("a", "b"), negative_prompt=["c", "c"], seed=1, **SHORT), one)


def test_prompt_negative_prompt_and_guidance_all_matter(pipeline: Pipeline) -> None:
    base = pipeline("a", negative_prompt="c", seed=1, **SHORT).latents
    assert_differ(base, pipeline("b", negative_prompt="c", seed=1, **SHORT).latents)
    assert_differ(base, pipeline("a", negative_prompt="d", seed=1, **SHORT).latents)
    stronger = {**SHORT, "guidance_scale": 5.0}
    assert_differ(base, pipeline("a", negative_prompt="c", seed=1, **stronger).latents)


def test_no_negative_prompt_is_the_empty_one(pipeline: Pipeline) -> None:
    assert_equal(pipeline("a", seed=1, **SHORT), pipeline("a", negative_prompt="", seed=1, **SHORT))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1])
def test_without_guidance_one_half_runs(fresh: OpenPipeline, scale: float) -> None:
    unet, text_encoder = spy(fresh, "unet"), spy(fresh, "text_encoder")
    arguments = {**SHORT, "guidance_scale": scale, "seed": 1}
    output = fresh("a", negative_prompt="not looked at", **arguments)
    assert unet.bound == [
        {
            "sample": (1, 4, 8, 8),
            "timestep": (1,),
            "encoder_hidden_states": (1, 77, 16),
            "noise_pred": (1, 4, 8, 8),
        }
    ]
    assert unet.evaluations == 3
    assert text_encoder.evaluations == 1
    assert_equal(fresh("a", negative_prompt="nor this", **arguments), output)
    assert text_encoder.evaluations == 1


def test_guidance_just_above_one_is_close_to_none(fresh: OpenPipeline) -> None:
    unet = spy(fresh, "unet")
    none = fresh("a", seed=1, **{**SHORT, "guidance_scale": 1.0}).latents
    little = fresh("a", seed=1, **{**SHORT, "guidance_scale": 1.0 + 2.0**-23}).latents
    assert [bound["sample"][0] for bound in unet.bound] == [1, 2]
    assert_close(little, none)


def test_text_embeddings_are_cached(fresh: OpenPipeline) -> None:
    text_encoder = spy(fresh, "text_encoder")
    fresh("a", negative_prompt="c", **SHORT)
    assert text_encoder.evaluations == 2
    first = fresh("b", negative_prompt="c", seed=1, **SHORT)
    assert text_encoder.evaluations == 3  # only "b" is new
    assert_equal(fresh("b", negative_prompt="c", seed=1, **SHORT), first)
    fresh(["a", "b"], negative_prompt=["b", "c"], num_images_per_prompt=3, **SHORT)
    assert text_encoder.evaluations == 3


def test_cache_of_embeddings_is_bounded(fresh: OpenPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_CACHED", 3)  # but no fewer than two texts for each image of a batch
    text_encoder = spy(fresh, "text_encoder")
    arguments = {**SHORT, "num_inference_steps": 1, "output_type": "latents"}
    for prompt in "abcdefgh":
        fresh(prompt, negative_prompt="kept", **arguments)
        assert isinstance(fresh._encoder, PromptEncoder)
        assert len(fresh._encoder._cache) <= 4
    assert text_encoder.evaluations == 9  # the negative prompt is used each time and stays


def test_unet_is_evaluated_once_a_row_on_one_binding(fresh: OpenPipeline) -> None:
    unet = spy(fresh, "unet")
    for _ in range(3):
        fresh("a", num_inference_steps=4, seed=1)
    assert unet.evaluations == 12
    assert len(unet.bound) == 1
    assert unet.bound[0]["sample"] == (2, 4, 8, 8)


def test_prompt_over_the_token_limit_warns_and_quotes(fresh: OpenPipeline) -> None:
    prompt = "a " * 300 + "UNREAD Ending"  # one token each fills the bundle's chunks
    with pytest.warns(PromptTruncatedWarning, match="over 4 chunks of 75 tokens.*UNREAD Ending"):
        output = fresh(prompt, seed=1, **SHORT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh("a " * 300, seed=1, **SHORT)  # just fits
    assert output.recipes[0]["prompt"] == prompt


def test_negative_prompt_over_the_token_limit_warns(fresh: OpenPipeline) -> None:
    with pytest.warns(PromptTruncatedWarning, match="UNREAD"):
        fresh("a", negative_prompt="a " * 300 + "UNREAD", **SHORT)


# --- samplers and steps


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_samplers(pipeline: Pipeline, sampler: str, steps: int) -> None:
    output = pipeline("x", seed=1, **{**SHORT, "sampler": sampler, "num_inference_steps": steps})
    assert np.isfinite(output.latents).all()
    assert output.recipes[0]["sampler"] == sampler
    assert output.recipes[0]["num_inference_steps"] == steps


def test_samplers_and_karras_differ(pipeline: Pipeline) -> None:
    choices = [("ddim", False), ("euler", False), ("euler", True), ("dpmpp_2m", False), ("dpmpp_2m", True)]
    latents = [
        pipeline("x", seed=1, sampler=sampler, karras=karras, **SHORT).latents for sampler, karras in choices
    ]
    for index, one in enumerate(latents):
        for other in latents[index + 1 :]:
            assert not np.allclose(one, other, rtol=1e-3)


def test_all_steps_of_the_schedule(fresh: OpenPipeline) -> None:
    """The most steps that are allowed fill the table's buffer to its last row."""
    unet = fresh.executors["unet"]
    manifest = fresh.bundle.manifest
    schedule = replace(manifest.schedule, steps_offset=0)  # with an offset there is room for 999
    fresh.bundle.manifest = replace(manifest, schedule=schedule)

    class Still(FixedWeights):
        """Predicts no noise, at once."""

        spec = unet.spec
        capturable = False

        def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
            return lambda: None

        def close(self) -> None:
            """There is nothing to give back."""

    fresh.exchange("unet", Still())
    seen: list[float] = []

    def note(_: Pipeline, step: int, timestep: float, state: dict[str, Any]) -> None:
        seen.append(timestep)

    arguments: dict[str, Any] = {"sampler": "ddim", "output_type": "latents"}
    fresh("x", num_inference_steps=1000, callback_on_step_end=note, **arguments)
    table = make_table("ddim", schedule, 1000)
    assert seen == list(table.timesteps)


# --- the callback


def test_callback_sees_every_step(pipeline: Pipeline) -> None:
    seen: list[tuple[int, float, Array]] = []

    def note(caller: Pipeline, step: int, timestep: float, state: dict[str, Any]) -> None:
        assert caller is pipeline
        assert set(state) == {"latents"}
        assert state["latents"].shape == (2, 4, 8, 8)
        seen.append((step, timestep, state["latents"]))

    arguments = {**SHORT, "sampler": "euler", "seed": 1}
    output = pipeline(["a", "b", "c"], callback_on_step_end=None, **arguments)
    with_callback = pipeline(["a", "b"], callback_on_step_end=note, **arguments)
    table = make_table("euler", pipeline.bundle.manifest.schedule, 3)
    assert [(step, timestep) for step, timestep, _ in seen] == list(enumerate(table.timesteps))
    assert np.array_equal(seen[-1][2], with_callback.latents)
    assert_differ(seen[0][2], seen[1][2])  # copies: a later step did not write over an earlier one
    assert_close(with_callback.latents, output.latents[:2])


def test_callback_is_called_for_every_batch(pipeline: Pipeline) -> None:
    steps: list[int] = []
    pipeline(
        "a",
        num_images_per_prompt=3,
        callback_on_step_end=lambda _p, step, _t, _s: steps.append(step),
        **SHORT,
    )
    assert steps == [0, 1, 2] * 2


def test_callback_replaces_latents(pipeline: Pipeline) -> None:
    """Putting back the first run's latents after the first step makes the second run like the first."""
    kept: list[Array] = []

    def keep(_: Pipeline, step: int, timestep: float, state: dict[str, Any]) -> None:
        if step == 0:
            kept.append(state["latents"])

    def put_back(_: Pipeline, step: int, timestep: float, state: dict[str, Any]) -> dict[str, Any] | None:
        return {"latents": kept[0]} if step == 0 else {}

    arguments = {**SHORT, "sampler": "euler"}  # a one-step method: nothing else is carried over
    first = pipeline("a", seed=1, callback_on_step_end=keep, **arguments)
    other = pipeline("a", seed=2, **arguments)
    second = pipeline("a", seed=2, callback_on_step_end=put_back, **arguments)
    assert_equal(second, first)
    assert_differ(other.latents, first.latents)


def test_callback_may_change_in_place_and_hand_back(pipeline: Pipeline) -> None:
    def negate(_: Pipeline, step: int, timestep: float, state: dict[str, Any]) -> dict[str, Any]:
        np.negative(state["latents"], out=state["latents"])
        return state

    plain = pipeline("a", seed=1, **{**SHORT, "num_inference_steps": 1})
    negated = pipeline("a", seed=1, callback_on_step_end=negate, **{**SHORT, "num_inference_steps": 1})
    assert np.array_equal(negated.latents, -plain.latents)


def test_callback_that_hands_back_all_it_was_given(pipeline: Pipeline) -> None:
    """As those of diffusers do, changed or not."""
    watched: dict[str, Any] = {"callback_on_step_end_tensor_inputs": ["latents", "denoised"], "seed": 1}
    expected = pipeline("a", seed=1, **SHORT)
    assert_equal(pipeline("a", callback_on_step_end=lambda *given: given[-1], **watched, **SHORT), expected)
    other = np.zeros((1, 4, 8, 8), np.float32)
    with pytest.raises(UsageError, match="returned denoised: only 'latents' can be changed"):
        pipeline("a", callback_on_step_end=lambda *_: {"denoised": other}, **watched, **SHORT)


@pytest.mark.parametrize("last", [1, 2])
def test_interrupt_as_in_diffusers(pipeline: Pipeline, last: int) -> None:
    """No step is done after it, what there is is decoded, the recipe says so, and the next call is whole."""
    seen: list[Array] = []

    def stop(caller: Pipeline, step: int, _timestep: float, state: dict[str, Any]) -> None:
        seen.append(state["latents"])
        caller._interrupt = step == last

    arguments: dict[str, Any] = {**SHORT, "seed": 1, "num_images_per_prompt": 3}
    output = pipeline("a", callback_on_step_end=stop, **arguments)
    assert len(seen) == last + 1
    assert np.array_equal(output.latents[:2], seen[-1])
    assert np.array_equal(output.latents[2:], pipeline.initial_latents(3))  # of a batch that never began
    assert output.images.shape == (3, 16, 16, 3)
    done = [recipe.get("interrupted_after_step") for recipe in output.recipes]
    assert done == ([2, 2, 0] if last == 1 else [None, None, 0])
    assert output.timings["step"] == pytest.approx(output.timings["denoise"] / (last + 1))
    assert "interrupted_after_step" not in pipeline("a", **arguments).recipes[2]


def test_exception_in_the_callback_leaves_the_pipeline_usable(pipeline: Pipeline) -> None:
    expected = pipeline("a", seed=1, **SHORT)

    def stop(_: Pipeline, step: int, timestep: float, state: dict[str, Any]) -> None:
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline("b", seed=2, callback_on_step_end=stop, **SHORT)
    assert_equal(pipeline("a", seed=1, **SHORT), expected)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ({"latents": np.zeros((1, 4, 8, 9))}, r"shape \[1, 4, 8, 9\], \[1, 4, 8, 8\] is wanted"),
        ({"latents": np.zeros((4, 8, 8))}, r"\[1, 4, 8, 8\] is wanted"),
        ({"latents": np.full((1, 4, 8, 8), np.nan)}, "NaN or infinity after step 1"),
        ({"latents": "noise"}, "NumPy cannot read .*: a NumPy array is wanted"),
        ({"prompt_embeds": 1}, "returned prompt_embeds: only 'latents' can be changed"),
        (5, "returned int: a dict or None"),
    ],
)
def test_callback_that_returns_nonsense(pipeline: Pipeline, returned: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        pipeline("a", callback_on_step_end=lambda *_: returned, **SHORT)


@pytest.mark.parametrize("again", ["draw", "close"])
def test_second_call_while_one_draws_is_refused(fresh: OpenPipeline, again: str) -> None:
    """It would write into the buffers of the first, whose picture would be another."""
    expected = fresh("a", seed=1, **SHORT)
    refused = []

    def meddle(pipeline: Pipeline, *_: object) -> None:
        with pytest.raises(UsageError, match=r"drawing already.*load a second pipeline") as caught:
            pipeline("b", seed=2, **SHORT) if again == "draw" else pipeline.close()
        refused.append(caught.value)

    assert_equal(fresh("a", seed=1, callback_on_step_end=meddle, **SHORT), expected)
    assert len(refused) == SHORT["num_inference_steps"]
    assert_equal(fresh("a", seed=1, **SHORT), expected)


def test_threads_never_share_the_buffers(fresh: OpenPipeline) -> None:
    arguments: list[dict[str, Any]] = [{"prompt": "a", "seed": 1}, {"prompt": "b", "seed": 2}]
    expected = [fresh(**arguments[turn], **SHORT) for turn in (0, 1)]

    def draw(turn: int) -> bool:
        try:
            output = fresh(**arguments[turn % 2], **SHORT)
        except UsageError:
            return False
        assert_equal(output, expected[turn % 2])
        return True

    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(draw, range(64)))
    assert any(drawn)
    assert_equal(fresh(**arguments[0], **SHORT), expected[0])


# --- shapes, batches and buffers


@pytest.mark.parametrize(("height", "width"), [(16, 32), (32, 16), (20, 28), (32, 32)])
def test_other_sizes(pipeline: Pipeline, height: int, width: int) -> None:
    output = pipeline("a", seed=1, height=height, width=width, **SHORT)
    assert output.images.shape == (1, height, width, 3)
    assert output.latents.shape == (1, 4, height // 2, width // 2)


def test_shapes_change_and_come_back(fresh: OpenPipeline) -> None:
    unet = spy(fresh, "unet")
    first = fresh("a", seed=1, **SHORT)
    sizes = [(16, 20), (20, 16), (20, 20), (24, 16), (28, 16), (32, 32)]
    for height, width in sizes:
        fresh("a", seed=1, height=height, width=width, **SHORT)
        assert len(fresh._parts.shapes) <= shapes.MAX_CACHED_SHAPES
    assert_equal(fresh("a", seed=1, **SHORT), first)
    assert len(unet.bound) == len(sizes) + 2  # the first shape had to make room and came back
    fresh("a", seed=1, height=32, width=32, **SHORT)
    assert len(unet.bound) == len(sizes) + 2  # this one was still there


def test_calls_of_different_length_share_a_loop(pipeline: Pipeline) -> None:
    """A long run's rows must not reach into a short one's."""
    arguments: dict[str, Any] = {"seed": 1, "guidance_scale": 3.0, "output_type": "numpy"}
    short = pipeline("a", num_inference_steps=2, **arguments)
    pipeline("a", num_inference_steps=30, **arguments)
    assert_equal(pipeline("a", num_inference_steps=2, **arguments), short)


@pytest.fixture
def pair_bundle(bundle_copy: Path) -> Path:
    """A bundle whose graphs take two images at a time, no fewer."""
    file = bundle_copy / "manifest.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    document["limits"]["min_batch"] = MAX_BATCH
    file.write_text(json.dumps(document), encoding="utf-8")
    return bundle_copy


@pytest.mark.parametrize("images", [1, 2, 3, 4])
def test_bundle_of_a_fixed_batch_pads(pipeline: Pipeline, pair_bundle: Path, images: int) -> None:
    pairs = OpenPipeline.load(pair_bundle)
    assert isinstance(pairs, OpenPipeline)
    unet, decoder, text_encoder = (spy(pairs, name) for name in ("unet", "vae_decoder", "text_encoder"))
    output = pairs("a", seed=1, num_images_per_prompt=images, **SHORT)
    assert len(output.images) == len(output.latents) == len(output.recipes) == images
    expected = pipeline("a", seed=1, num_images_per_prompt=images, **SHORT)
    for index in range(images):
        assert_close(output.latents[index], expected.latents[index])
    assert {bound["sample"][0] for bound in unet.bound} == {2 * MAX_BATCH}
    assert {bound["image"][0] for bound in decoder.bound} == {MAX_BATCH}
    assert {bound["input_ids"][0] for bound in text_encoder.bound} == {MAX_BATCH}


def test_batch_without_a_limit(tiny_bundle: Path) -> None:
    """What is kept of texts is for as many as one call can name, whatever the manifest admits."""
    bundle = Bundle.open(tiny_bundle)
    limits = replace(bundle.manifest.limits, max_batch=2**60)
    unlimited = Pipeline.load(Bundle(bundle.path, replace(bundle.manifest, limits=limits)))
    assert len(unlimited(["a", "b", "c"], **SHORT).images) == 3


def test_padding_is_not_warned_of(pair_bundle: Path) -> None:
    pairs = OpenPipeline.load(pair_bundle)
    assert isinstance(pairs, OpenPipeline)
    spy(pairs, "vae_decoder", lambda _call, image: image.fill(-1.0))
    with pytest.warns(BlackImageWarning) as caught:
        pairs("a", **SHORT)
    assert [str(warning.message)[:20] for warning in caught] == ["picture 1 of 1 is al"]


# --- NaN and black pictures


def fill_with_nan(file: Path) -> None:
    """Every weight: the bytes ff 7f over and over are NaN in half and in single precision."""
    size = file.stat().st_size
    file.write_bytes((b"\xff\x7f" * size)[:size])


@pytest.mark.parametrize(
    ("component", "words"),
    [
        ("text_encoder", r"text_encoder gave NaN or infinity for the prompt ''"),
        ("unet", r"unet gave NaN or infinity at step 1 of 3 \(timestep"),
        ("vae_decoder", "vae_decoder gave NaN or infinity"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_weights_of_nan_name_their_component(bundle_copy: Path, component: str, words: str) -> None:
    fill_with_nan(bundle_copy / component / "model.onnx.data")
    with pytest.raises(BundleError, match=component):
        Pipeline.load(bundle_copy)
    broken = Pipeline.load(bundle_copy, verify=False)
    with pytest.raises(NumericsError, match=words) as caught:
        broken("a red apple", **SHORT)
    others = {"text_encoder", "unet", "vae_decoder"} - {component}
    assert not any(other in str(caught.value) for other in others)


@pytest.mark.parametrize("bad_step", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_unet_that_fails_at_a_step(fresh: OpenPipeline, bad_step: int, value: float) -> None:
    expected = fresh("a", seed=1, **SHORT)

    def spoil(call: int, noise_pred: Array) -> None:
        if call == bad_step:
            noise_pred[0, 1, 2, 3] = value

    spy(fresh, "unet", spoil)
    timestep = make_table("dpmpp_2m", fresh.bundle.manifest.schedule, 3).timesteps[bad_step]
    words = rf"unet gave NaN or infinity at step {bad_step + 1} of 3 \(timestep {timestep:g}\).*--dtype fp32"
    with pytest.raises(NumericsError, match=words):
        fresh("a", seed=1, **SHORT)
    # The same loop and buffers, and a U-Net that is well again.
    assert_equal(fresh("a", seed=1, **SHORT), expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_callback_that_hands_back_the_unets_nan_is_not_blamed(fresh: OpenPipeline) -> None:
    spy(fresh, "unet", lambda _call, noise_pred: noise_pred.fill(np.nan))
    with pytest.raises(NumericsError, match="unet gave NaN or infinity at step 1"):
        fresh("a", callback_on_step_end=lambda _p, _i, _t, state: state, **SHORT)


def test_black_picture_warns(fresh: OpenPipeline) -> None:
    def blacken(call: int, image: Array) -> None:
        image[-1] = -1.5

    spy(fresh, "vae_decoder", blacken)
    with pytest.warns(BlackImageWarning, match=r"picture 2 of 2 is all black.*vae_decoder") as caught:
        output = fresh("a", num_images_per_prompt=2, **SHORT)
    assert len(caught) == 1
    assert not output.images[1].any()
    assert output.images[0].any()


# --- what is refused


class MainMemoryTensor:
    """What a tensor of PyTorch on the CPU says of itself."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self) -> object:
        raise AssertionError("it was taken for a tensor on a GPU")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": []}, "the list of prompts is empty"),
        ({"prompt": 5}, "a prompt is int: a text or a list of texts"),
        ({"prompt": None}, "the prompt is missing"),
        ({"prompt": ["a", None]}, "a prompt is NoneType"),
        ({"prompt": b"a"}, "a prompt is int: texts are wanted"),
        ({"prompt": "a\ud800"}, "not Unicode text"),
        ({"negative_prompt": 5}, "a prompt is int"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts: give one, or one per prompt"),
        ({"negative_prompt": []}, "0 negative prompts for 1"),
        ({"height": 18}, "height is 18: this bundle draws multiples of 4 from 16 to 32 pixels"),
        ({"width": 17}, "width is 17: this bundle draws multiples of 4 from 16 to 32 pixels"),
        ({"height": 12}, "height is 12"),
        ({"height": 36}, "height is 36"),
        ({"height": 0}, "height is 0"),
        ({"height": -16}, "height is -16"),
        ({"height": 10**9}, "height is 1000000000"),
        ({"width": 16.0}, "width is 16.0"),
        ({"width": "16"}, "width is '16'"),
        ({"width": True}, "width is True"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0: allowed are whole numbers from 1 to 1000"),
        ({"num_inference_steps": -1}, "from 1 to 1000"),
        ({"num_inference_steps": 10**6}, "num_inference_steps is 1000000.*from 1 to 1000"),
        ({"num_inference_steps": 20.0}, "20.0: a whole number is wanted"),
        ({"num_inference_steps": "20"}, "'20': a whole number is wanted"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan: a finite number"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf: a finite number"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0: allowed are numbers from 0 to 1000"),
        ({"guidance_scale": 1001}, "guidance_scale is 1001.0: allowed are numbers from 0 to 1000"),
        ({"guidance_scale": "7"}, "guidance_scale is '7'"),
        ({"guidance_scale": True}, "guidance_scale is True"),
        ({"guidance_scale": []}, "guidance_scale holds 0 numbers: give one, or one for each of the 20"),
        ({"guidance_interval": "ab"}, "guidance_interval is 'ab': two fractions of the steps"),
        ({"guidance_interval": {"a": 1, "b": 2}}, "two fractions of the steps"),
        ({"guidance_interval": (0.5, float("nan"))}, "0 <= start < stop <= 1"),
        ({"guidance_rescale": True}, "guidance_rescale is True: a number is wanted"),
        ({"timesteps": 5}, "timesteps are 5: a list of numbers"),
        ({"sigmas": ["a"]}, "an entry of sigmas is 'a': a number"),
        ({"solver_order": "2"}, "solver_order is '2': a whole number"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0: a whole number of at least 1"),
        ({"num_images_per_prompt": 2.0}, "num_images_per_prompt is 2.0"),
        ({"num_images_per_prompt": 10**9}, "images in one call: at most 1000"),
        ({"prompt": ["a"] * 501, "num_images_per_prompt": 2}, "1002 images in one call: at most 1000"),
        ({"seed": -2}, "seed is -2; it must be at least 0 and below"),
        ({"seed": 2**64}, "below 2"),
        ({"seed": 1.5}, "seed is 1.5; it must be an integer"),
        ({"seed": "1"}, "it must be an integer"),
        ({"seed": True}, "seed is True"),
        ({"seed": [1, 2]}, "2 seeds for 1 images: give one, or one per image"),
        ({"seed": [-2]}, "seed is -2"),
        ({"rng": "mersenne"}, "rng is 'mersenne'; choose one of philox, cpu"),
        ({"rng": ["cpu"]}, "choose one of philox, cpu"),
        ({"sampler": "eular"}, "unknown sampler 'eular': did you mean euler.*ddim, .*euler"),
        ({"sampler": "DPM++ 2S a"}, "unknown sampler .DPM.* 2S a"),
        ({"sampler": "quite different"}, r"allowed are ddim, .*euler"),
        ({"sampler": 5}, "sampler is 5: a name is wanted, one of ddim"),
        ({"sampler": "ddim", "karras": True}, "ddim has no karras: use it with"),
        ({"karras": "yes"}, "karras is 'yes': True or False"),
        ({"eta": 0.5}, "dpmpp_2m has no eta: use it with ddim"),
        ({"sampler": "ddim", "eta": 1.5}, "eta is 1.5: allowed are numbers from 0 to 1"),
        ({"sampler": "ddim", "eta": float("nan")}, "eta is nan"),
        ({"eta": "0"}, "eta is '0': a number is wanted"),
        ({"eta": 10**400}, "eta is inf: a finite number is wanted"),
        ({"guidance_scale": 10**400}, "guidance_scale is inf: a finite number"),
        ({"height": np.float32(16)}, "a whole number is wanted"),
        (
            {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["embeds"]},
            "a list of latents, denoised, preview",
        ),
        ({"latents": np.zeros((1, 4, 8, 9), np.float32)}, r"float32\[1, 4, 8, 8\] is wanted"),
        ({"latents": np.zeros((1, 4, 8, 8))}, r"latents are float64\[1, 4, 8, 8\]"),
        ({"latents": [1.0]}, "latents are <class 'list'>"),
        ({"latents": MainMemoryTensor()}, "MainMemoryTensor'>: a NumPy array float32"),
        ({"latents": np.full((1, 4, 8, 8), np.inf, np.float32)}, "latents hold NaN or infinity"),
        ({"output_type": "jpeg"}, "output_type is 'jpeg': one of pil, numpy, latents, device"),
        ({"callback_on_step_end": 5}, "callback_on_step_end is int: a function"),
        (
            {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": None},
            "a list of latents, denoised, preview",
        ),
        (
            {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": "latents"},
            "a list of latents, denoised, preview",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_bad_argument(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], words: str
) -> None:
    """Refused in one line that says what is allowed, before any component has run."""
    monkeypatch.setattr(
        pipeline._parts.shapes, "ready", lambda *_, **__: pytest.fail("something was computed")
    )
    with pytest.raises(UsageError, match=words) as caught:
        pipeline(**{"prompt": "a", **arguments})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_numbers_of_numpy_are_numbers(pipeline: Pipeline) -> None:
    sizes = {"height": np.int64(16), "width": np.uint8(16), "num_inference_steps": np.int32(3)}
    numbers: dict[str, Any] = {**sizes, "guidance_scale": np.float32(3), "seed": np.int64(1)}
    output = pipeline("a", output_type="numpy", **numbers)
    assert_equal(output, pipeline("a", seed=1, **SHORT))
    json.dumps(output.recipes)


def test_callback_that_asks_for_nothing_is_given_nothing(pipeline: Pipeline) -> None:
    given: list[dict[str, Any]] = []
    pipeline(
        "a",
        callback_on_step_end=lambda _pipeline, _step, _timestep, state: given.append(state),
        callback_on_step_end_tensor_inputs=(),
        **SHORT,
    )
    assert given == [{}, {}, {}]


def test_recipe_says_that_latents_were_given(pipeline: Pipeline) -> None:
    latents = pipeline.initial_latents(1)
    assert latents.shape == (1, 4, 8, 8)
    output = pipeline("a", seed=1, latents=latents, **SHORT)
    assert output.recipes[0]["latents"] == "given"
    assert "latents" not in pipeline("a", seed=1, **SHORT).recipes[0]


@pytest.mark.parametrize(("height", "width"), [(18, 16), (16, 0)])
def test_initial_latents_of_a_bad_size(pipeline: Pipeline, height: int, width: int) -> None:
    with pytest.raises(UsageError, match="multiples of 4 from 16 to 32"):
        pipeline.initial_latents([1], height, width)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", 10**9, True])
def test_bad_number_of_threads(tiny_bundle: Path, threads: Any) -> None:
    with pytest.raises(UsageError, match=r"threads is .*whole numbers from 1 to"):
        Pipeline.load(tiny_bundle, threads=threads)


def test_threads_do_not_change_the_picture_much(tiny_bundle: Path, pipeline: Pipeline) -> None:
    one = Pipeline.load(tiny_bundle, threads=1)
    assert_close(one("a", seed=1, **SHORT).latents, pipeline("a", seed=1, **SHORT).latents)


def test_gpu_that_is_not_there(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU by its number, and no backend by name: what is wrong with the GPU is said."""

    def no_gpu(_: int) -> None:
        raise BackendError("no NVIDIA driver: install it")

    monkeypatch.setattr(discovery, "find_gpu", no_gpu)
    with pytest.raises(UsageError, match=r"device is 0.* runs on the CPU \(tensorrt, .*: no NVIDIA driver"):
        Pipeline.load(tiny_bundle, device=0)


def test_unknown_backend(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown backend 'tensorflow'; there is auto, .*onnxruntime-cpu"):
        Pipeline.load(tiny_bundle, backend="tensorflow")


def test_graph_that_onnx_runtime_refuses(bundle_copy: Path) -> None:
    file = bundle_copy / "unet" / "model.onnx"
    file.write_bytes(b"\x00" * file.stat().st_size)
    with pytest.raises(BundleError, match=r"unet/model.onnx of .* is no graph that sdrt reads") as caught:
        Pipeline.load(bundle_copy, verify=False)
    assert "\n" not in str(caught.value)


def test_missing_libraries_say_what_to_install(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    for backend, extra in (("onnxruntime-cpu", "cpu"), ("openvino-cpu", "openvino")):
        with pytest.raises(BackendError, match=rf"pip install 'sdrt\[{extra}\]'"):
            Pipeline.load(tiny_bundle, backend=backend)
        with pytest.raises(BackendError, match=rf"pip install 'sdrt\[{extra}\]'"):
            Pipeline.load(tiny_bundle)  # neither can run: both are named


def test_tokenizer_that_is_none(bundle_copy: Path) -> None:
    file = bundle_copy / "tokenizer.json"
    file.write_text(" " * file.stat().st_size)
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Pipeline.load(bundle_copy, verify=False)


def test_bundle_for_a_backend_it_cannot_run_on(bundle_copy: Path) -> None:
    """bfloat16 needs another machine: said at once, and what to do."""
    file = bundle_copy / "manifest.json"
    text = file.read_text(encoding="utf-8").replace('"fp32"', '"bf16"').replace('"float32"', '"bfloat16"')
    document = json.loads(text)
    document["components"]["unet"]["inputs"][1]["dtype"] = "float32"
    file.write_text(json.dumps(document), encoding="utf-8")
    assert Bundle.open(bundle_copy).manifest.components["unet"].precision == "bf16"
    with pytest.raises(BackendError, match="no bfloat16 arithmetic on the CPU; export with --dtype fp32"):
        Pipeline.load(bundle_copy)
