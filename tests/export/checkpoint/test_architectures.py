"""Published architectures: their real shapes, and random weights that say something about precision."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sdrt.export.checkpoint import architectures
from sdrt.export.checkpoint.architectures import ARCHITECTURES, open_architecture
from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.fingerprint import fingerprint
from sdrt.export.checkpoint.random_weights import SCHEME, fill_with_random_weights
from sdrt.export.checkpoint.weights import load_module, meta_module
from sdrt.export.graphs.networks import example_inputs, wrapped
from sdrt.export.parity.components import is_large
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.errors import UsageError

CLIP_L, BIG_G, VAE = 123_060_480, 694_659_840, 83_653_863
PARAMETERS = {
    "sd15": {"text_encoder": CLIP_L, "unet": 859_520_964, "vae": VAE},
    "sd21": {"text_encoder": 340_387_840, "unet": 865_910_724, "vae": VAE},
    "sdxl": {"text_encoder": CLIP_L, "text_encoder_2": BIG_G, "unet": 2_567_463_684, "vae": VAE},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_networks_have_as_many_parameters_as_the_published_models(name: str) -> None:
    opened = open_architecture(name)
    assert list(opened.configs) == list(PARAMETERS[name])
    for network, expected in PARAMETERS[name].items():
        module = meta_module(opened, network)
        assert sum(parameter.numel() for parameter in module.parameters()) == expected
    assert is_large(opened)


def test_what_else_the_published_models_say() -> None:
    sd15, sd21, sdxl = (open_architecture(name) for name in ARCHITECTURES)
    assert [opened.family for opened in (sd15, sd21, sdxl)] == ["sd", "sd", "sdxl"]
    assert [opened.native_size for opened in (sd15, sd21, sdxl)] == [512, 768, 1024]
    assert [opened.schedule.prediction_type for opened in (sd15, sd21, sdxl)] == [
        "epsilon",
        "v_prediction",
        "epsilon",
    ]
    assert sd21.configs["unet"]["upcast_attention"]
    assert [sd15.sizes()["cross_width"], sd21.sizes()["cross_width"], sdxl.sizes()["cross_width"]] == [
        768,
        1024,
        2048,
    ]
    assert [opened.force_zeros_for_empty_prompt for opened in (sd15, sd21, sdxl)] == [False, False, True]
    eos, exclamation = 49407, 0
    assert [tokenizer.ids["pad"] for tokenizer in sd15.tokenizers] == [eos]
    assert [tokenizer.ids["pad"] for tokenizer in sd21.tokenizers] == [exclamation]
    assert [tokenizer.ids["pad"] for tokenizer in sdxl.tokenizers] == [eos, exclamation]


@pytest.mark.parametrize(("name", "seed", "words"), [("sd3", 0, "one of sd15"), ("sd15", -1, "0 or more")])
def test_no_such_architecture(name: str, seed: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        open_architecture(name, seed=seed)


def small(name: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Checkpoint:
    """An architecture with the networks of a tiny checkpoint in place of the published ones."""
    for file in tiny.rglob("*.json"):
        if "tokenizer" not in file.parent.name:
            place = tmp_path / name / file.relative_to(tiny)
            place.parent.mkdir(parents=True, exist_ok=True)
            document = json.loads(file.read_text())
            if "vocab_size" in document:
                document["vocab_size"] = 49408
            place.write_text(json.dumps(document))
    for folder in tiny.glob("tokenizer*"):
        (tmp_path / name / folder.name).mkdir()
    monkeypatch.setattr(architectures, "FOLDER", tmp_path)
    return open_architecture(name, seed=3)


def test_a_tensor_depends_on_its_name_and_the_seed_alone(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = small("sd15", tiny_checkpoint, monkeypatch, tmp_path)
    first, again = (load_module(opened, "unet").state_dict() for _ in range(2))
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())
    half = load_module(opened, "unet", torch.float16).state_dict()
    assert all(torch.equal(tensor, half[key].float()) for key, tensor in first.items())
    # Another module that has a tensor of the same name and shape, alone.
    with torch.device("meta"):
        alone = torch.nn.Module()
        alone.conv_in = torch.nn.Conv2d(4, 16, 3)
    fill_with_random_weights(alone, torch.float32, 3, "unet")
    assert torch.equal(alone.conv_in.weight, first["conv_in.weight"])
    other = load_module(open_architecture("sd15", seed=4), "unet").state_dict()
    assert not torch.equal(other["conv_in.weight"], first["conv_in.weight"])
    assert not torch.equal(first["conv_norm_out.bias"], first["down_blocks.0.resnets.0.norm1.bias"])


def test_the_fingerprint_is_of_configurations_and_seed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = small("sd15", tiny_checkpoint, monkeypatch, tmp_path)
    before = fingerprint(opened)
    assert fingerprint(open_architecture("sd15", seed=3)) == before
    assert fingerprint(open_architecture("sd15", seed=4)) != before
    monkeypatch.setattr("sdrt.export.checkpoint.fingerprint.SCHEME", SCHEME + 1)
    assert fingerprint(opened) != before


def rms(tensor: torch.Tensor) -> float:
    return math.sqrt(float(tensor.double().square().mean()))


def activations(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The output of every layer with weights of its own, and of the whole network under ``""``."""
    found: dict[str, torch.Tensor] = {}

    def note(name: str) -> Any:
        def keep(_module: object, _inputs: object, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                found[name] = output

        return keep

    for name, part in module.named_modules():
        part.register_forward_hook(note(name))
    with torch.no_grad():
        module(*inputs)
    return found


# Layers far from 1: a time of up to 999 is given in sines, and attention to 77 or more values is their mean.
QUIET = 0.05


@pytest.mark.parametrize("component", FAMILIES["sd"].components)
def test_activations_stay_near_one_in_the_published_widths(component: str) -> None:
    """At the smallest picture, of the real networks but for the U-Net, whose real depth is kept."""
    opened = open_architecture("sd15")
    if component == "unet":
        narrow = {"block_out_channels": [64, 128, 256, 256], "cross_attention_dim": 64}
        opened.configs["unet"].update(narrow)
        opened.configs["text_encoder"]["hidden_size"] = 64
    axes = {"batch": 1, "rows": 1, "height": 64, "width": 64, "latent_height": 8, "latent_width": 8}
    axes["context"] = 77
    inputs = example_inputs(opened, component, axes, torch.Generator().manual_seed(0))
    found = activations(wrapped(opened, component), inputs)
    if component == "vae_decoder":
        image = found[""]
        assert 0.2 < rms(image) < 0.6
        assert float((image.abs() > 1).double().mean()) < 0.05
    elif component == "unet":
        assert 0.5 < rms(found[""]) < 2
    for name, tensor in found.items():
        assert QUIET < rms(tensor) < 4, name
        assert float(tensor.abs().max()) < 100, name  # fp16 holds 65,504


def test_a_text_encoder_of_random_weights_knows_its_positions() -> None:
    opened = open_architecture("sd15")
    opened.configs["text_encoder"]["num_hidden_layers"] = 1
    module = load_module(opened, "text_encoder")
    buffers = dict(module.named_buffers())
    assert [key.split(".")[-1] for key in buffers] == ["position_ids"]
    assert next(iter(buffers.values())).tolist() == [list(range(77))]
