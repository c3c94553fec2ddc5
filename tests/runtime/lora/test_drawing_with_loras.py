"""Pictures with LoRAs: exact from set to set, alike however they are asked for, again by their recipes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file
from support.checkpoints.synthetic_loras import write_kohya_lora
from support.runs.pipeline_spies import assert_differ, assert_equal
from support.runs.task_calls import MASK, PICTURE

from sdrt.runtime.bundle.bundle import EMBEDDED
from sdrt.runtime.errors import BackendError, CancelledError, UsageError
from sdrt.runtime.pictures.metadata import parameters_text, read_recipe
from sdrt.runtime.pictures.writing import save_image
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.request.output import PipelineOutput
from sdrt.runtime.text.syntax import PromptSyntaxWarning

Array = NDArray[Any]
SHORT: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": 5}
TOO_MUCH = "the LoRA 'unet', unet, is 101: -100 to 100"


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRAs of the embedded model: of all its parts, of the U-Net alone, with a word, with unknown keys."""
    folder = tmp_path_factory.mktemp("loras")
    write_kohya_lora(folder / "both.safetensors", EMBEDDED, 1)
    write_kohya_lora(folder / "unet.safetensors", EMBEDDED, 2, folders=("unet",))
    arrays = load_file(folder / "unet.safetensors")
    word = np.random.default_rng(3).normal(0, 0.1, (1, 128)).astype(np.float32)
    save_file({**arrays, "<s1>": word}, folder / "word.safetensors", {"<s1>": "<embed>"})
    save_file({**arrays, "<s1>": -word}, folder / "other.safetensors", {"<s1>": "<embed>"})
    save_file({**arrays, "lora_unet_odd.lora_up.weight": word}, folder / "odd.safetensors")
    return folder


@pytest.fixture(scope="module")
def pipeline(loras: Path) -> Pipeline:
    return Pipeline.load(lora_dir=loras, backend="onnxruntime-cpu")


@pytest.fixture
def draw(pipeline: Pipeline) -> Callable[..., PipelineOutput]:
    """Draws shortly."""

    def draw(prompt: Any = "a red apple", **options: Any) -> PipelineOutput:
        return pipeline(prompt, **{**SHORT, **options})

    return draw


Draw = Callable[..., PipelineOutput]


# --- exact


def test_back_and_forth(draw: Draw) -> None:
    """From LoRA to LoRA and back, and to none, bit for bit; each set is another picture."""
    sets: list[dict[str, Any]] = [
        {},
        {"both": 1},
        {"unet": 1},
        {"both": 0.5},
        {"both": {"text_encoder": 1, "unet": 0}},
        {"both": {"text_encoder": 0, "unet": 1}},
        {"both": 1, "unet": -0.5},
    ]
    first = [draw(loras=one) for one in sets]
    for number, one in enumerate(first):
        for other in first[:number]:
            assert_differ(one.latents, other.latents)
    for number in (1, 6, 0, 5, 4, 2, 3, 0, 1):
        again = draw(loras=sets[number])
        assert_equal(again, first[number])
        assert "lora" in again.timings
    assert "lora" not in draw(loras=sets[1]).timings  # which it holds already


def test_sums(draw: Draw) -> None:
    """Weight 0 is none, the order does not matter, and what is named twice is added up."""
    assert_equal(draw(loras={"both": 0, "unet": 0.0}), draw())
    assert_equal(draw(loras={"both": 1, "unet": 0.5}), draw(loras={"unet": 0.5, "both": 1}))
    assert_equal(draw("a red apple<lora:both:0.25>", loras={"both": 0.5}), draw(loras={"both": 0.75}))


def test_in_company(draw: Draw) -> None:
    """Pictures with different LoRAs in one call are each what it is alone, whatever their order."""
    prompts = [
        "a cat<lora:both>",
        "a cat",
        "a cat<lora:unet:0.5>",
        "a dog<lora:both>",
        "a dog",
        "a cat<lora:unet:-0>",
    ]
    alone = [draw(prompt, seed=number) for number, prompt in enumerate(prompts)]
    together = draw(prompts, seed=0)
    for number, one in enumerate(alone):
        assert np.array_equal(together.latents[number], one.latents[0])
        assert together.images[number] == one.images[0]
        assert together.recipes[number] == one.recipes[0]


