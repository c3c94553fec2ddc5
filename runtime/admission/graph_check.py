"""A bundle's graph, checked before an engine library reads it.

Engine libraries are made for graphs of friends: a missing input ends one of them with a crash, an operator
set of the far future with a loop, and weights are read from wherever the graph says. What is checked here is
what can be seen without them: structure, names, operators with their inputs and attributes, and the sizes and
places of constants. The graph is read from its bytes, without the package onnx.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, Final

from sdrt.runtime.admission.graph_messages import ATTRIBUTE_TYPES, ELEMENT_TYPES, EXTERNAL, MESSAGES
from sdrt.runtime.admission.graph_operators import DOMAINS, Operator, find_operator
from sdrt.runtime.admission.wire_format import parse
from sdrt.runtime.bundle.limits import (
    MAX_CONSTANT_ELEMENTS,
    MAX_DIMENSION,
    MAX_NAME_BYTES,
    MAX_NODES,
    MAX_RANK,
    MAX_TENSORS,
)
from sdrt.runtime.errors import BundleError

IR_VERSIONS: Final = range(8, 14)  # of ONNX 1.12 to 1.19; 10 is what is exported
Message = dict[str, Any]
_DATA: Final = tuple(dict.fromkeys(typed for _, _, typed in ELEMENT_TYPES.values()))
_PLACE: Final = frozenset({"location", "offset", "length", "checksum"})


def check_graph_file(content: bytes, where: str, files: Mapping[str, int]) -> None:
    """Refuse what is no graph of a bundle.

    Args:
        content: The ONNX file's bytes.
        where: Names it in messages.
        files: Path from the graph's folder → bytes of every file that its constants may lie in.

    Raises:
        BundleError: It is damaged, or has what no graph of a bundle has; the message says what.
    """
    try:
        model = parse(memoryview(content), "model", MESSAGES)
        _check_model(model)
        graph = model.get("graph", {})
        for tensor in _tensors(graph):
            _check_tensor(tensor, files)
        _check_names(graph)
        domains = {entry.get("domain", "") for entry in model["opset_import"]}
        shapes = _shapes(graph)
        for node in graph.get("node", []):
            _check_node(node, domains)
            _check_made(node, shapes)
    except ValueError as error:  # also for what is not UTF-8
        raise BundleError(
            f"{where} is no graph that sdrt reads: {error}; remove the bundle, or export it again"
        ) from None


def _check_model(model: Message) -> None:
    version = model.get("ir_version", 0)
    if version not in IR_VERSIONS:
        raise ValueError(f"its IR version is {version}, not {_span(IR_VERSIONS)}")
    opsets = [(entry.get("domain", ""), entry.get("version", 0)) for entry in model.get("opset_import", [])]
    domains = [domain for domain, _ in opsets]
    if not domains or len(set(domains)) < len(domains) or {"", "ai.onnx"} <= set(domains):
        raise ValueError("it does not name each of its operator sets once")
    for domain, opset in opsets:
        if domain not in DOMAINS:
            raise ValueError(f"it has operators of the unknown domain {domain[:60]!r}")
        if opset not in DOMAINS[domain]:
            known = _span(DOMAINS[domain])
            raise ValueError(f"its operator set {domain or 'ai.onnx'} is {opset}, not {known}")
    graph = model.get("graph")
    if graph is None:
        raise ValueError("it holds no graph")
    counts = {"node": MAX_NODES, "initializer": MAX_TENSORS, "value_info": MAX_TENSORS}
    for name, most in counts.items():
        if len(graph.get(name, [])) > most:
            raise ValueError(f"it has {len(graph[name])} entries of {name}, the limit is {most}")
    for value in (*graph.get("input", []), *graph.get("output", []), *graph.get("value_info", [])):
        _check_value(value)


def _check_value(value: Message) -> None:
    name, kind = _name(value.get("name", "")), value.get("type", {}).get("tensor_type", {})
    if kind and kind.get("elem_type") not in ELEMENT_TYPES:
        raise ValueError(f"{name!r} has the unknown element type {kind.get('elem_type')}")
    axes = kind.get("shape", {}).get("dim", [])
    _check_shape(name, [axis.get("dim_value", 0) for axis in axes])


def _check_shape(name: str, shape: list[int]) -> None:
    if len(shape) > MAX_RANK or not all(0 <= size <= MAX_DIMENSION for size in shape):
        raise ValueError(
            f"{name!r} has the shape {str(shape)[:60]}: at most {MAX_RANK} axes of 0 to {MAX_DIMENSION}"
        )


def _tensors(graph: Message) -> Iterator[Message]:
    """Initializers and the values of attributes."""
    yield from graph.get("initializer", [])
    for node in graph.get("node", []):
        yield from (entry["t"] for entry in node.get("attribute", []) if "t" in entry)


def _check_tensor(tensor: Message, files: Mapping[str, int]) -> None:
    """Its data must be as long as its shape says, here or in a file of the component."""
    name, shape = tensor.get("name", "")[:100], tensor.get("dims", [])
    _check_shape(name, shape)
    if tensor.get("data_type") not in ELEMENT_TYPES:
        raise ValueError(f"the constant {name!r} has the unknown element type {tensor.get('data_type')}")
    _, width, typed = ELEMENT_TYPES[tensor["data_type"]]
    count = math.prod(shape)
    if tensor.get("data_location", 0) == EXTERNAL:
        if tensor.keys() & {*_DATA, "raw_data"}:
            raise ValueError(f"the constant {name!r} lies in a file and in the graph, too")
        _check_place(name, tensor.get("external_data", []), count * width, files)
        return
    if "external_data" in tensor or tensor.get("data_location", 0):
        raise ValueError(f"it does not say where the constant {name!r} lies")
    held = {key: len(tensor[key]) for key in (*_DATA, "raw_data") if key in tensor}
    wanted = {"raw_data": count * width} if "raw_data" in tensor else {typed: count}
    if held != wanted and (held or count):
        raise ValueError(f"the constant {name!r} has other data than its shape {str(shape)[:60]} needs")


def _check_place(name: str, pairs: list[Message], size: int, files: Mapping[str, int]) -> None:
    place = {entry.get("key", ""): entry.get("value", "") for entry in pairs}
    if len(place) < len(pairs) or not place.keys() <= _PLACE or "location" not in place:
        raise ValueError(f"it does not say where the constant {name!r} lies")
    location = place["location"]
    if location not in files:
        raise ValueError(
            f"the constant {name!r} lies in {location[:100]!r}, which the manifest does not list among the "
            "component's files"
        )
    offset, length = _number(name, place.get("offset", "0")), _number(name, place.get("length", str(size)))
    if length != size or offset + size > files[location]:
        raise ValueError(
            f"the constant {name!r} of {size} bytes has {length} at {offset} of {location}, which has "
            f"{files[location]}"
        )


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"the place of the constant {name!r} is {text[:40]!r}, not a number")
    return int(text)


def _check_names(graph: Message) -> None:
    """Each name is given once, and before it is used (static single assignment)."""
    defined: set[str] = set()

    def define(name: str) -> None:
        if not name or name in defined:
            raise ValueError(f"the name {_name(name)!r} is given twice, or is empty")
        defined.add(_name(name))

    for value in (*graph.get("input", []), *graph.get("initializer", [])):
        define(value.get("name", ""))
    for node in graph.get("node", []):
        for name in node.get("input", []):
            if name and name not in defined:
                raise ValueError(f"a {node.get('op_type', '')[:60]} reads {name[:100]!r}, which is not there")
        for name in filter(None, node.get("output", [])):
            define(name)
    for value in graph.get("output", []):
        if value.get("name", "") not in defined:
            raise ValueError(f"its output {value.get('name', '')[:100]!r} is not there")


def _shapes(graph: Message) -> dict[str, list[int]]:
    """Constants of whole numbers that stand in the graph itself, by name: shapes are among them."""
    named = [(tensor.get("name", ""), tensor) for tensor in graph.get("initializer", [])]
    for node in graph.get("node", []):
        if node.get("op_type") == "Constant" and len(node.get("output", [])) == 1:
            named += [(node["output"][0], entry["t"]) for entry in node.get("attribute", []) if "t" in entry]
    values = {}
    for name, tensor in named:
        kind, width, typed = ELEMENT_TYPES[tensor["data_type"]]
        if kind in ("int64", "int32") and tensor.get("data_location", 0) != EXTERNAL:
            raw = tensor.get("raw_data")
            values[name] = (
                list(tensor.get(typed, []))
                if raw is None
                else [
                    int.from_bytes(raw[at : at + width], "little", signed=True)
                    for at in range(0, min(len(raw), MAX_RANK * width), width)
                ]
            )
    return values


def _check_node(node: Message, domains: set[str]) -> None:
    op_type, domain = node.get("op_type", ""), node.get("domain", "")
    operator = find_operator(domain, op_type)
    if operator is None or domain not in domains or node.get("overload"):
        raise ValueError(f"it has the unknown operator {f'{domain}.{op_type}'.lstrip('.')[:60]!r}")
    inputs, outputs = node.get("input", []), node.get("output", [])
    for what, names, (low, high) in (
        ("inputs", inputs, operator.inputs),
        ("outputs", outputs, operator.outputs),
    ):
        # A name that is empty stands for an optional one that is left out; those that must be come first.
        if not low <= len(names) <= (len(names) if high is None else high) or not all(names[:low]):
            raise ValueError(
                f"a {op_type} has {len([*filter(None, names)])} {what}, not {low} to {high or 'any'}"
            )
    _check_attributes(node, operator)


def _check_attributes(node: Message, operator: Operator) -> None:
    op_type = node["op_type"]
    given: set[str] = set()
    for attribute in node.get("attribute", []):
        name = attribute.get("name", "")
        wanted = operator.attributes.get(name)
        held = attribute.keys() - {"name", "type", "doc_string"}
        if wanted is None or name in given:
            raise ValueError(f"a {op_type} has the attribute {name[:60]!r}, which it does not have, or twice")
        if ATTRIBUTE_TYPES.get(attribute.get("type", 0)) != wanted or not held <= {wanted}:
            raise ValueError(f"the attribute {name} of a {op_type} is of another type")
        given.add(name)
    if missing := sorted(operator.required - given):
        raise ValueError(f"a {op_type} lacks its attribute {', '.join(missing)}")
    if op_type == "Constant" and len(given) != 1:
        raise ValueError("a Constant has no value, or more than one")


# Operator → the input that says the shape of what it makes of a single number.
_SHAPED: Final[Mapping[str, int]] = {"ConstantOfShape": 0, "Expand": 1}


def _check_made(node: Message, constants: Mapping[str, list[int]]) -> None:
    """What a node makes of a constant shape: libraries compute it as they load, whatever it takes."""
    op_type = node.get("op_type", "")
    shape = constants.get(node["input"][_SHAPED[op_type]]) if op_type in _SHAPED else None
    if shape is not None and math.prod(shape) > MAX_CONSTANT_ELEMENTS:
        raise ValueError(
            f"a {op_type} makes a tensor of the shape {str(shape)[:60]}: at most {MAX_CONSTANT_ELEMENTS} "
            "elements are allowed"
        )


def _name(text: str) -> str:
    if len(text) > MAX_NAME_BYTES:
        raise ValueError(f"a name has {len(text)} characters, the limit is {MAX_NAME_BYTES}")
    return text


def _span(versions: range) -> str:
    return f"{versions.start} to {versions.stop - 1}" if len(versions) > 1 else f"{versions.start}"


def external_files(model: str, files: Mapping[str, int]) -> dict[str, int]:
    """The files of a component by their path from its graph's folder, as the graph names them.

    Args:
        model: The graph's path in the bundle.
        files: Path in the bundle → bytes.
    """
    folder = PurePosixPath(model).parent
    return {
        PurePosixPath(path).relative_to(folder).as_posix(): size
        for path, size in files.items()
        if path != model and PurePosixPath(path).is_relative_to(folder)
    }
