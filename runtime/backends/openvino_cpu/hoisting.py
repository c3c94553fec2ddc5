"""What of a graph on OpenVINO need not be computed at every call: cut out into models of its own.

Of a U-Net's inputs only the latents change in every way at every step. The keys and values of its
cross-attention depend on the text embeddings alone, which stay the same for a whole picture; the projections
of the time embedding depend on the timestep alone (and in SDXL on numbers that stay the same), of which every
picture has the same few. `hoist` cuts both out; the caller evaluates them when their inputs have changed, and
gives the results to what is left. The numbers are those of the whole graph: the same operations on the same
data. (In a graph of fp16 that is computed in float32, what is cut is rounded to fp16, as the graph says.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

# Operations that move numbers, or look at them in another shape: they are cheaper to do again than to keep
# apart, and stay with what reads them, which may fuse them.
MOVES: Final = frozenset(
    {
        "Broadcast",
        "Concat",
        "Convert",
        "Reshape",
        "Slice",
        "Squeeze",
        "StridedSlice",
        "Transpose",
        "Unsqueeze",
    }
)


class Hoisted(NamedTuple):
    """A part that was cut out of a model.

    Attributes:
        model: An ``openvino.Model`` with the inputs of these names and one result for each of ``results``.
        inputs: What it reads.
        results: The names of the inputs that stand in the rest for the model's results, in their order.
    """

    model: Any
    inputs: tuple[str, ...]
    results: tuple[str, ...]


def hoist(ov: Any, model: Any, groups: Sequence[frozenset[str]]) -> list[Hoisted]:
    """Cut out what depends on some inputs alone. ``model`` is changed to the rest.

    Args:
        ov: The module openvino.
        model: An ``openvino.Model`` whose shapes are static: arithmetic on shapes is folded first.
        groups: Names of inputs; one part is cut out for each group that has something worth it. No input
            is in two groups.

    Returns:
        The parts; their results are inputs of ``model`` now.
    """
    _fold_constants(model)
    depends = _dependencies(model)
    return [part for group in groups if (part := _cut(ov, model, group, depends)) is not None]


def _fold_constants(model: Any) -> None:
    from openvino.passes import ConstantFolding, Manager

    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)


def input_name(parameter: Any) -> str:
    """The name of an input of a model, as its ONNX graph has it."""
    return str(parameter.get_friendly_name())


def _dependencies(model: Any) -> dict[str, frozenset[str]]:
    """For every node, by its unique name, the inputs of the model that it depends on."""
    found: dict[str, frozenset[str]] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Parameter":
            found[node.get_name()] = frozenset({input_name(node)})
        else:
            sources = (found[value.get_node().get_name()] for value in node.input_values())
            found[node.get_name()] = frozenset().union(*sources)
    return found


def _cut(ov: Any, model: Any, group: frozenset[str], depends: Mapping[str, frozenset[str]]) -> Hoisted | None:
    inside = {name for name, inputs in depends.items() if inputs and inputs <= group}
    values = _frontier(model, inside)
    if not values:
        return None
    parameters = [node for node in model.get_parameters() if input_name(node) in group]
    results = [ov.opset13.result(value) for value in values]
    # A copy: the rest may go on to read the same inputs.
    part = ov.Model(results, parameters, "hoisted").clone()
    stands_for = []
    for index, (value, result) in enumerate(zip(values, results, strict=True)):
        name = f"{'+'.join(sorted(group))}.{index}"
        parameter = ov.opset13.parameter(value.get_partial_shape(), value.get_element_type(), name=name)
        parameter.output(0).set_names({name})
        for target in list(value.get_target_inputs()):
            if target.get_node().get_name() != result.get_name():
                target.replace_source_output(parameter.output(0))
        stands_for.append(parameter)
    model.add_parameters(stands_for)
    _remove_unread(model, parameters)
    model.validate_nodes_and_infer_types()
    names = tuple(input_name(node) for node in part.get_parameters())
    return Hoisted(part, names, tuple(input_name(node) for node in stands_for))


def _frontier(model: Any, inside: set[str]) -> list[Any]:
    """The last values inside that something outside reads, of operations that do more than move numbers."""
    found: dict[tuple[str, int], Any] = {}
    for node in model.get_ordered_ops():
        if node.get_name() not in inside:
            continue
        for value in node.outputs():
            readers = (target.get_node().get_name() for target in value.get_target_inputs())
            if any(reader not in inside for reader in readers):
                for source in _before_moves(value, inside):
                    found[source.get_node().get_name(), source.get_index()] = source
    return list(found.values())


def _before_moves(value: Any, inside: set[str]) -> Iterable[Any]:
    node = value.get_node()
    if node.get_type_name() == "Parameter":
        return
    if node.get_type_name() not in MOVES:
        yield value
        return
    for source in node.input_values():
        if source.get_node().get_name() in inside:
            yield from _before_moves(source, inside)


def _remove_unread(model: Any, parameters: Iterable[Any]) -> None:
    read = {
        value.get_node().get_name()
        for node in model.get_ordered_ops()
        if node.get_type_name() != "Parameter"
        for value in node.input_values()
    }
    for parameter in parameters:
        if parameter.get_name() not in read:
            model.remove_parameter(parameter)