# --- asked for


def test_however_it_is_asked_for(pipeline: Pipeline, draw: Draw, loras: Path) -> None:
    """In a prompt, in a call by name or path, or as an adapter; a prompt's come beside the others."""
    wanted = draw(loras={"both": 0.5})
    path = str(loras / "both.safetensors")
    assert_equal(draw("a <lora:both:0.5>red apple"), wanted)
    assert_equal(draw("a <lyco:both:0.5:0.5>red apple"), wanted)
    assert_equal(draw(loras={path: 0.5}), wanted)
    assert_equal(draw(loras={path: {"text_encoder": 0.5, "unet": 0.5}}), wanted)
    plain = draw("a <lora:both:0.5>red apple", plain_prompt=True)
    assert "loras" not in plain.recipes[0]
    assert_differ(plain.latents, wanted.latents)
    try:
        assert pipeline.load_lora_weights(path, "mine") == "mine"
        pipeline.load_lora_weights(loras / "unet.safetensors")
        assert pipeline.get_list_adapters() == {"text_encoder": ["mine"], "unet": ["mine", "unet"]}
        assert pipeline.get_active_adapters() == ["unet"]
        assert_equal(draw(), draw(loras={"unet": 1}))
        pipeline.set_adapters(["mine"], [0.5])
        request = pipeline.request("a red apple", **SHORT)
        assert_equal(draw(), wanted)
        assert_equal(draw("a red apple<lora:unet>"), draw(loras={"mine": 0.5, "unet": 1}))
        none = draw(loras={})
        pipeline.set_adapters(())
        assert_equal(draw(), none)
        assert_equal(pipeline.draw(request), wanted)  # as it was asked for
        assert_equal(draw("a red apple<lora:mine:0.5>"), wanted)
    finally:
        pipeline.unload_lora_weights()
    assert (pipeline.get_list_adapters(), pipeline.get_active_adapters()) == ({}, [])
    assert_equal(draw(), none)


def test_in_a_negative_prompt_it_is_text(draw: Draw) -> None:
    """As in stable-diffusion-webui, which looks for it in prompts alone."""
    with pytest.warns(PromptSyntaxWarning, match="the negative prompt's '<lora:both>', .* is text, as in"):
        output = draw(negative_prompt="ugly<lora:both>")
    assert "lora_sha256" not in output.recipes[0]
    assert_differ(output.latents, draw(negative_prompt="ugly").latents)
    assert_equal(output, draw(negative_prompt="ugly<lora:both>", plain_prompt=True))


def test_without_a_folder_it_is_left_out(draw: Draw) -> None:
    with Pipeline.load(verify=False, backend="onnxruntime-cpu") as other:
        words = r"the prompt's '<lora:both>', character 12, .* left out; give their folder \(--lora-dir DIR"
        with pytest.warns(PromptSyntaxWarning, match=words):
            output = other("a red apple<lora:both>", **SHORT)
    assert_equal(output, draw())


def test_words_come_with_their_lora(pipeline: Pipeline, draw: Draw, loras: Path) -> None:
    """Each picture has the words of its own LoRAs, before those that were taught; without them it is text."""
    text = draw("a <s1>")
    assert text.recipes[0].get("embeddings") is None
    first, second = draw("a <s1><lora:word>"), draw("a <s1><lora:other>")
    assert_differ(first.latents, second.latents)
    assert_differ(first.latents, draw("a <s1><lora:unet>").latents)
    together = draw(["a <s1><lora:other>", "a <s1>", "a <s1><lora:word>"], seed=[5, 5, 5])
    for number, one in enumerate((second, text, first)):
        assert np.array_equal(together.latents[number], one.latents[0])
    assert_equal(draw("a <s1>"), text)


# --- again


