"""Tasks of the pipeline on the tiny bundle: guidance, pictures, frames, callbacks, mixed batches."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.runs.task_calls import MASK, PICTURE, SHORT

import tolerances
from sdrt.kernels.sampler_row import Column
from sdrt.runtime.backends.backend import RequestShape
from sdrt.runtime.backends.cuda_backends import needed_components
from sdrt.runtime.backends.executor import FixedWeights
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.drawing import loading
from sdrt.runtime.drawing.loading import longest_prompt
from sdrt.runtime.drawing.text_encoders import open_tokenizers
from sdrt.runtime.errors import CancelledError, UsageError
from sdrt.runtime.pictures.preview import rgb_from_latents
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.request.build import build_interpolation, build_request
from sdrt.runtime.request.output import PipelineOutput
from sdrt.runtime.samplers.noise import slerp
from sdrt.runtime.samplers.registry import make_table
from sdrt.runtime.text.tokenizer import Tokenizer

STEPS = int(SHORT["num_inference_steps"])
LATENTS: dict[str, Any] = {**SHORT, "output_type": "latents"}


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Pipeline:
    return Pipeline.load(tiny_bundle, backend="onnxruntime-cpu")


def latents(pipeline: Pipeline, prompt: Any = "a cat", **options: Any) -> NDArray[np.float32]:
    return np.asarray(pipeline(prompt, **{**LATENTS, **options}).latents)


def assert_close(one: NDArray[Any], other: NDArray[Any]) -> None:
    assert np.abs(one - other).max() <= tolerances.OTHER_BATCH * np.abs(other).max()


class Rows(FixedWeights):
    """Notes how many rows each evaluation of the U-Net has."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._executor = pipeline._executors["unet"]
        self.spec = self._executor.spec
        self.capturable = False
        self.seen: list[int] = []

    def bind(self, inputs: Any, outputs: Any) -> Any:
        evaluate, rows = self._executor.bind(inputs, outputs), inputs["sample"].shape[0]

        def call() -> None:
            self.seen.append(rows)
            evaluate()

        return call

    def close(self) -> None:
        self._executor.close()


@pytest.fixture
def counted(pipeline: Pipeline, tiny_bundle: Path) -> tuple[Pipeline, Rows]:
    rows = Rows(pipeline)
    executors = {**pipeline._executors, "unet": rows}
    return Pipeline(pipeline.bundle, executors, pipeline._device, "counted"), rows


# --- guidance


def test_outside_of_the_interval_one_half_runs(counted: tuple[Pipeline, Rows]) -> None:
    pipeline, rows = counted
    latents(pipeline, guidance_interval=(0.4, 0.8), num_inference_steps=10, sampler="ddim")
    assert rows.seen == [1] * 4 + [2] * 4 + [1] * 2


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m_sde"])
def test_one_half_is_a_guidance_of_one(pipeline: Pipeline, sampler: str) -> None:
    """Where both halves run and a w of all but 1 uses the conditional one."""
    one = 1.0 + 2.0**-23
    inside = latents(pipeline, guidance_interval=(0.2, 0.6), sampler=sampler, num_inference_steps=5)
    both = latents(pipeline, guidance_scale=[one, 3.0, 3.0, one, one], sampler=sampler, num_inference_steps=5)
    assert_close(inside, both)
    everywhere = latents(pipeline, sampler=sampler, num_inference_steps=5)
    assert np.abs(inside - everywhere).max() > 100 * tolerances.OTHER_BATCH * np.abs(inside).max()


def test_both_rows_of_a_step_are_guided_alike(counted: tuple[Pipeline, Rows]) -> None:
    pipeline, rows = counted
    latents(pipeline, guidance_interval=(0.5, 1.0), num_inference_steps=4, sampler="heun")
    assert rows.seen == [1] * 4 + [2] * 3


def test_a_schedule_of_guidance(counted: tuple[Pipeline, Rows], pipeline: Pipeline) -> None:
    spied, rows = counted
    falling = latents(spied, guidance_scale=[3.0] * 3 + [1.0] * 3)
    assert rows.seen == [2] * 3 + [1] * 3
    assert np.array_equal(falling, latents(pipeline, guidance_interval=(0.0, 0.5)))
    assert np.array_equal(latents(pipeline, guidance_scale=[3.0] * 6), latents(pipeline))


