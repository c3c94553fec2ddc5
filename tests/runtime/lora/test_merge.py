"""A bundle's weights with LoRAs: PyTorch's numbers, whatever came before and in whatever order."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from support.references.lora_files import as_diffusers, as_kohya, layers, pairs, torch_product, write

from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.weight_map import SHARED, WEIGHT_STORAGE, read_weight_map
from sdrt.runtime.errors import BundleError, UsageError
from sdrt.runtime.lora import changes
from sdrt.runtime.lora.file import LoraFile, read_lora
from sdrt.runtime.lora.merge import merged_weights
from sdrt.runtime.lora.stored_weights import stored_weights
from tolerances import LORA_FORMULA

Merged = Mapping[str, Mapping[str, NDArray[Any]]]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    """Whose weights are stored as float16, since that lost nothing."""
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def files(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRAs with factors of float32's full precision."""
    folder, weights = tmp_path_factory.mktemp("loras"), read_weight_map(bundle)
    wanted = {
        "unet": layers(weights, "unet", convolutions=True),
        "text_encoder": layers(weights, "text_encoder"),
    }
    found = []
    for seed in (0, 1):
        made = pairs(weights, wanted, seed)
        tensors = as_diffusers(made) if seed else as_kohya(made)
        rng = np.random.default_rng(seed)
        rough = {
            key: tensor if key.endswith("alpha") else tensor * rng.uniform(0.5, 1.5, tensor.shape)
            for key, tensor in tensors.items()
        }
        rough = {key: tensor.astype(np.float32) for key, tensor in rough.items()}
        found.append(write(folder / f"{seed}.safetensors", rough))
    return found


@pytest.fixture(scope="module")
def loras(bundle: Bundle, files: list[Path]) -> list[LoraFile]:
    return [read(bundle, file) for file in files]


def read(bundle: Bundle, file: Path) -> LoraFile:
    return read_lora(file, read_weight_map(bundle), bundle.manifest.record)


def equal(first: Merged, second: Merged) -> bool:
    return first.keys() == second.keys() and all(
        tensors.keys() == second[name].keys()
        and all(
            array.dtype == second[name][key].dtype and np.array_equal(array, second[name][key])
            for key, array in tensors.items()
        )
        for name, tensors in first.items()
    )


def by_pytorch(file: Path, checkpoint: Path, weight: float) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Network, name and numbers of each tensor that kohya's file changes, merged by PyTorch."""
    tensors = load_file(file)
    for network, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_text_model_")):
        for name, base in load_file(next((checkpoint / network).glob("*.safetensors"))).items():
            key = prefix + name.removesuffix(".weight").removeprefix("text_model.").replace(".", "_")
            if f"{key}.lora_up.weight" in tensors:
                up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
                product = torch_product(up.flatten(1), down.flatten(1)).reshape(base.shape)
                scale = float(tensors[f"{key}.alpha"]) / len(down) * weight
                yield network, name, base.float() + product * scale


def test_merged_weights_are_pytorchs_bit_for_bit(
    bundle: Bundle, tiny_checkpoint: Path, files: list[Path], loras: list[LoraFile]
) -> None:
    merged, tensors = merged_weights(bundle, [(loras[0], 0.8)]), read_weight_map(bundle).tensors
    compared = set()
    for network, name, wanted in by_pytorch(files[0], tiny_checkpoint, 0.8):
        for holder in tensors[network][name].held_by:
            found = merged[holder.component][holder.initializer]
            assert found.dtype == np.float32
            assert found.shape == holder.shape
            assert np.array_equal(found, wanted.permute(holder.permutation).reshape(holder.shape).numpy())
            compared.add((holder.component, holder.initializer))
    stored = sum(
        WEIGHT_STORAGE in holder.passes for tensor in tensors["unet"].values() for holder in tensor.held_by
    )
    assert stored  # as float16, which these sums would not fit into
    assert compared == {(name, key) for name, found in merged.items() for key in found}
    assert set(merged) == {"unet", "text_encoder"}