@pytest.mark.parametrize(
    "call",
    [
        {"prompt": "a <lora:both:0.5>cat"},
        {"prompt": "a cat", "loras": {"both": 0.5, "unet": {"text_encoder": 1, "unet": 0.25}}},
        {"prompt": "a cat<lora:unet>", "loras": {"both": 0.5}},
        {"prompt": "a cat", "loras": {"odd": 1}, "lora_partial": True},
    ],
    ids=["tag", "option", "both", "partial"],
)
@pytest.mark.filterwarnings("ignore::sdrt.runtime.lora.library.LoraPartialWarning")
@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_a_recipe_draws_it_again(
    pipeline: Pipeline, draw: Draw, tmp_path: Path, call: dict[str, Any], suffix: str
) -> None:
    output = draw(**call)
    save_image(output.images[0], tmp_path / f"a{suffix}", output.recipes[0])
    found = read_recipe(tmp_path / f"a{suffix}")
    assert found == output.recipes[0]
    assert found.get("loras", {}) == call.get("loras", {})
    assert_equal(pipeline(**found), output)
    assert pipeline(**found).recipes == output.recipes


def test_the_text_for_stable_diffusion_webui(pipeline: Pipeline, draw: Draw, loras: Path) -> None:
    """LoRAs stand in the prompt, whoever asked for them, and their hashes in the list."""
    path = str(loras / "both.safetensors")
    recipe = draw("a cat <lora:unet:2>", loras={path: {"text_encoder": 1, "unet": 0.5}}).recipes[0]
    prompt, *_, last = parameters_text(recipe).split("\n")
    assert prompt == "a cat <lora:unet:2> <lora:both:1:0.5>"
    hashes = {name: pipeline._loras.find(name).a1111_hash for name in ("both", "unet")}
    assert f'Lora hashes: "both: {hashes["both"]}, unet: {hashes["unet"]}"' in last


def test_a_recipe_without_loras_is_drawn_without(pipeline: Pipeline, draw: Draw, loras: Path) -> None:
    output = draw()
    try:
        pipeline.load_lora_weights(loras / "both.safetensors")
        assert_equal(pipeline(**output.recipes[0]), output)
        assert_differ(draw().latents, output.latents)
        with_it = draw()
    finally:
        pipeline.unload_lora_weights()
    assert with_it.recipes[0]["loras"] == {"both": 1.0}
    assert_equal(pipeline(**with_it.recipes[0]), with_it)  # found in the folder


def test_a_recipe_says_what_is_missing(draw: Draw, loras: Path, tmp_path: Path) -> None:
    tagged, named = draw("a<lora:both>").recipes[0], draw("a", loras={"both": 1}).recipes[0]
    (tmp_path / "both.safetensors").write_bytes((loras / "unet.safetensors").read_bytes())
    with Pipeline.load(verify=False, backend="onnxruntime-cpu", lora_dir=tmp_path) as other:
        for recipe in (tagged, named):
            words = (
                r"the LoRA 'both' is not the one that the recipe was drawn with .* or leave lora_sha256 out"
            )
            with pytest.raises(UsageError, match=words):
                other(**recipe)
            other(**{**recipe, "lora_sha256": None})
        (tmp_path / "both.safetensors").unlink()
        for recipe in (tagged, named):
            with pytest.raises(UsageError, match=r"the LoRA 'both' is not in .*: give its file"):
                other(**recipe)


# --- tasks


def test_other_tasks(draw: Draw) -> None:
    """With a picture, a mask, a variation: with a LoRA each is another picture, and again the same."""
    picture, mask = (
        np.asarray(Image.fromarray(array).resize((64, 64))) for array in (PICTURE, np.uint8(255) * MASK)
    )
    calls: tuple[dict[str, Any], ...] = (
        {"image": picture, "strength": 0.9},
        {"image": picture, "mask_image": mask},
        {"image": picture, "variation": 0.2},
    )
    for call in calls:
        plain, changed = draw(**call), draw(**call, loras={"both": 1})
        assert_differ(changed.latents, plain.latents)
        prompts = ["a red apple<lora:both>", "a red apple", "a red apple<lora:both>"]
        together = draw(prompts, **{**call, "seed": [5, 5, 6]})
        assert np.array_equal(together.latents[0], changed.latents[0])
        assert np.array_equal(together.latents[1], plain.latents[0])


