"""Manifests of other families, and of other kinds of checkpoints."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.checkpoints.json_paths import KeyPath
from support.checkpoints.manifests import (
    DOCUMENT,
    INPAINTING,
    INPAINTING_SIZES,
    LCM_SIZES,
    SDXL,
    SIZES,
    VARIATIONS,
    changed,
    example,
    refused,
    without,
)

from sdrt.runtime.bundle.bundle import EMBEDDED, Bundle
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.bundle.manifest_json import from_json


def test_the_embedded_bundle_is_read() -> None:
    assert Bundle.open(EMBEDDED).manifest.family == "sd"


def test_optional_inputs_are_those_of_the_checkpoint() -> None:
    def inputs(sizes: dict[str, int], name: str) -> list[str]:
        return [spec.name for spec in FAMILIES["sd"].components[name].resolve(sizes, "fp32").inputs]

    plain = ["sample", "timestep", "encoder_hidden_states"]
    assert inputs(SIZES, "unet") == plain
    assert inputs(INPAINTING_SIZES, "unet") == [*plain, "inpainting"]
    assert inputs(LCM_SIZES, "unet") == [*plain, "timestep_cond"]
    assert inputs(SIZES, "text_encoder") == ["input_ids", "custom_embeddings", "clip_skip"]


def test_image_variations_have_an_image_encoder_and_no_tokenizer() -> None:
    manifest = from_json(json.dumps(VARIATIONS))
    assert manifest.record.required == ("image_encoder", "unet", "vae_decoder")
    assert manifest.tokenizers == ()
    assert [file.path for file in manifest.files()] == [
        *(f"{name}/model.onnx" for name in FAMILIES["image-variations"].components),
        "weights.json",
    ]


@pytest.mark.parametrize(
    "path", [("components", "image_encoder"), ("image_processor",), ("image_processor", "size")], ids=str
)
def test_image_variations_without_a_part(path: KeyPath) -> None:
    assert str(path[-1]) in refused(without(path, VARIATIONS))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("family",), "sd", "names an unknown component 'image_encoder'"),
        (("image_processor", "size"), 64, "size is the image encoder's"),
        (("image_processor", "size"), 32.0, "image_processor.size is '32.0', not a whole number"),
        (("image_processor", "mean"), [0.5, 0.5], "image_processor.mean has 2 entries, not 3"),
        (("image_processor", "mean", 1), "0.5", "image_processor.mean[1] is '0.5', not a finite number"),
        (("image_processor", "std", 2), 0, "std are above 0"),
        (("image_processor", "std"), 1.0, "image_processor.std is '1.0', not a list"),
        (("image_processor", "crop"), 1, "unknown field 'crop'"),
        (("components", "image_encoder", "outputs", 0, "shape", 2), 24, "output fits the unet"),
        (("components", "image_encoder", "outputs", 0, "shape", 1), 2, "image_embeds is float32"),
        (("tokenizers",), DOCUMENT["tokenizers"], "there is a tokenizer for each text encoder"),
        (("image_processor",), None, "image_processor's size"),
        (("limits", "max_chunks"), 2, "max_chunks is 1 and max_clip_skip 0 without text"),
        (("limits", "max_clip_skip"), 1, "max_chunks is 1 and max_clip_skip 0 without text"),
    ],
    ids=str,
)
def test_wrong_value_in_image_variations(path: KeyPath, value: Any, words: str) -> None:
    assert words in refused(changed(path, value, VARIATIONS))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("shape", 1), 6, "inpainting has the latents' channels and one for the mask"),
        (("shape", 1), "inpainting_channels", "inpainting is float32"),
        (("name",), "mask", "the inputs of unet are not sample, timestep, encoder_hidden_states"),
    ],
    ids=str,
)
def test_wrong_value_in_an_inpainting_unet(path: KeyPath, value: Any, words: str) -> None:
    assert words in refused(changed(("components", "unet", "inputs", 3, *path), value, INPAINTING))


def test_sdxl_has_two_text_encoders_and_tokenizers() -> None:
    manifest = from_json(json.dumps(SDXL))
    assert (
        manifest.record.required
        == FAMILIES["sdxl"].required
        == tuple(name for name in FAMILIES["sdxl"].components if name != "vae_encoder")
    )
    assert [facts.pad for facts in manifest.tokenizers] == [2, 0]
    assert [file.path for file in manifest.files()][-3:-1] == ["tokenizer.json", "tokenizer_2.json"]
    assert example().record.required == ("text_encoder", "unet", "vae_decoder")
    assert len(example().tokenizers) == 1


@pytest.mark.parametrize(
    "path", [("components", "text_encoder_2"), ("components", "text_encoder_2", "model")], ids=str
)
def test_sdxl_without_its_second_encoder(path: KeyPath) -> None:
    assert str(path[-1]) in refused(without(path, SDXL))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("family",), "sd", "names an unknown component 'text_encoder_2'"),
        (("force_zeros_for_empty_prompt",), 1, "'1', not true or false"),
        (("tokenizers", 1, "max_length"), 64, "max_length fits"),
        (("tokenizers",), SDXL["tokenizers"][:1], "there is a tokenizer for each text encoder"),
        (("components", "text_encoder_2", "outputs", 0, "shape", 2), 16, "output fits the unet"),
        (("components", "text_encoder_2", "outputs", 1, "shape", 1), 16, "text_embeds fit the unet"),
        (("components", "unet", "inputs", 4, "shape", 1), 5, "time_ids is float16['rows', 5]"),
        (("text_output",), "text_embeds", "text_output is what the unet reads"),
    ],
    ids=str,
)
def test_wrong_value_in_sdxl(path: KeyPath, value: Any, words: str) -> None:
    assert words in refused(changed(path, value, SDXL))