def test_products_of_large_layers_are_made_in_float64(
    bundle: Bundle, loras: list[LoraFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = merged_weights(bundle, [(loras[0], 0.8)], {"unet"})["unet"]
    monkeypatch.setattr(changes, "_FUSED_WORK", 0)
    monkeypatch.setattr(changes, "_FUSED_RANK", 0)
    for key, change in loras[0].changes.items():
        assert isinstance(change, changes.Scaled)
        assert isinstance(change.product, changes.LowRank)
        up, down = change.product.up.astype(np.float64), change.product.down.astype(np.float64)
        for order in ("C", "F"):
            base = np.zeros(read_weight_map(bundle).tensors[key.folder][key.tensor].shape, np.float32, order)
            wanted = (up @ down).astype(np.float32).reshape(base.shape)
            assert np.array_equal(change.product.numbers(base), wanted)
    rounded = merged_weights(bundle, [(loras[0], 0.8)], {"unet"})["unet"]
    assert not equal({"unet": fused}, {"unet": rounded})  # in the last bit
    for name, numbers in fused.items():
        assert np.abs(numbers - rounded[name]).max() < LORA_FORMULA * np.abs(numbers).max()


def test_nothing_remains_of_what_came_before(bundle: Bundle, loras: list[LoraFile]) -> None:
    first, second = loras
    alone = merged_weights(bundle, [(first, 0.8)])
    both = merged_weights(bundle, [(first, 0.8), (second, -0.5)])
    assert equal(both, merged_weights(bundle, [(second, -0.5), (first, 0.8)]))
    assert not equal(both, alone)
    assert equal(alone, merged_weights(bundle, [(first, 0.8)]))
    assert equal(alone, merged_weights(bundle, [(second, 0.0), (first, 0.8)]))
    assert equal({"unet": alone["unet"]}, merged_weights(bundle, [(first, 0.8)], {"unet"}))
    assert merged_weights(bundle, [(first, 0.0), (second, 0)]) == merged_weights(bundle, []) == {}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_are_rounded_once_to_the_graphs_type(
    bundle: Bundle, loras: list[LoraFile], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """The same graphs, read as if they had been exported in another precision."""
    stored = stored_weights(bundle)
    tensors = {
        network: {
            name: replace(
                tensor, held_by=tuple(replace(one, dtype=dtype, passes=()) for one in tensor.held_by)
            )
            for name, tensor in named.items()
        }
        for network, named in stored.map.tensors.items()
    }
    wanted = merged_weights(bundle, [(loras[0], 0.8)])
    numbers = stored.numbers
    monkeypatch.setattr(stored, "map", replace(stored.map, tensors=tensors))
    monkeypatch.setattr(stored, "numbers", lambda *names: (numbers(*names)[0], dtype))
    for name, found in merged_weights(bundle, [(loras[0], 0.8)]).items():
        for key, array in found.items():
            rounded = torch.from_numpy(wanted[name][key]).to(getattr(torch, dtype))
            assert np.array_equal(array.view(np.int16), rounded.view(torch.int16).numpy())
    if dtype == "float16":
        with pytest.raises(UsageError, match=r"reaches .*, and float16 holds 65504: .* smaller"):
            merged_weights(bundle, [(loras[0], 1e7)])


def test_sums_beyond_float32_are_refused(bundle: Bundle, loras: list[LoraFile]) -> None:
    with pytest.raises(UsageError, match="and float32 holds"):
        merged_weights(bundle, [(loras[0], 1e39)])


def test_what_tensors_share_does_not_change_for_one_of_them(
    bundle: Bundle, loras: list[LoraFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = stored_weights(bundle)
    key = next(iter(loras[0].changes))
    tensor = stored.map.tensors[key.folder][key.tensor]
    shared = replace(tensor, held_by=tuple(replace(one, passes=(SHARED,)) for one in tensor.held_by))
    tensors = {**stored.map.tensors[key.folder], key.tensor: shared, "its.twin": shared}
    monkeypatch.setattr(
        stored, "map", replace(stored.map, tensors={**stored.map.tensors, key.folder: tensors})
    )
    with pytest.raises(UsageError, match=r"shares with its\.twin.*sd-export --lora"):
        merged_weights(bundle, [(loras[0], 0.8)])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"conv_in.weight", b"conv_on.weight", "has no weights 'model.conv_in.weight.fp16'"),
        (b"model.onnx.data", b"model.onnx.dat\xff", "cannot be read: .*export it again"),
        (b"model.onnx.data", b"../unet.ox.data", r"in the file '\.\./unet\.ox\.data', which the manifest"),
    ],
)
def test_a_damaged_graph(
    tiny_bundle: Path, tmp_path: Path, files: list[Path], old: bytes, new: bytes, message: str
) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    graph = folder / "unet" / "model.onnx"
    graph.write_bytes(graph.read_bytes().replace(old, new))
    bundle = Bundle.open(folder, verify=False)
    with pytest.raises(BundleError, match=message):
        merged_weights(bundle, [(read(bundle, files[0]), 1.0)])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"permutation":[1,0]', '"permutation":[1,1]', "permutes its axes as"),
        ('"shape":[16]', '"shape":[17]', "has another shape than its tensor"),
        ('"tensors"', '"tensorz"', "unknown field 'tensorz'"),
        ('{"tensors"', '"tensors"', "cannot be used: .*export it again"),
    ],
)
def test_a_damaged_weight_map(tiny_bundle: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    file = folder / "weights.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(old, new, 1).ljust(len(text)), encoding="utf-8")
    with pytest.raises(BundleError, match=message):
        read_weight_map(Bundle.open(folder, verify=False))
