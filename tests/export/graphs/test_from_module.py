"""The graphs of an export: names and axes, what is in the files, and that they compute the reference."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from support.runs.onnx_runs import text_inputs
from torch import Tensor, nn

import tolerances
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.checkpoint.weights import load_module
from sdrt.export.graphs.from_module import onnx_from_module, save_graph
from sdrt.export.graphs.networks import wrapped
from sdrt.export.options import AxisRange
from sdrt.export.parity.components import compare
from sdrt.export.passes.nodes import LAYER
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.families.record import DYNAMIC_AXES, ComponentSpec, TensorSpec
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.errors import SdrtError

Array = NDArray[Any]

# The largest sizes of the tiny bundle; height and width differ, so that axes cannot be swapped unseen.
BATCH, HEIGHT, WIDTH = 2, 32, 20


def run(bundle: Path, component: str, **feeds: Array) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(bundle / component / "model.onnx", options, ["CPUExecutionProvider"])
    return [np.asarray(result) for result in session.run(None, feeds)]


def graph_of(bundle: Path, component: str) -> onnx.ModelProto:
    return onnx.load(bundle / component / "model.onnx", load_external_data=False)


def noise(*shape: int, seed: int = 7) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(actual: Array, expected: Tensor, tolerance: float = tolerances.GRAPH_FP32) -> None:
    l2, peak = compare(actual, expected.numpy())
    assert l2 <= tolerance
    assert peak <= tolerances.GRAPH_PEAK * tolerance


def tensors_of(graph: onnx.ModelProto) -> tuple[list[TensorSpec], list[TensorSpec]]:
    def specs(values: Any) -> list[TensorSpec]:
        result = []
        for value in values:
            kind = value.type.tensor_type
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).name
            shape = tuple(axis.dim_param or axis.dim_value for axis in kind.shape.dim)
            result.append(TensorSpec(value.name, dtype, shape))
        return result

    return specs(graph.graph.input), specs(graph.graph.output)


def without_about(entries: tuple[TensorSpec, ...]) -> list[TensorSpec]:
    return [TensorSpec(entry.name, entry.dtype, entry.shape) for entry in entries]


@pytest.mark.parametrize("component", FAMILIES["sd"].components)
def test_names_dtypes_and_axes_are_those_of_the_table_and_the_manifest(
    tiny_bundle: Path, tiny_checkpoint: Path, component: str
) -> None:
    inputs, outputs = tensors_of(graph_of(tiny_bundle, component))
    table = (
        FAMILIES["sd"].components[component].resolve(open_checkpoint(str(tiny_checkpoint)).sizes(), "fp32")
    )
    manifest = Bundle.open(tiny_bundle).manifest.components[component]
    assert manifest.precision == "fp32"
    for spec in (table, manifest.spec):
        assert inputs == without_about(spec.inputs)
        assert outputs == without_about(spec.outputs)


def test_every_dynamic_axis_of_the_table_is_symbolic_in_some_graph(tiny_bundle: Path) -> None:
    symbols = set()
    for component in FAMILIES["sd"].components:
        for entries in tensors_of(graph_of(tiny_bundle, component)):
            symbols |= {axis for entry in entries for axis in entry.shape if isinstance(axis, str)}
    assert symbols == DYNAMIC_AXES


def test_fixed_sizes_are_constants_in_the_graphs(fp16_bundle: Path) -> None:
    # 18 x 16 pixels at a factor of 2; the rows of the U-Net are one without guidance and two with it.
    expected: dict[str, list[tuple[int | str, ...]]] = {
        "text_encoder": [(1, 77), (1, 77, 16), (1,), (1, 77, 16), (1, 77, 16)],
        "unet": [("rows", 4, 9, 8), (1,), ("rows", "context", 16), ("rows", 4, 9, 8)],
        "vae_decoder": [(1, 4, 9, 8), (1, 3, 18, 16)],
        "vae_encoder": [(1, 3, 18, 16), (1, 4, 9, 8), (1, 4, 9, 8)],
    }
    for component, shapes in expected.items():
        inputs, outputs = tensors_of(graph_of(fp16_bundle, component))
        assert [entry.shape for entry in (*inputs, *outputs)] == shapes


def test_an_fp16_graph_takes_half_floats_and_a_float32_timestep(fp16_bundle: Path) -> None:
    inputs, outputs = tensors_of(graph_of(fp16_bundle, "unet"))
    assert {entry.name: entry.dtype for entry in (*inputs, *outputs)} == {
        "sample": "float16",
        "timestep": "float32",
        "encoder_hidden_states": "float16",
        "noise_pred": "float16",
    }


def test_the_graph_knows_nothing_of_the_machine_that_made_it(
    tiny_bundle: Path, fp16_bundle: Path, tiny_checkpoint: Path
) -> None:
    here = {str(Path.cwd()), str(Path(torch.__file__).parent), sys.prefix, str(tiny_checkpoint.parent)}
    needles = [
        *here,
        "site-packages",
        "diffusers/",
        "transformers/",
        ".py",
        os.environ.get("HOME", "/root") + "/",
    ]
    for bundle in (tiny_bundle, fp16_bundle):
        for file in [*bundle.glob("*/model.onnx"), bundle / "manifest.json"]:
            data = file.read_bytes()
            assert [needle for needle in needles if needle.encode() in data] == [], file


@pytest.mark.parametrize("component", FAMILIES["sd"].components)
def test_of_metadata_the_graph_has_layers_alone_and_it_passes_the_checker(
    tiny_bundle: Path, tiny_checkpoint: Path, component: str
) -> None:
    onnx.checker.check_model(str(tiny_bundle / component / "model.onnx"))
    model = graph_of(tiny_bundle, component)
    holders: list[Any] = [model, model.graph, *model.graph.node, *model.graph.initializer]
    holders += [*model.graph.input, *model.graph.output, *model.graph.value_info]
    assert not model.functions
    for holder in holders:
        assert not holder.doc_string
        assert {entry.key for entry in holder.metadata_props} <= {LAYER}
    layers = {node.name: entry.value for node in model.graph.node for entry in node.metadata_props}
    module = wrapped(open_checkpoint(str(tiny_checkpoint)), component).get_submodule("model")
    assert set(layers.values()) <= {path for path, _ in module.named_modules()}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert all(node.input[1] == f"model.{layers[node.name]}.weight" for node in convolutions)


def attentions(module: nn.Module) -> int:
    return sum(hasattr(part, "to_q") or hasattr(part, "q_proj") for part in module.modules())


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_opset_23_has_one_attention_node_per_attention(
    tiny_bundle: Path, tiny_checkpoint: Path, component: str
) -> None:
    model = graph_of(tiny_bundle, component)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 23
    count = attentions(load_module(open_checkpoint(str(tiny_checkpoint)), component))
    assert count > 0
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Attention") == count
    assert "Softmax" not in kinds


def test_a_lower_opset_writes_attention_out_and_computes_the_same(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    spec = FAMILIES["sd"].components["text_encoder"].resolve(checkpoint.sizes(), "fp32")
    module = wrapped(checkpoint, "text_encoder")
    inputs = text_inputs(np.arange(2 * 77).reshape(2, 77), 16)
    example = tuple(map(torch.from_numpy, inputs.values()))
    model = onnx_from_module(module, example, spec, {"batch": AxisRange(1, 2)}, 18)
    (tmp_path / "text_encoder").mkdir()
    save_graph(model, tmp_path / "text_encoder" / "model.onnx")
    saved = graph_of(tmp_path, "text_encoder")
    assert {entry.domain: entry.version for entry in saved.opset_import}[""] == 18
    assert "Attention" not in {node.op_type for node in saved.graph.node}
    feeds = text_inputs(inputs["input_ids"][:1], 16)
    for low, high in zip(
        run(tmp_path, "text_encoder", **feeds), run(tiny_bundle, "text_encoder", **feeds), strict=True
    ):
        assert_close(low, torch.from_numpy(high))


def test_the_text_encoder_gives_transformers_last_and_penultimate_states(
    tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    model: Any = load_module(open_checkpoint(str(tiny_checkpoint)), "text_encoder")
    ids = torch.randint(0, 714, (BATCH, 77), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True)
    last, penultimate = run(tiny_bundle, "text_encoder", **text_inputs(ids.numpy(), 16))
    assert_close(last, expected.last_hidden_state)
    assert_close(penultimate, expected.hidden_states[-2])


@pytest.mark.parametrize(("rows", "context"), [(1, 77), (2 * BATCH, 77), (2, 308)])
def test_the_unet_gives_diffusers_prediction_at_any_size_and_timestep_of_each_row(
    tiny_bundle: Path, tiny_checkpoint: Path, rows: int, context: int
) -> None:
    model: Any = load_module(open_checkpoint(str(tiny_checkpoint)), "unet")
    sample, states = noise(rows, 4, HEIGHT // 2, WIDTH // 2), noise(rows, context, 16, seed=8)
    timestep = np.linspace(987.65, 3.2, rows, dtype=np.float32)
    with torch.no_grad():
        expected = model(*map(torch.from_numpy, (sample, timestep, states))).sample
    (actual,) = run(tiny_bundle, "unet", sample=sample, timestep=timestep, encoder_hidden_states=states)
    assert_close(actual, expected)


def test_the_decoder_takes_latents_in_the_samplers_scale(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    vae: Any = load_module(open_checkpoint(str(tiny_checkpoint)), "vae")
    assert vae.config.scaling_factor == 0.5
    latents = noise(BATCH, 4, HEIGHT // 2, WIDTH // 2)
    with torch.no_grad():
        expected = vae.decode(torch.from_numpy(latents) / 0.5).sample
    (image,) = run(tiny_bundle, "vae_decoder", latents=latents)
    assert image.shape == (BATCH, 3, HEIGHT, WIDTH)
    assert_close(image, expected)


def test_the_encoder_gives_mean_and_deviation_in_the_samplers_scale(
    tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    vae: Any = load_module(open_checkpoint(str(tiny_checkpoint)), "vae")
    image = np.clip(noise(BATCH, 3, HEIGHT, WIDTH) / 2, -1, 1)
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(image)).latent_dist
    mean, std = run(tiny_bundle, "vae_encoder", image=image)
    assert mean.shape == std.shape == (BATCH, 4, HEIGHT // 2, WIDTH // 2)
    assert_close(mean, posterior.mean * 0.5)
    assert_close(std, posterior.std * 0.5)


def test_a_fractional_timestep_is_not_rounded_in_an_fp16_graph(
    fp16_bundle: Path, tiny_checkpoint: Path
) -> None:
    model: Any = load_module(open_checkpoint(str(tiny_checkpoint)), "unet")
    sample, states = noise(2, 4, 9, 8), noise(2, 77, 16, seed=8)
    # fp16 numbers above 512 are half a unit apart: rounded, both would be 900.
    assert np.float16(900.2) == 900.0
    ours, reference = [], []
    for time in (900.0, 900.2):
        timestep = np.array([time, 12.5], np.float32)
        half = {"sample": sample.astype(np.float16), "encoder_hidden_states": states.astype(np.float16)}
        ours.append(run(fp16_bundle, "unet", timestep=timestep, **half)[0].astype(np.float64))
        with torch.no_grad():
            reference.append(model(*map(torch.from_numpy, (sample, timestep, states))).sample.numpy())
    error, _ = compare(ours[1] - ours[0], reference[1] - reference[0])
    assert error <= tolerances.FRACTIONAL_TIMESTEP_FP16


def test_a_fixed_size_is_the_only_one_that_the_graph_takes(fp16_bundle: Path) -> None:
    (image,) = run(fp16_bundle, "vae_decoder", latents=noise(1, 4, 9, 8).astype(np.float16))
    assert image.shape == (1, 3, 18, 16)
    with pytest.raises(Exception, match="latents"):
        run(fp16_bundle, "vae_decoder", latents=noise(1, 4, 8, 8).astype(np.float16))


class Doubled(nn.Module):
    """A component of one input and one output."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Branching(nn.Module):
    """What the tracer cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def toy(dtype: str = "float32") -> ComponentSpec:
    shape = ("batch", 3)
    return ComponentSpec("toy", (TensorSpec("x", "float32", shape),), (TensorSpec("y", dtype, shape),))


def test_a_range_with_a_multiple_and_a_range_from_one_are_both_symbolic(tmp_path: Path) -> None:
    for extent in (AxisRange(1, 4), AxisRange(4, 12, 4), AxisRange(2, 2)):
        model = onnx_from_module(
            Doubled(), (torch.zeros(max(2, 2 * extent.multiple), 3),), toy(), {"batch": extent}, 23
        )
        save_graph(model, tmp_path / "model.onnx")
        inputs, outputs = tensors_of(onnx.load(tmp_path / "model.onnx"))
        first = 2 if extent.fixed else "batch"
        assert inputs[0].shape == outputs[0].shape == (first, 3)


def test_a_network_that_cannot_be_traced_is_one_line_that_names_it() -> None:
    with pytest.raises(SdrtError, match="the ONNX export of toy failed: ") as caught:
        onnx_from_module(Branching(), (torch.zeros(2, 3),), toy(), {"batch": AxisRange(1, 4)}, 23)
    assert "\n" not in str(caught.value)


def test_a_graph_that_is_not_the_tables_is_refused() -> None:
    with pytest.raises(SdrtError, match=r"toy\.y is .*not float16"):
        onnx_from_module(Doubled(), (torch.zeros(2, 3),), toy("float16"), {"batch": AxisRange(1, 4)}, 23)


def test_the_manifest_names_every_file_of_a_component(tiny_bundle: Path) -> None:
    document = json.loads((tiny_bundle / "manifest.json").read_text())
    named = {entry["path"] for part in document["components"].values() for entry in part["files"]}
    present = {file.relative_to(tiny_bundle).as_posix() for file in tiny_bundle.glob("*/*")}
    assert named == present


def text_model(folder: Path) -> Any:
    """The text encoder in PyTorch."""
    return load_module(open_checkpoint(str(folder)), "text_encoder")


@pytest.mark.parametrize("skip", [0, 1])
def test_skipped_layers_are_those_of_diffusers(tiny_bundle: Path, tiny_checkpoint: Path, skip: int) -> None:
    """As in `StableDiffusionPipeline.encode_prompt`; the penultimate state is one layer further back."""
    model = text_model(tiny_checkpoint)
    ids = torch.randint(0, 714, (BATCH, 77), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        expected = model.final_layer_norm(states[-(skip + 1)])
    feeds = text_inputs(ids.numpy(), 16) | {"clip_skip": np.array([skip])}
    last, penultimate = run(tiny_bundle, "text_encoder", **feeds)
    assert_close(last, expected)
    assert_close(penultimate, states[-(skip + 2)])


def test_an_embedding_of_ones_own_is_a_token_that_the_vocabulary_does_not_have(
    tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    """As transformers computes it when the embedding is put into its table."""
    model = text_model(tiny_checkpoint)
    ids = torch.randint(0, 712, (BATCH, 77), generator=torch.Generator().manual_seed(3))
    own = 0.02 * noise(BATCH, 77, 16, seed=9)
    feeds = text_inputs(ids.numpy().copy(), 16) | {"custom_embeddings": own}
    table = model.get_input_embeddings()
    places = [(0, 3), (0, 4), (1, 76)]
    grown = torch.cat([table.weight, torch.stack([torch.from_numpy(own[place]) for place in places])])
    model.set_input_embeddings(nn.Embedding(*grown.shape))
    model.get_input_embeddings().weight = nn.Parameter(grown)
    for number, place in enumerate(places):
        feeds["input_ids"][place] = -1
        ids[place] = len(table.weight) + number
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True)
    last, penultimate = run(tiny_bundle, "text_encoder", **feeds)
    assert_close(last, expected.last_hidden_state)
    assert_close(penultimate, expected.hidden_states[-2])
