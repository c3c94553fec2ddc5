"""Range audit: how large every tensor of a graph becomes, against the largest number that fp16 holds.

A calibration run of the graph with float32 arithmetic, so that a tensor which would overflow shows by how
much. The weights stay as they are on disk and are widened one at a time where they are used; of each tensor
only three scalars leave the run. Attentions are written out, so that their logits are seen too.

SD 1.5's full-size U-Net in fp16: 2.9 GB on latents of 64 × 64, 2.1 GB on 32 × 32, of which the mapped weights
are 1.7; little more than the time of one evaluation in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sdrt.export.passes.attention import MASKED, attentions, why_not_fused, write_out_all
from sdrt.export.passes.group_norm import write_out_group_norms
from sdrt.export.passes.nodes import LAYER
from sdrt.export.passes.widen import LOW_PRECISION, widen
from sdrt.runtime.errors import SdrtError

FP16_LARGEST: Final = 65504.0
# How far below the limit a tensor must stay to be called safe. A calibration run sees few prompts, timesteps
# and sizes. For tensors of Gaussian tails the largest of 10^12 values (a year of pictures) is 1.45 times that
# of 10^6 (one run); what is left of 4, a factor of 2.8, is for prompts and timesteps of other magnitudes.
MARGIN: Final = 4.0
WORST: Final = 20
# What leaves the run of each tensor. ONNX Runtime's two ends pass over NaN; the sum of magnitudes does not.
REDUCTIONS: Final = ("ReduceMax", "ReduceMin", "ReduceL1")
_HALF: Final = ir.DataType.FLOAT16


@dataclass(frozen=True, slots=True)
class TensorRange:
    """One tensor of the calibration run.

    Attributes:
        tensor: Its name in the graph; what is inside an attention is named after the attention's output.
        op: The operator that makes it, or "input".
        largest: Largest magnitude over all runs; NaN or infinity where one was seen.
        stored: Whether a kernel writes it; the logits of a fused attention never leave their kernel's fp32
            accumulators.
        layer: Path of the module that makes it, as the checkpoint's tensors begin; empty where the graph does
            not say it.
    """

    tensor: str
    op: str
    largest: float
    stored: bool
    layer: str = ""

    @property
    def where(self) -> str:
        """For a person: the layer, the tensor's name in the graph, and the operator that makes it."""
        place = f"{self.tensor} ({self.op})"
        return f"{self.layer}, {place}" if self.layer else place

    def rank(self) -> float:
        """For an order by magnitude: NaN is the largest."""
        return math.inf if math.isnan(self.largest) else self.largest


@dataclass(frozen=True, slots=True)
class RangeAudit:
    """The result of a calibration.

    Attributes:
        precision: Of the graph that was audited.
        runs: How many sets of inputs it ran on.
        ranges: Every tensor of that precision, in the order of the graph.
    """

    precision: str
    runs: int
    ranges: tuple[TensorRange, ...]

    @property
    def over(self) -> tuple[TensorRange, ...]:
        """Tensors that fp16 does not hold; NaN counts."""
        return tuple(entry for entry in self.ranges if entry.stored and not entry.largest <= FP16_LARGEST)

    @property
    def near(self) -> tuple[TensorRange, ...]:
        """Tensors that fp16 holds, but with less than `MARGIN` to spare."""
        return tuple(
            entry
            for entry in self.ranges
            if entry.stored and FP16_LARGEST / MARGIN < entry.largest <= FP16_LARGEST
        )

    @property
    def not_finite(self) -> TensorRange | None:
        """The first tensor in the order of the graph that was NaN or infinite even in float32."""
        return next((entry for entry in self.ranges if not math.isfinite(entry.largest)), None)

    @property
    def islands(self) -> tuple[str, ...]:
        """Names of the tensors that an fp16 graph should keep in fp32: those over the limit, those near.

        Inside of an attention that GPUs fuse only those over it: there the accumulators are fp32, but on the
        CPU ONNX Runtime rounds its logits to fp16.
        """
        if self.precision != "fp16":
            return ()
        safe, limit = FP16_LARGEST / MARGIN, FP16_LARGEST
        return tuple(
            entry.tensor for entry in self.ranges if not entry.largest <= (safe if entry.stored else limit)
        )

    def worst(self, count: int = WORST) -> tuple[TensorRange, ...]:
        """The ``count`` largest, NaN first."""
        return tuple(sorted(self.ranges, key=TensorRange.rank, reverse=True)[:count])

    def to_dict(self) -> dict[str, Any]:
        """For the manifest: a summary, the `WORST` largest, the islands. JSON has no infinity: it is null."""
        first = self.not_finite
        return {
            "limit": FP16_LARGEST,
            "margin": MARGIN,
            "precision": self.precision,
            "runs": self.runs,
            "tensors": len(self.ranges),
            "over": len(self.over),
            "near": len(self.near),
            "not_finite": None if first is None else first.tensor,
            "worst": [
                {
                    "tensor": entry.tensor,
                    "op": entry.op,
                    "layer": entry.layer,
                    "largest": float(f"{entry.largest:.4g}") if math.isfinite(entry.largest) else None,
                    "stored": entry.stored,
                }
                for entry in self.worst()
            ],
            "islands": list(self.islands),
        }

    def lines(self, count: int = 5) -> list[str]:
        """For a person: one line of summary, one for a NaN, then the ``count`` largest."""
        text = [
            f"ranges: {len(self.ranges)} tensors, {len(self.over)} over fp16's {FP16_LARGEST:,.0f}, "
            f"{len(self.near)} within a factor of {MARGIN:g} of it"
        ]
        if first := self.not_finite:
            text.append(f"  NaN or infinity first in {first.where}")
        for entry in self.worst(count):
            inside = "" if entry.stored else "  (inside a fused attention)"
            text.append(f"  {entry.largest:12,.1f}  {entry.where}{inside}")
        return text


