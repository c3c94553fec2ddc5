"""Reading TensorRT's layer report, and following each attention to its kernel."""

from __future__ import annotations

from sdrt.export.engines.layers import (
    Layer,
    Tensor,
    check_attentions,
    layers_document,
    layers_from_inspector,
    layers_from_log,
    memory_from_log,
)

# As TensorRT for RTX 1.7.1 logs them, with fewer tensors.
REPORT = """Layers:
Name: __mye1_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: \
0, Metadata:{space}
Name: node_conv2d_myl0_2, LayerType: correlation, Inputs: [ { Name: conv2d.1_222_myl0, Dimensions: \
[-1,4,-1,-1], Strides: [-1,1,-1,4], StrideOrder: [3,0,2,1], Datatype: Half, Format: (NHWC) Channel major \
format }], Constants: [ { Name: __mye460196dconst_myl0, Dimensions: [320,4,3,3], Strides: [36,1,12,4], \
StrideOrder: [3,0,2,1], Datatype: Half, Format: (NHWC) Channel major format }], Outputs: [ { Name: \
__myln_k_arg__bb449659_223_myl0, Dimensions: [-1,320,-1,-1], Strides: [-1,1,-1,320], StrideOrder: \
[3,0,2,1], Datatype: Half, Format: (NHWC) Channel major format }], TacticName: __myelin_CASK_STUB, StreamId: \
0, Metadata: [ONNX Layer: node_conv2d]
Name: _gemm_mha_v2_myl0_34, LayerType: kgen, Inputs: [ { Name: q, Dimensions: [-1,-1,40], Strides: \
[40,-1,1], StrideOrder: [1,2,0], Datatype: Half, Format: (Arbitrary) Format with stride order = [1,2,0] }, { \
Name: k, Dimensions: [-1,40,-1], Strides: [40,1,-1], StrideOrder: [1,0,2], Datatype: Half, Format: \
(Arbitrary) Format with stride order = [1,0,2] }], Constants: [], Outputs: [ { Name: o, Dimensions: \
[-1,-1,40], Strides: [40,-1,1], StrideOrder: [1,2,0], Datatype: Half, Format: (Arbitrary) Format with stride \
order = [1,2,0] }], TacticName: _gemm_mha_v2_0xf2732f07152aef6866ef00a55db27e6f, StreamId: 0, Metadata: \
[ONNX Layer: node_sdpa]

I/O Tensors:
 Name: sample, IOMode: Input, DataType: Half, Dimensions: [-1,4,-1,-1], Location: Device
""".replace("{space}", " ")


def kernel(name: str, *nodes: str) -> Layer:
    return Layer(name, "kgen", (), (), name, nodes)


def test_the_builders_log_gives_every_layer() -> None:
    layers = layers_from_log(["Engine generation completed in 3 seconds.", REPORT, "Adding 1 engine(s)."])
    assert [layer.kind for layer in layers] == ["shape_call", "correlation", "kgen"]
    shape, convolution, attention = layers
    assert (shape.inputs, shape.outputs, shape.onnx_nodes) == ((), (), ())
    assert convolution.inputs == (Tensor("conv2d.1_222_myl0", (-1, 4, -1, -1), "Half"),)
    assert convolution.outputs[0].shape == (-1, 320, -1, -1)
    assert convolution.onnx_nodes == ("node_conv2d",)
    assert not convolution.fused_attention
    assert [tensor.name for tensor in attention.inputs] == ["q", "k"]
    assert attention.tactic.startswith("_gemm_mha_v2_0x")
    assert attention.fused_attention


def test_a_log_without_a_report_gives_none() -> None:
    assert layers_from_log(["Layers are fused", "Layer: x Host Persistent: 80 bytes"]) == []


def test_the_inspectors_json_gives_the_same_layers() -> None:
    report = {
        "Layers": [
            {
                "Name": "_gemm_mha_v2_myl0_34",
                "LayerType": "kgen",
                "Inputs": [{"Name": "q", "Dimensions": [-1, -1, 40], "Datatype": "Half"}],
                "Outputs": [],
                "TacticName": "_gemm_mha_v2_0xf2732f07152aef6866ef00a55db27e6f",
                "StreamId": 0,
                "Metadata": "[ONNX Layer: node_sdpa]\u001e[ONNX Layer: node_view]",
            },
            "a name alone, as without DETAILED verbosity",
        ]
    }
    (layer,) = layers_from_inspector(report)
    assert layer.fused_attention
    assert layer.inputs == (Tensor("q", (-1, -1, 40), "Half"),)
    assert layer.onnx_nodes == ("node_sdpa", "node_view")


def test_memory_is_read_from_the_log() -> None:
    log = ["Max Scratch Memory: 5 bytes", "Total Activation Memory: 1119298560 bytes"]
    assert memory_from_log([*log, "Total Weights Memory: 1718673280 bytes"]) == {
        "activation_bytes": 1119298560,
        "weights_bytes": 1718673280,
    }


def test_an_attention_is_fused_if_each_profile_has_a_kernel_for_it() -> None:
    layers = [kernel("_gemm_mha_v2_myl0_1", "a"), kernel("_gemm_mha_v2_myl1_1", "a", "other")]
    report = check_attentions(["a"], layers, profiles=2)
    assert (report.nodes, report.fused, report.decomposed) == (1, 1, ())


def test_an_attention_that_became_separate_kernels_is_named() -> None:
    layers = [
        kernel("_gemm_mha_v2_myl0_1", "a"),
        kernel("__fc33192_myl0_17", "b"),
        kernel("__myl_MaxrSubExpSumDiv_myl0_18", "b"),
        kernel("__fc33207_myl0_20", "b"),
    ]
    report = check_attentions(["a", "b"], layers, profiles=1)
    assert (report.nodes, report.fused, report.decomposed) == (2, 1, ("b",))
    # In one profile of two is not enough.
    assert check_attentions(["a"], layers, profiles=2).decomposed == ("a",)


def test_no_layers_prove_nothing() -> None:
    assert check_attentions(["a"], [], profiles=1).decomposed == ("a",)


def test_the_document_says_where_the_layers_come_from() -> None:
    document = layers_document(layers_from_log([REPORT]), "builder log", 1)
    assert (document["source"], document["profiles"], len(document["layers"])) == ("builder log", 1, 3)
    assert document["layers"][2]["onnx_nodes"] == ("node_sdpa",)