def test_frames_go_from_one_weight_to_the_other(pipeline: Pipeline, draw: Draw) -> None:
    options = {name: value for name, value in SHORT.items() if name != "seed"}
    ends = ("a cat<lora:both>", "a cat<lora:both:0.5><lora:unet>")
    frames = pipeline.interpolate(*ends, frames=3, seed=5, **options)
    for latents, single in zip(
        frames.latents,
        (draw(ends[0]), draw("a cat", loras={"both": 0.75, "unet": 0.5}), draw(ends[1])),
        strict=True,
    ):
        assert np.array_equal(latents, single.latents[0])
    for number, recipe in enumerate(frames.recipes):
        assert np.array_equal(pipeline(**recipe).latents[0], frames.latents[number])
    one = pipeline.interpolate("a cat<lora:both>", "a dog<lora:both>", frames=2, seed=5, **options)
    assert np.array_equal(one.latents[0], frames.latents[0])


# --- when something fails


def test_a_failure_leaves_all_as_it_was(
    pipeline: Pipeline, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two components, too: whatever is drawn next is drawn with the right weights."""
    none, both = draw(), draw(loras={"both": 1})

    def fail(_weights: Mapping[str, Array]) -> None:
        raise BackendError("no other weights today")

    def interrupt(_weights: Mapping[str, Array]) -> None:
        raise KeyboardInterrupt

    for component in ("text_encoder", "unet"):
        for broken, error in ((fail, BackendError), (interrupt, KeyboardInterrupt)):
            draw()
            with monkeypatch.context() as patch:
                patch.setattr(pipeline._executors[component], "replace_weights", broken)
                with pytest.raises(error):
                    draw(loras={"both": 1})
            assert_equal(draw(), none)
            assert_equal(draw(loras={"both": 1}), both)


def test_a_call_that_is_cancelled(pipeline: Pipeline, draw: Draw) -> None:
    both = draw(loras={"both": 1})
    draw()

    def cancel(*_: object) -> None:
        pipeline.cancel()

    with pytest.raises(CancelledError):
        draw(["a", "b<lora:both>"], callback_on_step_end=cancel)
    assert_equal(draw(loras={"both": 1}), both)


def test_one_call_at_a_time(pipeline: Pipeline, draw: Draw, loras: Path) -> None:
    """Nothing is loaded or activated while a picture is drawn; requests are checked meanwhile."""
    path = loras / "unet.safetensors"
    checked: list[Any] = []

    def on_step(*_: object) -> None:
        for call in (
            lambda: pipeline.load_lora_weights(path),
            lambda: pipeline.set_adapters(()),
            pipeline.unload_lora_weights,
        ):
            with pytest.raises(UsageError, match="is drawing already"):
                call()
        thread = threading.Thread(target=lambda: checked.append(pipeline.request("a<lora:unet>", **SHORT)))
        thread.start()
        thread.join()

    assert_equal(draw(callback_on_step_end=on_step), draw())
    assert_equal(pipeline.draw(checked[0]), draw("a<lora:unet>"))
    closed = Pipeline.load(verify=False, backend="onnxruntime-cpu")
    closed.close()
    with pytest.raises(UsageError, match="was closed"):
        closed.load_lora_weights(path)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"loras": ["both"]}, "loras is list: a table of names or paths and their weights"),
        ({"loras": {"": 1}}, "loras names '': the name of a LoRA, or a path, is wanted"),
        ({"loras": {"both": "1"}}, "the weight of the LoRA 'both' is '1': a number is wanted"),
        ({"loras": {"unet": {"unet": 101}}}, TOO_MUCH),
        ({"loras": {"gone": 1}}, r"the LoRA 'gone' is not in .*: there is both, odd, .*; or give its file"),
        ({"loras": {"both\0": 1}}, "loras names 'both"),
        ({"prompt": "a<lora:boht>"}, "the LoRA 'boht' is not in .*: did you mean both"),
        ({"prompt": "a<lora:both:x>"}, "'x' or 'x' is no weight of a LoRA"),
        (
            {"loras": {"odd": 1}},
            r"odd.safetensors: the key 'lora_unet_odd.* \(partial=True\) takes what fits",
        ),
        ({"lora_partial": 1}, "lora_partial is 1: True or False"),
        ({"lora_sha256": ["x"]}, "lora_sha256 is list: names with the SHA-256"),
        ({"lora": {"both": 1}}, "the pipeline has no lora, did you mean loras"),
    ],
)
def test_what_is_refused(draw: Draw, call: dict[str, Any], words: str) -> None:
    before = draw()
    with pytest.raises(UsageError, match=words) as caught:
        draw(**call)
    assert "\n" not in str(caught.value)
    assert_equal(draw(), before)
