"""The first public form, pairs in the order of modules: two real files, and PyTorch walks the modules."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.references.lora_files import exact, torch_product, write

from sdrt.export.checkpoint.architectures import open_architecture
from sdrt.export.checkpoint.weights import meta_module
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.bundle.weight_map import CheckpointTensor, WeightMap
from sdrt.runtime.errors import UsageError
from sdrt.runtime.lora.changes import LowRank, Scaled
from sdrt.runtime.lora.file import NUMBERED, read_lora
from sdrt.runtime.lora.merge import changes_by_tensor, merged_tensor
from sdrt.runtime.lora.names import TensorKey

CASES = Path(__file__).resolve().parents[4] / "shared" / "cases" / "lora"
EXTENDED = ["ResnetBlock2D", "CrossAttention", "Attention", "GEGLU"]
ATTENTION, TEXT = ["CrossAttention", "Attention", "GEGLU"], ["CLIPAttention"]


@cache
def networks() -> dict[str, torch.nn.Module]:
    """Stable Diffusion 1.5 without memory for its weights, its modules in the order of late 2022.

    Since then diffusers has moved the feed forward of a transformer block behind its second attention.
    """
    checkpoint = open_architecture("sd15")
    found = {name: meta_module(checkpoint, name) for name in ("unet", "text_encoder")}
    for module in found["unet"].modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module._modules["attn2"] = module._modules.pop("attn2")
    return found


@cache
def weights() -> WeightMap:
    return WeightMap(
        {
            name: {
                key: CheckpointTensor("float32", tuple(tensor.shape))
                for key, tensor in module.state_dict().items()
            }
            for name, module in networks().items()
        }
    )


def walk(network: str, classes: Collection[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """As github.com/cloneofsimo/lora counts: layers within modules of these classes."""
    for path, module in networks()[network].named_modules():
        if type(module).__name__ in classes:
            for inner, layer in module.named_modules():
                if isinstance(layer, torch.nn.Linear) or (
                    isinstance(layer, torch.nn.Conv2d) and "ResnetBlock2D" in classes
                ):
                    yield f"{path}.{inner}", tuple(layer.weight.shape)


@pytest.mark.parametrize(
    ("name", "pairs", "words"),
    [("analog_svd_rank4", 144 + 48, []), ("lora_disney", 144 + 48, ["<s1>", "<s2>"])],
)
def test_real_files(name: str, pairs: int, words: list[str]) -> None:
    if not CASES.is_dir():
        pytest.skip(f"{CASES} is not there: two real files in the first public form were not read")
    file = CASES / f"{name}.safetensors"
    tensors = load_file(file)
    lora = read_lora(file, weights(), FAMILIES["sd"])
    assert (lora.format, len(lora.changes), list(lora.embeddings)) == (NUMBERED, pairs, words)
    for word, (vectors,) in lora.embeddings.items():
        assert np.array_equal(vectors, tensors[word].numpy()[None])
    for network, classes in (("unet", ATTENTION), ("text_encoder", TEXT)):
        for index, (layer, _) in enumerate(walk(network, classes)):
            change = lora.changes[TensorKey(network, f"{layer}.weight")]
            assert isinstance(change, Scaled)
            assert isinstance(change.product, LowRank)
            assert change.scale == 1
            for part in ("up", "down"):
                stored = tensors[f"{network}:{index}:{part}"].float().numpy()
                assert np.array_equal(getattr(change.product, part), stored)


def test_numbers_of_a_real_file_equal_those_of_pytorch() -> None:
    if not CASES.is_dir():
        pytest.skip(f"{CASES} is not there: a real file in the first public form was not merged")
    file = CASES / "analog_svd_rank4.safetensors"
    tensors, changes = load_file(file), changes_by_tensor([(read_lora(file, weights(), FAMILIES["sd"]), 0.8)])
    order = list(walk("unet", ATTENTION))
    for index in (0, 4, 7, 53, 54, 135, 143):  # 4 is a feed forward, 53 the last way down, 135 in the middle
        layer, shape = order[index]
        base = torch.randn(shape, generator=torch.Generator().manual_seed(index)) / 50
        up, down = (tensors[f"unet:{index}:{part}"].float() for part in ("up", "down"))
        wanted = base + torch_product(up, down) * 0.8
        found = merged_tensor(base.numpy(), changes[TensorKey("unet", f"{layer}.weight")])
        assert np.array_equal(found, wanted.numpy())


def test_pairs_of_residual_blocks_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {"<cat>": exact(rng, 768)}
    order = list(walk("unet", EXTENDED))
    for index, (_, shape) in enumerate(order):
        tensors[f"unet:{index}:down"] = exact(rng, 1, *shape[1:])
        tensors[f"unet:{index}:up"] = exact(rng, shape[0], 1, *(1,) * (len(shape) - 2))
    said = {"unet": json.dumps(EXTENDED), "<cat>": "<embed>"}
    file = write(tmp_path / "extended.safetensors", tensors, **said)
    lora = read_lora(file, weights(), FAMILIES["sd"])
    assert list(lora.embeddings) == ["<cat>"]
    assert len(lora.changes) == len(order) > 192
    for index, (layer, _) in enumerate(order):
        change = lora.changes[TensorKey("unet", f"{layer}.weight")]
        assert isinstance(change, Scaled)
        assert isinstance(change.product, LowRank)
        assert np.array_equal(change.product.up.ravel(), tensors[f"unet:{index}:up"].ravel())


@pytest.mark.parametrize("said", [{}, {"unet": '["Transformer2DModel"]'}, {"unet": "["}])
def test_an_order_that_is_not_known_is_refused(tmp_path: Path, said: dict[str, str]) -> None:
    tensors = {"unet:0:up": np.ones((320, 1), np.float32), "unet:0:down": np.ones((1, 320), np.float32)}
    file = write(tmp_path / "x.safetensors", tensors, **said)
    with pytest.raises(UsageError, match=r"numbered by modules of the classes .*CrossAttention, GEGLU"):
        read_lora(file, weights(), FAMILIES["sd"])
