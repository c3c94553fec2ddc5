"""Runs an onnx_ir graph as it stands on ONNX Runtime's CPU provider, for tests of the passes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

from sdrt.export.graphs.from_module import save_graph


def text_inputs(ids: NDArray[np.int64], width: int, dtype: str = "float32") -> dict[str, NDArray[Any]]:
    """A text encoder's inputs [batch, tokens] and the rest, without embeddings of one's own."""
    return {
        "input_ids": ids,
        "custom_embeddings": np.zeros((*ids.shape, width), dtype),
        "clip_skip": np.zeros(1, np.int64),
    }


def run(model: ir.Model, feeds: Mapping[str, NDArray[Any]], folder: Path) -> list[NDArray[Any]]:
    """Save, check and run a model without ONNX Runtime's own graph changes; all outputs in order."""
    path = save_graph(model, folder / "model.onnx")[0]
    onnx.checker.check_model(str(path))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [np.asarray(result) for result in session.run(None, dict(feeds))]


def load(path: Path) -> ir.Model:
    """A graph with its weights in memory."""
    model: ir.Model = ir.load(path)
    ir.external_data.load_to_model(model)
    return model


def with_weights(file: Path, weights: Mapping[str, NDArray[Any]], target: Path) -> Path:
    """Save a graph that has these initializers from the beginning; gives the target back."""
    graph = onnx.load(file)
    for tensor in graph.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    values = [value for value in graph.graph.value_info if value.name not in weights]
    del graph.graph.value_info[:]
    graph.graph.value_info.extend(values)
    onnx.save(graph, target)
    return target


def builds(trt: Any, logger: Any, model: ir.Model) -> bool:
    """Whether TensorRT, or TensorRT for RTX, builds an engine of a graph."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(ir.to_proto(model).SerializeToString()):
        return False
    return builder.build_serialized_network(network, builder.create_builder_config()) is not None
