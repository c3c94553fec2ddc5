"""The passes in order, once for each engine that a graph is prepared for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import onnx_ir as ir

from sdrt.export.passes.attention import legalize_attention
from sdrt.export.passes.causal import recognise_causal_masks
from sdrt.export.passes.fp32_islands import insert_islands
from sdrt.export.passes.onnxruntime_cuda import to_onnxruntime_cuda
from sdrt.runtime.bundle.families.record import Precision


@dataclass(frozen=True, slots=True)
class PassReport:
    """What the passes did to one component.

    Attributes:
        component: Its name in the bundle.
        precision: Of its graph.
        nodes_before: How many nodes the graph had.
        nodes_after: How many it has now.
        attentions: Names of the attentions that are one node: as many fused kernels the engine must have.
        written_out: Name → why it has no fused kernel, of the other attentions.
        causal: How many constant triangular masks became the attention's own.
        islands: Tensors that are kept in fp32.
        casts: How many Casts that took.
        operators: How many nodes there are now of each operator that only the engine's library has.
    """

    component: str
    precision: Precision
    nodes_before: int
    nodes_after: int
    attentions: tuple[str, ...]
    written_out: dict[str, str] = field(default_factory=dict)
    causal: int = 0
    islands: tuple[str, ...] = ()
    casts: int = 0
    operators: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For a person: a summary, then a line for each attention that was written out and each island."""
        total = len(self.attentions) + len(self.written_out)
        summary = [f"{len(self.attentions)} of {total} attentions fused"] if total else []
        if self.causal:
            summary.append(f"{self.causal} causal masks recognised")
        if self.islands:
            summary.append(f"{len(self.islands)} tensors kept in fp32 ({self.casts} casts)")
        if self.operators:
            summary.append(", ".join(f"{count} {name}" for name, count in sorted(self.operators.items())))
        summary.append(f"{self.nodes_before} nodes, now {self.nodes_after}")
        return [
            f"{self.component} ({self.precision}): " + ", ".join(summary),
            *(f"  {name} written out: {why}" for name, why in self.written_out.items()),
            *(f"  {name} kept in fp32" for name in self.islands),
        ]


def prepare_for_tensorrt(
    model: ir.Model, component: str, precision: Precision, islands: Collection[str] = ()
) -> PassReport:
    """Make a graph, in place, that TensorRT and TensorRT for RTX build with every attention left in it fused.

    Args:
        model: A component's graph as the export wrote it.
        component: Its name, for the report.
        precision: Of the graph; strongly typed engines have that of their graph.
        islands: Names of tensors to keep in fp32: the manifest's ``ranges[component]["islands"]``.

    Raises:
        SdrtError: An attention that must be written out cannot be, or an island names no tensor.
    """
    before = model.graph.num_nodes()
    causal = recognise_causal_masks(model)
    attention = legalize_attention(model)
    island = insert_islands(model, islands)
    # An island that touches an attention writes it out.
    kept = tuple(name for name in attention.kept if name not in island.written_out)
    cause = "a tensor at it is kept in fp32"
    return PassReport(
        component,
        precision,
        before,
        model.graph.num_nodes(),
        kept,
        attention.written_out | dict.fromkeys(island.written_out, cause),
        causal,
        island.tensors,
        island.casts,
    )


def prepare_for_onnxruntime_cuda(model: ir.Model, component: str, precision: Precision) -> PassReport:
    """Put a graph, in place, into the dialect of ONNX Runtime's CUDA provider.

    Args:
        model: A component's graph as the export wrote it.
        component: Its name, for the report.
        precision: Of the graph.

    Raises:
        SdrtError: An attention uses what `MultiHeadAttention` lacks.
    """
    before = model.graph.num_nodes()
    dialect = to_onnxruntime_cuda(model)
    return PassReport(
        component,
        precision,
        before,
        model.graph.num_nodes(),
        dialect.attentions,
        causal=dialect.causal,
        operators=dialect.operators,
    )
