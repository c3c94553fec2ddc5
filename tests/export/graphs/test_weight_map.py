"""The weight map is true: every initializer it names holds the checkpoint's numbers, and none is left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

from sdrt.runtime.bundle.bundle import EMBEDDED

Array = NDArray[Any]
CHECKPOINTS = {
    "tiny_bundle": "tiny_checkpoint",
    "fp16_bundle": "tiny_checkpoint",
    "sdxl_bundle": "sdxl_checkpoint",
}
MODEL = Path(__file__).parents[3] / "models" / "emoji"


@pytest.fixture(params=[*CHECKPOINTS, "embedded"])
def pair(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A checkpoint and its bundle."""
    if request.param == "embedded":
        return MODEL, EMBEDDED
    checkpoint, bundle = CHECKPOINTS[request.param], request.param
    return request.getfixturevalue(checkpoint), request.getfixturevalue(bundle)


def checkpoint_tensors(folder: Path) -> Iterator[tuple[str, Array]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no mapping
                yield name, tensors.get_tensor(name)


def initializers(bundle: Path, component: str) -> dict[str, Array]:
    model: ir.Model = ir.load(bundle / component / "model.onnx")
    ir.external_data.load_to_model(model)
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def test_it_names_each_tensor_and_the_initializers_that_hold_it(pair: tuple[Path, Path]) -> None:
    checkpoint, bundle = pair
    told = json.loads((bundle / "weights.json").read_text(encoding="utf-8"))["tensors"]
    components = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["components"]
    graphs = {name: initializers(bundle, name) for name in components}
    held: set[tuple[str, str]] = set()
    for folder, entries in told.items():
        tensors = dict(checkpoint_tensors(checkpoint / folder))
        assert set(entries) == set(tensors)
        for name, entry in entries.items():
            tensor = tensors[name]
            assert (entry["dtype"], entry["shape"]) == (tensor.dtype.name, list(tensor.shape))
            assert bool(entry["held_by"]) != bool(entry["absent"]), name
            for holder in entry["held_by"]:
                found = graphs[holder["component"]][holder["initializer"]]
                assert (holder["dtype"], holder["shape"]) == (found.dtype.name, list(found.shape))
                wanted = tensor.transpose(holder["permutation"]).astype(found.dtype)
                assert np.array_equal(found, wanted.reshape(found.shape)), name
                held.add((holder["component"], holder["initializer"]))
    left = [
        (component, name)
        for component, graph in graphs.items()
        for name, array in graph.items()
        if array.dtype.kind == "f" and array.size > 64 and (component, name) not in held
    ]
    # Tables of sinusoids are no weights.
    assert all(name.startswith(("unsqueeze", "exp")) for _, name in left), left


def test_each_tensor_of_the_embedded_model_is_in_a_graph() -> None:
    told = json.loads((EMBEDDED / "weights.json").read_text(encoding="utf-8"))["tensors"]
    assert set(told) == {"text_encoder", "unet", "vae"}
    assert all(entry["held_by"] for entries in told.values() for entry in entries.values())
    (query,) = told["unet"]["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"]["held_by"]
    assert query["permutation"] == [1, 0]
    assert query["passes"] == ["constant_folding", "weight_storage"]
    for name in ("decoder.conv_in.weight", "encoder.conv_in.weight"):
        assert [holder["component"] for holder in told["vae"][name]["held_by"]] == [f"vae_{name[:7]}"]
