"""What TensorRT made of a graph: its layers, and whether each attention is one fused kernel.

Without a GPU no engine can be opened, so the inspector cannot be asked. But at the end of a build TensorRT
logs the very report that the inspector would give (in its one-line format), and that is read here. It names
the ONNX nodes that each layer computes, so that every attention of the graph can be followed to its kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

HEADING: Final = "Layers:"
_LAYER: Final = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: \[(?P<inputs>.*?)\], "
    r"(?:Constants: \[(?P<constants>.*?)\], )?Outputs: \[(?P<outputs>.*)\], "
    r"[^\[\]]*TacticName: (?P<tactic>.*?), StreamId: (?P<stream>-?\d+), Metadata: ?(?P<metadata>.*)"
)
_TENSOR: Final = re.compile(r"\{ Name: (.*?), Dimensions: \[(.*?)\].*?Datatype: (\w+)")
_NODE: Final = re.compile(r"\[ONNX Layer: ([^\]\x1e]*)")
_MEMORY: Final = re.compile(r"Total (Activation|Weights) Memory: (\d+)")
# TensorRT's fused attention kernels: _gemm_mha_v2 of the Myelin compiler, fmha and its relatives elsewhere.
_FUSED: Final = re.compile(r"mha|attention", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A layer's input or output; −1 stands for a size that the profile leaves open."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an engine.

    Attributes:
        name: TensorRT's own.
        kind: TensorRT's LayerType, such as ``gemm``, ``kgen`` or ``correlation``.
        inputs: What it reads, weights left out.
        outputs: What it writes.
        tactic: The kernel that was chosen.
        onnx_nodes: The graph's nodes that it computes, wholly or in part.
    """

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    tactic: str
    onnx_nodes: tuple[str, ...]

    @property
    def fused_attention(self) -> bool:
        """Whether it is a whole attention: scores, softmax and weighted sum in one kernel."""
        return bool(_FUSED.search(self.name) or _FUSED.search(self.tactic))


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """The attentions of a graph: how many there are, and which do not run as one kernel in every profile."""

    nodes: int
    fused: int
    decomposed: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"nodes": self.nodes, "fused": self.fused, "decomposed": list(self.decomposed)}


def layers_from_log(messages: Iterable[str]) -> list[Layer]:
    """The layers that a build's log reports; none if it holds no such report.

    Args:
        messages: The builder's messages with the profiling verbosity at DETAILED, in any order.
    """
    return [
        _layer(match)
        for message in messages
        if message.startswith(HEADING)
        for line in message.splitlines()
        if (match := _LAYER.match(line.strip()))
    ]


def layers_from_inspector(report: Mapping[str, Any]) -> list[Layer]:
    """The layers of ``EngineInspector.get_engine_information`` in its JSON format."""
    return [
        Layer(
            name=str(entry.get("Name", "")),
            kind=str(entry.get("LayerType", "")),
            inputs=_inspected(entry.get("Inputs", ())),
            outputs=_inspected(entry.get("Outputs", ())),
            tactic=str(entry.get("TacticName", "")),
            onnx_nodes=tuple(_NODE.findall(str(entry.get("Metadata", "")))),
        )
        for entry in report.get("Layers", ())
        if isinstance(entry, dict)
    ]


def memory_from_log(messages: Iterable[str]) -> dict[str, int]:
    """``activation_bytes`` (scratch on the device) and ``weights_bytes``, as far as the log says."""
    return {
        f"{match[1].lower()}_bytes": int(match[2])
        for message in messages
        if (match := _MEMORY.search(message))
    }


def check_attentions(nodes: Sequence[str], layers: Sequence[Layer], profiles: int) -> AttentionReport:
    """Follow every attention node to its kernels.

    Args:
        nodes: Names of the graph's Attention nodes.
        layers: Of the engine; every profile has layers of its own.
        profiles: How many the engine has.
    """
    kernels = dict.fromkeys(nodes, 0)
    for layer in layers:
        if layer.fused_attention:
            for node in layer.onnx_nodes:
                if node in kernels:
                    kernels[node] += 1
    decomposed = tuple(node for node, count in kernels.items() if count < profiles)
    return AttentionReport(len(kernels), len(kernels) - len(decomposed), decomposed)


def layers_document(layers: Sequence[Layer], source: str, profiles: int) -> dict[str, Any]:
    """``layers.json``: where the layers come from, and all of them in the engine's order."""
    return {"source": source, "profiles": profiles, "layers": [asdict(layer) for layer in layers]}


def _layer(match: re.Match[str]) -> Layer:
    return Layer(
        name=match["name"],
        kind=match["type"],
        inputs=_tensors(match["inputs"]),
        outputs=_tensors(match["outputs"]),
        tactic=match["tactic"],
        onnx_nodes=tuple(_NODE.findall(match["metadata"])),
    )


def _tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(name, tuple(int(size) for size in shape.split(",") if size.strip()), dtype)
        for name, shape, dtype in _TENSOR.findall(text)
    )


def _inspected(entries: Iterable[Any]) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(
            str(entry.get("Name", "")),
            tuple(int(size) for size in entry.get("Dimensions", ())),
            str(entry.get("Datatype") or entry.get("Format/Datatype", "")),
        )
        for entry in entries
        if isinstance(entry, dict)
    )
