"""PyTorch module → ONNX graph, with the names and axes of the components table."""

from __future__ import annotations

import ast
import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sdrt.export.options import AxisRange
from sdrt.export.passes.group_norm import write_out_group_norms
from sdrt.export.passes.nodes import LAYER
from sdrt.runtime.bundle.families.record import ComponentSpec, Precision
from sdrt.runtime.errors import SdrtError

TORCH_DTYPES: Final[dict[Precision, torch.dtype]] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
_MODULE: Final = re.compile(r"model\.([\w.]+)")
_SCOPES: Final = "pkg.torch.onnx.name_scopes"  # the tracer's: the modules around a node, then its own name


def onnx_from_module(
    module: nn.Module,
    args: tuple[Tensor, ...],
    spec: ComponentSpec,
    axes: Mapping[str, AxisRange],
    opset: int,
) -> ir.Model:
    """Trace a module and write it as an ONNX graph.

    Args:
        module: A wrapper of `sdrt.export.graphs.networks`, already in the precision of the graph; its
            arguments have the names of the spec's inputs.
        args: Example inputs with the dtypes of the graph; on each dynamic axis a size of at least 2,
            since the tracer treats 1 as a constant.
        spec: Names and axes, resolved for the checkpoint.
        axes: The range of each dynamic axis.
        opset: ONNX opset, 18 … 23.

    Raises:
        SdrtError: The exporter failed, or its graph has other inputs or outputs than the spec.
    """
    shapes = _dynamic_shapes(spec, axes)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                kwargs={entry.name: tensor for entry, tensor in zip(spec.inputs, args, strict=True)},
                dynamo=True,
                opset_version=opset,
                input_names=[entry.name for entry in spec.inputs],
                output_names=[entry.name for entry in spec.outputs],
                dynamic_shapes=shapes,
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # torch.onnx and torch.export raise many unrelated types
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise SdrtError(f"the ONNX export of {spec.name} failed: {first.strip()}") from error
    if program is None:
        raise SdrtError(f"the ONNX export of {spec.name} gave no graph")
    model = program.model
    _name_axes(model, spec, axes)
    _note_layers(model)
    write_out_group_norms(model)
    return model


def _dynamic_shapes(spec: ComponentSpec, axes: Mapping[str, AxisRange]) -> dict[str, dict[int, Any]]:
    """For each input: axis → dimension. A range with a multiple is a derived dimension."""
    dims: dict[str, Any] = {}
    for name, extent in axes.items():
        if extent.fixed:
            continue
        low, high = extent.minimum // extent.multiple, extent.maximum // extent.multiple
        root = torch.export.Dim(f"{name}_units", min=low, max=high)
        dims[name] = extent.multiple * root if extent.multiple > 1 else root
    return {
        entry.name: {index: dims[axis] for index, axis in enumerate(entry.shape) if axis in dims}
        for entry in spec.inputs
    }


def _name_axes(model: ir.Model, spec: ComponentSpec, axes: Mapping[str, AxisRange]) -> None:
    """Write the spec's axes over the tracer's, so that a reader of the graph sees ``latent_height``."""
    for values, entries in (
        (model.graph.inputs, spec.inputs),
        (model.graph.outputs, spec.outputs),
    ):
        names = [value.name for value in values]
        if names != [entry.name for entry in entries]:
            raise SdrtError(f"the graph of {spec.name} has {names}, not the table's tensors")
        for value, entry in zip(values, entries, strict=True):
            value.shape = ir.Shape(
                axes[axis].minimum if isinstance(axis, str) and axis in axes and axes[axis].fixed else axis
                for axis in entry.shape
            )
            if value.dtype is None or value.dtype.numpy().name != entry.dtype:
                raise SdrtError(f"{spec.name}.{entry.name} is {value.dtype}, not {entry.dtype}")


def _note_layers(model: ir.Model) -> None:
    """Leave of the tracer's notes the layer of each node, so that a report can name it.

    Stack traces and source paths go: they name the exporting machine and cost megabytes.
    """
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        layer = _layer(node)
        node.metadata_props.clear()
        if layer:
            node.metadata_props[LAYER] = layer
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None


def _layer(node: ir.Node) -> str:
    """The path of the innermost module, as the checkpoint's tensors begin; empty where the tracer lost it."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    # The wrappers of `sdrt.export.graphs.networks` hold the network as `model`; what is about sizes is in no
    # module.
    found = _MODULE.fullmatch(str(scopes[-2])) if len(scopes) > 1 else None
    return found[1] if found else ""


def save_graph(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """Write ``model.onnx`` and, beside it, ``model.onnx.data`` with the weights; return both paths."""
    data = path.with_name(path.name + ".data")
    ir.save(model, path, external_data=data.name)
    return tuple(file for file in (path, data) if file.exists())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own progress and deprecation chatter off the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