def test_a_schedule_follows_the_noise_levels_of_a_picture(pipeline: Pipeline) -> None:
    """Of a list for the whole run, a run that starts mid-schedule takes the end."""
    half = {"image": PICTURE, "strength": 0.5}
    assert np.array_equal(
        latents(pipeline, guidance_scale=[9.0, 8.0, 7.0, 3.0, 3.0, 3.0], **half),
        latents(pipeline, guidance_scale=3.0, **half),
    )


# --- pictures


def test_strength_says_how_many_steps_run(counted: tuple[Pipeline, Rows]) -> None:
    pipeline, rows = counted
    for strength, steps in ((0.01, 1), (0.35, 3), (0.8, 8), (1.0, 10)):
        rows.seen.clear()
        latents(pipeline, image=PICTURE, strength=strength, num_inference_steps=10)
        assert len(rows.seen) == steps


def test_an_image_keeps_its_proportions_and_any_size(pipeline: Pipeline) -> None:
    wide = np.repeat(np.repeat(PICTURE, 3, axis=0), 6, axis=1)  # 48 x 96
    output = pipeline("x", image=wide, strength=0.5, **SHORT)
    assert output.images.shape[1:3] == (16, 32)
    assert (output.recipes[0]["height"], output.recipes[0]["width"]) == (16, 32)


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_soft_masks_keep_what_is_black(pipeline: Pipeline, strength: float) -> None:
    soft = np.zeros((16, 16), np.uint8)
    soft[2:10, 4:12] = np.linspace(1, 255, 64, dtype=np.uint8).reshape(8, 8)
    drawn = pipeline("x", image=PICTURE, mask_image=soft, strength=strength, **SHORT).images[0]
    assert np.array_equal(drawn[soft == 0], PICTURE[soft == 0])
    assert not np.array_equal(drawn, PICTURE)


def test_a_mask_on_the_device_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(UsageError, match="with a mask the picture is put together on the host"):
        pipeline("x", image=PICTURE, mask_image=MASK, **{**SHORT, "output_type": "device"})


def test_variations_follow_their_seed(pipeline: Pipeline) -> None:
    def vary(**options: Any) -> NDArray[np.float32]:
        return latents(pipeline, None, image=PICTURE, **options)

    assert np.array_equal(vary(variation=0.5), vary(variation=0.5))
    assert not np.allclose(vary(variation=0.5), vary(variation=0.5, seed=5), rtol=1e-3)
    assert np.array_equal(vary(variation=0.0), vary(variation=0.0, seed=5))
    assert np.array_equal(vary(), vary(variation=0.3))
    several = vary(variation=0.5, num_images_per_prompt=2)
    assert_close(several[1:], vary(variation=0.5, seed=5))


# --- frames


def test_the_first_and_the_last_frame_are_plain_pictures(pipeline: Pipeline) -> None:
    options = {**LATENTS, "sampler": "euler_a"}  # whose fresh noise is that of the first seed in all frames
    frames = pipeline.interpolate("a cat", "a dog", frames=5, **options).latents
    assert_close(frames[:1], latents(pipeline, "a cat", sampler="euler_a"))
    assert_close(frames[-1:], latents(pipeline, "a dog", sampler="euler_a"))
    seeds = pipeline.interpolate("a cat", frames=3, to_seed=9, **LATENTS).latents
    assert_close(seeds[:1], latents(pipeline))
    assert_close(seeds[-1:], latents(pipeline, seed=9))


@pytest.mark.parametrize("rng", ["philox", "cpu"])
def test_a_frame_is_that_of_its_share_whatever_its_batch(pipeline: Pipeline, rng: str) -> None:
    """Batches of two: every other of five frames is one of three, though its neighbour is another."""
    options = {**LATENTS, "sampler": "euler_a", "to_seed": 9, "rng": rng}
    five, three = (pipeline.interpolate("a cat", "a dog", frames=n, **options).latents for n in (5, 3))
    assert_close(five[::2], three)
    away = [np.abs(frame - five[0]).max() for frame in five]
    assert away == sorted(away)


