"""The check of a bundle's graphs: what is exported passes, and what could harm an engine library does not."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto, TensorProto, helper
from support.checkpoints.graph_fuzz import MUTATIONS
from support.references.onnx_operator_table import operators

from sdrt.runtime.admission.graph_check import check_graph_file, external_files
from sdrt.runtime.admission.graph_operators import MAX_OPSET, find_operator, operator_lines
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.errors import BundleError

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
EMBEDDED = Bundle.open(verify=False)
Change = Callable[[ModelProto], None]


def check(content: bytes, component: str = "text_encoder") -> None:
    part = EMBEDDED.component(component)
    sizes = {entry.path: entry.size for entry in part.files}
    check_graph_file(content, part.model, external_files(part.model, sizes))


def graph_of(component: str = "text_encoder") -> bytes:
    return (EMBEDDED.path / component / "model.onnx").read_bytes()


def refused(content: bytes) -> str:
    with pytest.raises(BundleError) as caught:
        check(content)
    message = str(caught.value)
    assert message.startswith("text_encoder/model.onnx is no graph that sdrt reads: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("component", COMPONENTS)
def test_exported_graphs_pass(tiny_bundle: Path, component: str) -> None:
    check(graph_of(component), component)
    bundle = Bundle.open(tiny_bundle, verify=False)
    part = bundle.component(component)
    sizes = {entry.path: entry.size for entry in part.files}
    check_graph_file(bundle.file(part.files[0]).read_bytes(), "x", external_files(part.model, sizes))


def test_the_table_of_operators_is_that_of_onnx() -> None:
    assert operator_lines("") == operators()
    convolution = find_operator("", "Conv")
    assert convolution is not None
    assert (convolution.inputs, convolution.outputs, convolution.required) == ((2, 3), (1, 1), frozenset())
    assert convolution.attributes["pads"] == "ints"


def external(**place: str) -> Change:
    """The first constant that lies in a file lies elsewhere; an empty text leaves the key out."""

    def change(model: ModelProto) -> None:
        tensor = next(entry for entry in model.graph.initializer if entry.external_data)
        pairs = {entry.key: entry.value for entry in tensor.external_data} | place
        del tensor.external_data[:]
        for key, value in pairs.items():
            if value:
                tensor.external_data.add(key=key, value=value)

    return change


def first(model: ModelProto, op_type: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(node for node in model.graph.node if node.op_type == op_type)
    return found


def renamed(op_type: str, to: str) -> Change:
    def change(model: ModelProto) -> None:
        first(model, op_type).op_type = to

    return change


def opset(version: int, domain: str = "") -> Change:
    def change(model: ModelProto) -> None:
        model.opset_import[0].version, model.opset_import[0].domain = version, domain

    return change


def made(op_type: str, *shape: int) -> Change:
    """A node more, which makes a tensor of a constant shape."""

    def change(model: ModelProto) -> None:
        shapes = helper.make_tensor("the_shape", TensorProto.INT64, [len(shape)], shape)
        inputs = (
            ["the_shape"] if op_type == "ConstantOfShape" else [model.graph.initializer[0].name, "the_shape"]
        )
        model.graph.initializer.append(shapes)
        model.graph.node.insert(0, helper.make_node(op_type, inputs, ["made"]))

    return change


def no_domain(model: ModelProto) -> None:
    del model.opset_import[:]


def future_format(model: ModelProto) -> None:
    model.ir_version = 99


def missing_attribute(model: ModelProto) -> None:
    del first(model, "Cast").attribute[:]


def attribute_of_another_type(model: ModelProto) -> None:
    attribute = first(model, "Cast").attribute[0]
    attribute.CopyFrom(helper.make_attribute(attribute.name, 1.5))


def too_few_inputs(model: ModelProto) -> None:
    del first(model, "Gather").input[1:]


def left_out(model: ModelProto) -> None:
    first(model, "Gather").input[0] = ""


def undefined(model: ModelProto) -> None:
    first(model, "Gather").input[0] = "nowhere"


def too_early(model: ModelProto) -> None:
    node = model.graph.node[0]
    model.graph.node.append(node)
    del model.graph.node[0]


def given_twice(model: ModelProto) -> None:
    model.graph.node[1].output[0] = model.graph.node[0].output[0]


def no_output(model: ModelProto) -> None:
    model.graph.output[0].name = "nowhere"


def function(model: ModelProto) -> None:
    model.functions.add(name="f", domain="")


def subgraph(model: ModelProto) -> None:
    first(model, "Cast").attribute.append(helper.make_attribute("body", model.graph))


def long_constant(model: ModelProto) -> None:
    tensor = next(entry for entry in model.graph.initializer if entry.raw_data)
    del tensor.dims[:]
    tensor.dims.extend([10**9])


def texts(model: ModelProto) -> None:
    model.graph.initializer.add(name="t", dims=[1], data_type=TensorProto.STRING, string_data=[b"x"])


def many_axes(model: ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("t", TensorProto.INT64, [1] * 17, [1]))


def long_name(model: ModelProto) -> None:
    model.graph.node[0].output.append("x" * 5000)


UNLISTED = "which the manifest does not list among the component's files"
DAMAGES: list[tuple[Change, str]] = [
    # Weights that are not the listed and hashed ones.
    (external(location="sub/weights.data"), UNLISTED),
    (external(location="../unet/model.onnx.data"), UNLISTED),
    (external(location="/etc/passwd"), UNLISTED),
    (external(location="*/_ORT_MEM_ADDR_/*"), UNLISTED),
    (external(location="model.onnx"), UNLISTED),
    (external(location=""), "does not say where the constant"),
    (external(offset=str(10**15)), "which has 1863313"),
    (external(offset="-1"), "'-1', not a number"),
    (external(offset="9" * 30), "not a number"),
    (external(length="1"), "has 1 at 0 of model.onnx.data"),
    (external(basepath="/"), "does not say where the constant"),
    # What ended OpenVINO with a crash, or kept it busy.
    (renamed("Cast", "Pad"), "a Pad has 1 inputs, not 2 to 4"),
    (renamed("LayerNormalization", "Pad"), "a Pad has"),
    (opset(2**40), f"its operator set ai.onnx is {2**40}, not 18 to {MAX_OPSET}"),
    (opset(17), "its operator set ai.onnx is 17"),
    (opset(-1), "its operator set ai.onnx is -1"),
    (opset(1, "com.example"), "the unknown domain 'com.example'"),
    (no_domain, "does not name each of its operator sets once"),
    (future_format, "its IR version is 99, not 8 to 13"),
    (renamed("Cast", "If"), "the unknown operator 'If'"),
    (renamed("Cast", "x\x1b[31m"), r"the unknown operator 'x\x1b[31m'"),
    (missing_attribute, "a Cast lacks its attribute to"),
    (attribute_of_another_type, "the attribute to of a Cast is of another type"),
    (too_few_inputs, "a Gather has 1 inputs, not 2 to 2"),
    (left_out, "a Gather has 1 inputs, not 2 to 2"),
    (undefined, "a Gather reads 'nowhere', which is not there"),
    (too_early, "which is not there"),
    (given_twice, "is given twice"),
    (no_output, "its output 'nowhere' is not there"),
    (function, "model has an unknown field, number 25"),
    (subgraph, "attribute has an unknown field, number 6"),
    (texts, "tensor has an unknown field, number 6"),
    (many_axes, "at most 16 axes"),
    (long_name, "a name has 5000 characters, the limit is 4096"),
    # Gigabytes out of a few bytes.
    (long_constant, "has other data than its shape [1000000000] needs"),
    (made("ConstantOfShape", 10**9), "at most 67108864 elements are allowed"),
    (made("Expand", 10**5, 10**5), "at most 67108864 elements are allowed"),
]


@pytest.mark.parametrize(
    ("change", "words"), DAMAGES, ids=[f"{index}-{words[:30]}" for index, (_, words) in enumerate(DAMAGES)]
)
def test_what_is_refused(change: Change, words: str) -> None:
    model = onnx.load_from_string(graph_of())
    change(model)
    assert words in refused(model.SerializeToString())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "its IR version is 0"),
        (b"\xff" * 20, "too large"),
        (b"\x08", "cut off"),
        (b"\x3a\xff\x01", "longer than its message"),
        (b"\x3b", "wire type 3"),
        (b"\x08\x0a\x08\x0a", "model.ir_version comes twice"),
        (b"\x0a\x01\x0a", "model.ir_version is of another type"),
        (b"\x12\x01\xff", "codec can't decode"),
        (graph_of().replace(b"node_", b"n\xffde_"), "codec can't decode"),
        (graph_of()[:-5], "cut off"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value,
)
def test_bytes_that_are_no_graph(content: bytes, words: str) -> None:
    assert words in refused(content)


def test_a_smaller_shape_may_be_made() -> None:
    model = onnx.load_from_string(graph_of())
    made("ConstantOfShape", 1000, 1000)(model)
    check(model.SerializeToString())


def test_damage_of_any_kind_is_an_error_of_ours() -> None:
    """The rest is for engine libraries: see ``test_first_load.py``."""
    outcomes = set()
    for seed in range(150):
        source = random.Random(seed)
        content = source.choice(MUTATIONS)(graph_of(), source)
        try:
            check(content)
            outcomes.add("passed")
        except BundleError:
            outcomes.add("refused")
    assert outcomes == {"passed", "refused"}
