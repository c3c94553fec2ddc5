"""SDXL checkpoints: what is refused, and a bundle that draws what diffusers' pipeline draws."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from support.checkpoints.tiny_sdxl import PROJECTION, SIZE, TIME_WIDTH, WIDTHS
from transformers import CLIPTokenizer

import tolerances
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.checkpoint.weights import load_module
from sdrt.export.parity.components import MAX_OVER_L2, compare
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.errors import CheckpointError
from sdrt.runtime.text.tokenizer import Tokenizer

UNET, SECOND = "unet/config.json", "text_encoder_2/config.json"


@pytest.fixture
def sdxl_copy(sdxl_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sdxl_checkpoint, tmp_path / "checkpoint"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_sdxl_checkpoint_is_opened(sdxl_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(sdxl_checkpoint))
    assert checkpoint.family == "sdxl"
    assert list(checkpoint.configs) == ["text_encoder", "text_encoder_2", "unet", "vae"]
    assert checkpoint.force_zeros_for_empty_prompt
    assert checkpoint.sizes() == {
        "tokens": 77,
        "text_width": WIDTHS[0],
        "skips": 1,
        "text_width_2": WIDTHS[1],
        "projection_width": PROJECTION,
        "cross_width": sum(WIDTHS),
        "unet_channels": 4,
        "latent_channels": 4,
    }
    assert [tokenizer.ids["pad"] for tokenizer in checkpoint.tokenizers] == [713, 0]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, True),
        ({"force_zeros_for_empty_prompt": False}, False),
        ({"force_zeros_for_empty_prompt": None}, False),
    ],
)
def test_empty_prompts_are_zeros_unless_the_checkpoint_says_otherwise(
    sdxl_copy: Path, said: dict[str, Any], expected: bool
) -> None:
    index = {"_class_name": "StableDiffusionXLPipeline", **said}
    (sdxl_copy / "model_index.json").write_text(json.dumps(index))
    assert open_checkpoint(str(sdxl_copy)).force_zeros_for_empty_prompt is expected


BAD: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no second encoder": (
        lambda path: shutil.rmtree(path / "text_encoder_2"),
        ("no folder text_encoder_2/",),
    ),
    "no second tokenizer": (lambda path: shutil.rmtree(path / "tokenizer_2"), ("no folder tokenizer_2/",)),
    "no second weights": (
        lambda path: (path / "text_encoder_2/model.safetensors").unlink(),
        ("text_encoder_2 has no model.safetensors",),
    ),
    "widths": (
        lambda path: edit(path / UNET, cross_attention_dim=24),
        (f"the text encoders give {sum(WIDTHS)} features", "takes 24"),
    ),
    "another kind": (
        lambda path: edit(path / UNET, addition_embed_type="text_image"),
        ("addition_embed_type is 'text_image'", "text_time"),
    ),
    "a refiner": (
        lambda path: edit(path / UNET, projection_class_embeddings_input_dim=PROJECTION + 5 * TIME_WIDTH),
        ("projection_class_embeddings_input_dim is 52", "6 time ids give 60"),
    ),
    "no projection": (lambda path: edit(path / SECOND, projection_dim=None), ("projection_dim is None",)),
    "lengths": (
        lambda path: edit(path / "tokenizer_2/tokenizer_config.json", model_max_length=64),
        ("the tokenizers give 77 and 64 tokens",),
    ),
    "vocabulary": (
        lambda path: edit(path / SECOND, vocab_size=600),
        ("tokenizer_2 has ids up to 713", "text_encoder_2 embeds 600"),
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_checkpoint_is_refused_in_one_line(sdxl_copy: Path, what: str) -> None:
    damage, words = BAD[what]
    damage(sdxl_copy)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(sdxl_copy))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_projection_that_is_missing_is_refused(sdxl_copy: Path) -> None:
    """A text model without its projection would give other text_embeds; only the first may lack it."""
    from safetensors.torch import load_file, save_file

    file = sdxl_copy / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    del tensors["text_projection.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the tensor text_projection\.weight is missing"):
        load_module(open_checkpoint(str(sdxl_copy)), "text_encoder_2")


def test_every_output_and_a_sampling_run_were_compared(sdxl_bundle: Path) -> None:
    """The run goes through diffusers' StableDiffusionXLPipeline: zeros for the empty negative prompt,
    both encoders' penultimate states, text_embeds and time ids of the picture's own size."""
    parity = json.loads((sdxl_bundle / "manifest.json").read_text())["parity"]
    assert parity["left_out"] == []
    compared = {(entry["component"], entry["output"]) for entry in parity["figures"]}
    table = FAMILIES["sdxl"].components
    assert compared == {(name, out.name) for name, spec in table.items() for out in spec.outputs} | {
        ("sampling", "latents"),
        ("pipeline", "latents"),
        ("pipeline", "image"),
    }
    for entry in parity["figures"]:
        assert entry["relative_l2"] <= entry["tolerance"]
        assert entry["relative_max"] <= entry["tolerance"] * MAX_OVER_L2


def test_the_manifest_says_what_a_drawing_needs(sdxl_bundle: Path) -> None:
    manifest = Bundle.open(sdxl_bundle).manifest
    assert manifest.family == "sdxl"
    assert manifest.text_output == "penultimate_hidden_state"
    assert manifest.force_zeros_for_empty_prompt
    assert manifest.defaults.guidance_scale == 5.0
    assert manifest.defaults.height == SIZE
    assert manifest.ranges == {}  # a float32 bundle has none


@pytest.mark.parametrize("index", [0, 1])
def test_each_tokenizer_pads_as_transformers_does(
    sdxl_bundle: Path, sdxl_checkpoint: Path, index: int
) -> None:
    bundle = Bundle.open(sdxl_bundle)
    facts = bundle.manifest.tokenizers[index]
    ours = Tokenizer.from_file(
        bundle.file(facts.file),
        max_length=facts.max_length,
        bos=facts.bos,
        eos=facts.eos,
        pad=facts.pad,
    )
    theirs = CLIPTokenizer.from_pretrained(sdxl_checkpoint / ("tokenizer" if index == 0 else "tokenizer_2"))
    expected = theirs("a photo of a cat", padding="max_length", truncation=True)["input_ids"]
    assert np.asarray(ours.encode("a photo of a cat").ids).ravel().tolist() == expected
    assert expected[-1] == facts.pad


def test_the_unet_takes_text_embeds_and_time_ids(sdxl_bundle: Path, sdxl_checkpoint: Path) -> None:
    model: Any = load_module(open_checkpoint(str(sdxl_checkpoint)), "unet")
    generator = torch.Generator().manual_seed(5)
    sample, states, embeds = (
        torch.randn(shape, generator=generator)
        for shape in ((4, 4, 8, 8), (4, 77, sum(WIDTHS)), (4, PROJECTION))
    )
    time_ids = torch.tensor([[16.0, 20, 1, 2, 16, 16], [8, 8, 0, 0, 16, 16]]).repeat(2, 1)
    timestep = torch.tensor([321.5, 7.25, 321.5, 7.25])
    with torch.no_grad():
        expected = model(
            sample, timestep, states, added_cond_kwargs={"text_embeds": embeds, "time_ids": time_ids}
        ).sample
    session = ort.InferenceSession(sdxl_bundle / "unet" / "model.onnx", providers=["CPUExecutionProvider"])
    names = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")
    tensors = (sample, timestep, states, embeds, time_ids)
    feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
    (actual,) = session.run(None, feeds)
    l2, peak = compare(np.asarray(actual), expected.numpy())
    assert l2 <= tolerances.GRAPH_FP32
    assert peak <= tolerances.GRAPH_PEAK * tolerances.GRAPH_FP32
