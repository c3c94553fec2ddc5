"""Which initializer of a finished graph holds which tensor of the checkpoint, read off the graph itself.

The exporter keeps the name of most tensors, as ``model.`` and their path. Where it turns a weight round for a
MatMul it makes a new name (``val_66``): then the layer of the node that reads it says whose it is. Whatever
the way, an initializer counts only if it holds the tensor's numbers.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.weights import checkpoint_tensors
from sdrt.export.passes.nodes import LAYER
from sdrt.export.passes.weight_storage import STORED
from sdrt.runtime.bundle.weight_map import (
    CONSTANT_FOLDING,
    SHARED,
    WEIGHT_STORAGE,
    CheckpointTensor,
    Holder,
    WeightMap,
)

NOT_READ: Final = "no component reads it"
SPARE: Final = "no part of the network"
_PREFIX: Final = "model."  # the wrappers hold the network as `model`
_FLOATS: Final = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

Permutation = tuple[int, ...]


class _Initializer(NamedTuple):
    """An initializer, its numbers as float32, and who reads it, at once or behind a Cast."""

    value: ir.Value
    numbers: Tensor
    readers: tuple[tuple[ir.Node, int], ...]

    @property
    def name(self) -> str:
        return str(self.value.name)

    @property
    def tensor_name(self) -> str:
        """The tensor that it is named after; empty where the exporter made the name."""
        name = self.name.removesuffix(STORED)
        return name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else ""

    @property
    def turned(self) -> bool:
        """Whether a MatMul reads it as its second matrix, so that a Linear layer's weight is transposed."""
        return any(node.op_type == "MatMul" and index == 1 for node, index in self.readers)


def holders_of(model: ir.Model, module: nn.Module, component: str) -> dict[str, Holder]:
    """For each of a network's tensors that is in the graph, the initializer that holds it.

    Args:
        model: The finished graph.
        module: The wrapped network that it was traced from, in the same precision.
        component: Its name in the bundle.
    """
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in module.state_dict().items()}
    initializers = list(_initializers(model))
    found: dict[str, tuple[_Initializer, Permutation]] = {}
    for candidates in (_by_name, _by_layer, _left_over):
        claimed = {initializer.name for initializer, _ in found.values()}
        for name in tensors.keys() - found.keys():
            for initializer in candidates(initializers, name, claimed):
                permutation = _permutation(initializer, tensors[name])
                if permutation is not None:
                    found[name] = (initializer, permutation)
                    break
    counts = Counter(initializer.name for initializer, _ in found.values())
    return {
        name: _holder(component, initializer, permutation, shared=counts[initializer.name] > 1)
        for name, (initializer, permutation) in found.items()
    }


def _initializers(model: ir.Model) -> Iterator[_Initializer]:
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype not in _FLOATS:
            continue
        uses = [(use.node, use.idx) for use in value.uses()]
        casts = [node for node, _ in uses if node.op_type == "Cast"]
        behind = [(use.node, use.idx) for node in casts for use in node.outputs[0].uses()]
        yield _Initializer(value, _numbers(tensor), (*uses, *behind))


def _numbers(tensor: ir.TensorProtocol) -> Tensor:
    array = tensor.numpy()
    if tensor.dtype == ir.DataType.BFLOAT16:  # PyTorch does not know NumPy's extension of the name
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array) if array.flags.writeable else torch.from_numpy(array.copy())


def _by_name(initializers: Iterable[_Initializer], name: str, _: Container[str]) -> Iterable[_Initializer]:
    return (entry for entry in initializers if entry.tensor_name == name)


def _by_layer(initializers: Iterable[_Initializer], name: str, _: Container[str]) -> Iterable[_Initializer]:
    """Those that the tensor's own layer reads, first those that are no other tensor's by name."""
    layer = name.rpartition(".")[0]
    reads = [
        entry
        for entry in initializers
        if any(node.metadata_props.get(LAYER) == layer for node, _ in entry.readers)
    ]
    return sorted(reads, key=lambda entry: bool(entry.tensor_name))


def _left_over(
    initializers: Iterable[_Initializer], _: str, claimed: Container[str]
) -> Iterable[_Initializer]:
    """Those that are nobody's so far: what was looked up in a table whole is in no layer any more."""
    return (entry for entry in initializers if entry.name not in claimed)


def _permutation(initializer: _Initializer, tensor: Tensor) -> Permutation | None:
    """How the tensor's axes stand in the initializer, if that holds its numbers."""
    if not tensor.is_floating_point():
        return None
    numbers = initializer.numbers
    if numbers.ndim > tensor.ndim:
        numbers = numbers.squeeze()
    if sorted(numbers.shape) != sorted(tensor.shape):
        return None
    orders: Iterable[Permutation] = itertools.permutations(range(tensor.ndim))
    if initializer.turned and not initializer.tensor_name:  # of a square weight of zeros either would do
        orders = sorted(orders, reverse=True)
    for order in orders:
        moved = tensor.permute(order)
        if moved.shape == numbers.shape and torch.equal(moved.float(), numbers.float()):
            return order
    return None


def _holder(component: str, initializer: _Initializer, permutation: Permutation, *, shared: bool) -> Holder:
    stored = initializer.name.endswith(STORED)
    passes = {
        CONSTANT_FOLDING: not initializer.tensor_name,
        WEIGHT_STORAGE: stored,
        SHARED: shared,
    }
    tensor = initializer.value.const_value
    assert tensor is not None
    return Holder(
        component,
        initializer.name,
        tensor.dtype.numpy().name,
        tuple(initializer.numbers.shape),
        permutation,
        tuple(name for name, happened in passes.items() if happened),
    )


def weight_map(checkpoint: Checkpoint, holders: Mapping[str, Mapping[str, Holder]]) -> WeightMap:
    """The map of a whole checkpoint.

    Args:
        checkpoint: Gives the names of the tensors.
        holders: For each component what `holders_of` found.
    """
    folders: dict[str, dict[str, CheckpointTensor]] = {}
    of = {component: checkpoint.kind.network_of(component).folder for component in holders}
    for folder in dict.fromkeys(of.values()):
        parts = [found for component, found in holders.items() if of[component] == folder]
        tensors = folders[folder] = {}
        for name, (dtype, shape, known) in checkpoint_tensors(checkpoint, folder).items():
            held = tuple(part[known] for part in parts if known in part)
            absent = "" if held else SPARE if not known else NOT_READ
            tensors[name] = CheckpointTensor(dtype, shape, held, absent)
    return WeightMap(folders)