def audit_ranges(
    model_path: Path, feeds: Sequence[Mapping[str, NDArray[Any]]], *, threads: int | None = None
) -> RangeAudit:
    """Run a saved graph in float32 and record how large each of its tensors becomes.

    Args:
        model_path: ``model.onnx``; its external data is read in place.
        feeds: One or more sets of inputs by name, of the graph's shapes; floats of any precision.
        threads: ONNX Runtime's threads; None leaves them to it.

    Raises:
        SdrtError: No inputs were given, or ONNX Runtime cannot run the graph.
    """
    if not feeds:
        raise SdrtError("a range audit needs at least one set of inputs")
    model: ir.Model = ir.load(model_path)
    precision = _precision(model)
    layers = {
        str(output.name): node.metadata_props.get(LAYER, "")
        for node in model.graph
        for output in node.outputs
    }
    inside = {str(node.outputs[0].name) for node in attentions(model) if not why_not_fused(node)}
    write_out_all(model)
    makers = _measured(model, precision)
    widened = {str(value.name) for value in model.graph.inputs if value.dtype in LOW_PRECISION}
    widen(model, LOW_PRECISION, in_run=True)
    write_out_group_norms(model)
    _measure(model, list(makers))
    largest = np.zeros(len(makers))
    session = _session(model, model_path.parent, threads)
    for feed in feeds:
        inputs = {
            name: array.astype(np.float32) if name in widened else array for name, array in feed.items()
        }
        largest = np.maximum(largest, _run(session, inputs))  # NaN stays
    return RangeAudit(
        precision,
        len(feeds),
        tuple(
            TensorRange(name, op, float(size), not _is_inside(name, inside), _layer(name, layers))
            for (name, op), size in zip(makers.items(), largest, strict=True)
        ),
    )


def _precision(model: ir.Model) -> str:
    """fp16 or bf16 if any tensor of the graph has that type."""
    types = {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    types |= {output.dtype for node in model.graph.all_nodes() for output in node.outputs}
    return "fp16" if _HALF in types else "bf16" if ir.DataType.BFLOAT16 in types else "fp32"


def _measured(model: ir.Model, precision: str) -> dict[str, str]:
    """Name → operator of each input and node output of the graph's precision, in order.

    Not of what a low-precision graph keeps in float32 anyway, nor of masked logits with their −∞.
    """
    types = (ir.DataType.FLOAT,) if precision == "fp32" else LOW_PRECISION
    makers = [(value, "input") for value in model.graph.inputs]
    makers += [(output, node.op_type) for node in model.graph for output in node.outputs]
    return {
        value.name: op
        for value, op in makers
        if value.dtype in types and value.name and MASKED not in value.name
    }


def _is_inside(name: str, fused: Iterable[str]) -> bool:
    return any(name.startswith(f"{output}.") for output in fused)


def _layer(name: str, layers: Mapping[str, str]) -> str:
    """That of a tensor; of one inside an attention, whose name goes on from the attention's, that one's."""
    while name not in layers and "." in name:
        name = name.rpartition(".")[0]
    return layers.get(name, "")


def _measure(model: ir.Model, tensors: Iterable[str]) -> None:
    """Give the graph the `REDUCTIONS` of each tensor as its only outputs."""
    graph = model.graph
    graph.outputs.clear()
    values = {value.name: value for value in (*graph.inputs, *(o for node in graph for o in node.outputs))}
    for index, value in enumerate(values[name] for name in tensors):
        nodes = [ir.node(op, [value], {"keepdims": 0}, name=f"audit.{index}.{op}") for op in REDUCTIONS]
        producer = value.producer()
        if producer is None:
            graph.insert_before(graph[0], nodes)
        else:
            graph.insert_after(producer, nodes)
        for node in nodes:
            output = node.outputs[0]
            output.name, output.shape = node.name, ir.Shape(())
            output.type = ir.TensorType(ir.DataType.FLOAT)
            graph.outputs.append(output)


def _session(model: ir.Model, folder: Path, threads: int | None) -> Any:
    """A session that keeps nothing twice: no folded or packed copies of weights, no arena."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # In the order of the graph: the default order runs all the reductions last, with every activation alive.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder.resolve())
    )
    try:
        return onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime raises types of its own that share no base
        raise SdrtError(f"the range audit cannot load {folder.name}: {error}") from error


def _run(session: Any, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """One calibration run: the largest magnitude of each tensor, NaN where it holds one."""
    try:
        results = np.array([float(scalar) for scalar in session.run(None, dict(inputs))])
    except Exception as error:  # as above
        raise SdrtError(f"the range audit's run failed: {error}") from error
    highest, lowest, total = results.reshape(-1, len(REDUCTIONS)).T
    return np.where(np.isnan(total), np.nan, np.maximum(np.abs(highest), np.abs(lowest)))