def test_frames_from_a_picture(pipeline: Pipeline) -> None:
    drawn = pipeline.interpolate("a", "b", frames=3, image=PICTURE, mask_image=MASK, **SHORT).images
    assert all(np.array_equal(frame[~MASK], PICTURE[~MASK]) for frame in drawn)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"frames": 1, "to_seed": 2}, "frames is 1: a whole number from 2 to 1000"),
        ({"frames": 3}, "nothing differs"),
        ({"frames": 3, "to_prompt": ["b"]}, "to_prompt is list: one text"),
        ({"frames": 3, "to_seed": -2}, "seed is -2"),
        ({"frames": 3, "to_seed": 2, "num_images_per_prompt": 2}, "frames says how many"),
        ({"frames": 3, "to_seed": 2, "latents": np.zeros((1, 4, 8, 8), np.float32)}, "latents are given"),
        ({"frames": 3, "to_prompt": "b", "image": PICTURE, "variation": 0.2}, "variation is given"),
    ],
)
def test_frames_that_cannot_be(pipeline: Pipeline, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        pipeline.interpolate("a", **arguments)


@given(seed=st.integers(0, 1000), share=st.floats(0, 1), scale=st.floats(0.1, 10))
def test_slerp(seed: int, share: float, scale: float) -> None:
    first, second = np.random.default_rng(seed).standard_normal((2, 3, 8)).astype(np.float32)
    assert slerp(first, second, 0.0) == pytest.approx(first, abs=1e-6)
    assert slerp(first, second, 1.0) == pytest.approx(second, abs=1e-6)
    assert slerp(first, first * np.float32(scale), share) == pytest.approx(
        (1 - share + share * scale) * first, rel=1e-4, abs=1e-5
    )
    norms = np.linalg.norm(first), np.linalg.norm(second)
    unit = slerp(first / norms[0], second / norms[1], share)
    assert np.linalg.norm(unit) == pytest.approx(1, abs=1e-5)


# --- callbacks


def test_denoised_and_preview_are_what_they_say(pipeline: Pipeline) -> None:
    """DDIM's x' = a x + b m gives m back, and x and m the guess of the clean latents."""
    states: list[dict[str, Any]] = []
    pipeline(
        "a cat",
        **{**LATENTS, "sampler": "ddim"},
        callback_on_step_end=lambda _pipeline, _step, _timestep, state: states.append(state),
        callback_on_step_end_tensor_inputs=("latents", "denoised", "preview"),
    )
    table = make_table("ddim", pipeline.bundle.manifest.schedule, STEPS)
    preview = pipeline.bundle.manifest.preview
    assert preview is not None
    assert len(states) == STEPS
    for row, before, after in zip(table.rows[1:], states, states[1:], strict=False):
        x = before["latents"].astype(np.float64)
        m = (after["latents"] - row[Column.A] * x) / row[Column.B0]
        expected = row[Column.X0_X] * x + row[Column.X0_M] * m
        # x' is rounded to float32, and m is its difference from a x over b: up to 1/b and X0_M as much.
        worst = 8 * 2.0**-24 * np.abs(x).max() * abs(row[Column.X0_M] / row[Column.B0])
        assert np.abs(after["denoised"] - expected).max() <= worst
        assert np.array_equal(after["preview"], rgb_from_latents(after["denoised"], preview))


@pytest.mark.parametrize("task", [{"prompt": "x"}, {"image": PICTURE, "variation": 0.5}])
def test_cancel_from_a_callback(pipeline: Pipeline, task: dict[str, Any]) -> None:
    steps: list[int] = []

    def cancel(drawing: Pipeline, step: int, _timestep: float, _state: dict[str, Any]) -> None:
        steps.append(step)
        if step == 2:
            drawing.cancel()

    expected = latents(pipeline)
    with pytest.raises(CancelledError, match="cancelled"):
        pipeline(**{**LATENTS, **task}, callback_on_step_end=cancel)
    assert steps == [0, 1, 2]
    assert np.array_equal(latents(pipeline), expected)


def test_cancel_from_another_thread_and_with_nothing_to_cancel(pipeline: Pipeline) -> None:
    pipeline.cancel()
    latents(pipeline)  # the next call is not meant
    begun, go_on = threading.Event(), threading.Event()

    def wait(_pipeline: Pipeline, step: int, _timestep: float, _state: dict[str, Any]) -> None:
        if step == 0:
            begun.set()
            assert go_on.wait(30)

    def stop() -> None:
        assert begun.wait(30)
        pipeline.cancel()
        go_on.set()

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(CancelledError):
        pipeline("x", **LATENTS, callback_on_step_end=wait)
    thread.join()


# --- prompts of several lengths in one call


def test_a_picture_does_not_depend_on_the_length_of_its_neighbours_prompts(pipeline: Pipeline) -> None:
    prompts = ["a", "b BREAK c", "d", "e BREAK f BREAK g", "h (i:1.3)"]
    together = pipeline(prompts, **{**LATENTS, "seed": [1, 2, 3, 4, 5]})
    assert isinstance(together, PipelineOutput)
    assert [recipe["prompt"] for recipe in together.recipes] == prompts
    for index, prompt in enumerate(prompts):
        assert_close(together.latents[index : index + 1], latents(pipeline, prompt, seed=index + 1))


def test_a_long_negative_prompt_counts_too(pipeline: Pipeline) -> None:
    together = pipeline(["a", "b"], negative_prompt=["", "x BREAK y"], **{**LATENTS, "seed": [1, 2]}).latents
    assert_close(together[:1], latents(pipeline, "a", seed=1))
    assert_close(together[1:], latents(pipeline, "b", negative_prompt="x BREAK y", seed=2))


def test_embeddings_are_taught(pipeline: Pipeline, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    before = latents(pipeline, "a toy")
    width = pipeline.bundle.manifest.components["text_encoder"].spec.outputs[0].shape[2]
    assert isinstance(width, int)
    save_file({"emb_params": np.ones((3, width), np.float32)}, tmp_path / "toy.safetensors")
    fresh = Pipeline(pipeline.bundle, pipeline._executors, pipeline._device, "host")
    assert np.array_equal(latents(fresh, "a toy"), before)
    assert fresh.load_textual_inversion(tmp_path / "toy.safetensors") == "toy"
    taught = latents(fresh, "a toy")
    assert not np.allclose(taught, before, rtol=1e-3)
    assert fresh.load_textual_inversion(tmp_path / "toy.safetensors", "<it>") == "<it>"
    assert np.array_equal(latents(fresh, "a <it>"), taught)


# --- what a backend is asked for


def test_the_longest_prompt_is_known_before_anything_is_loaded(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an interpolation it may be at either end; so an engine for one chunk is not taken for it."""
    opened: list[Bundle] = []

    def noted(bundle: Bundle) -> list[Tokenizer]:
        opened.append(bundle)
        return open_tokenizers(bundle)

    monkeypatch.setattr(loading, "open_tokenizers", noted)
    bundle, long = pipeline.bundle, "a " * 100
    manifest = bundle.manifest
    for options, chunks in (({}, 1), ({"negative_prompt": long}, 2), ({"negative_prompt": "a BREAK b"}, 2)):
        assert longest_prompt(bundle, [build_request(manifest, "a", options)]) == chunks
    many = [build_request(manifest, text, {}) for text in ("a", *(long + word for word in ("b", "c", "d")))]
    many.append(build_interpolation(manifest, "a", "a " * 200, 3, None, {}))
    opened.clear()
    assert longest_prompt(bundle, many[:1]) == 1
    assert opened == []
    assert longest_prompt(bundle, many[:-1]) == 2
    assert longest_prompt(bundle, many) == 3
    assert len(opened) == 2  # once for all of a call's requests


def test_a_picture_wants_the_vae_encoder_of_a_backend(pipeline: Pipeline) -> None:
    plain, with_picture = RequestShape(3, 16, 16), RequestShape(3, 16, 16, picture=True)
    assert "vae_encoder" not in needed_components(pipeline.bundle, plain)
    axes = needed_components(pipeline.bundle, with_picture)["vae_encoder"]
    assert (axes["height"], "batch" in axes) == (16, False)  # one picture, whatever is drawn from it
