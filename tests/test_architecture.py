"""The house: which room may import which, no circles, and what files and folders may be called."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sdrt

SOURCE = Path(sdrt.__file__).parent
ROOT = SOURCE.parents[1]

# From the ground to the roof: a room may import those before it. What is not a folder is a file.
FLOORS = ("kernels", "runtime", "export", "benchmarks")
ROOMS = {
    "kernels": (),
    "runtime": (
        *("errors", "checks", "system", "console", "samplers", "bundle", "admission", "devices", "backends"),
        *("lora", "text", "pictures", "request", "drawing", "pipeline", "cli"),
    ),
    "export": (
        *("options", "schema", "passes", "checkpoint", "graphs", "parity", "engines", "manifest", "writer"),
        "cli",
    ),
    "benchmarks": (
        *("options", "document", "peers", "harness", "report", "peer_workers", "gallery", "studies"),
        *("make_gpu", "cli", "__main__"),
    ),
}
NEVER_IN_RUNTIME = {"torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript"}
# Modules of any distribution that is installed, and of Python: no folder of ours has such a name.
LIBRARIES = {"cuda", "openvino", "tensorrt", "onnx"} | set(importlib.metadata.packages_distributions())

Import = tuple[str, int]  # the module, and the line


@cache
def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name without ``sdrt.``."""
    found = {}
    for floor in FLOORS:
        for file in sorted((SOURCE / floor).rglob("*.py")):
            parts = file.relative_to(SOURCE).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def imports(name: str) -> tuple[Import, ...]:
    """What a module imports, wherever in it: for types only and within functions too."""
    found: list[Import] = []
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix("sdrt.")
                found.append((f"sdrt.{inner}" if inner in modules() else node.module, node.lineno))
    return tuple(found)


def edges(name: str) -> Iterator[tuple[str, int]]:
    """The modules of ours that one imports."""
    for target, line in imports(name):
        inner = target.removeprefix("sdrt.")
        if target.startswith("sdrt.") and inner in modules() and inner != name:
            yield inner, line


def rank(name: str) -> tuple[int, int]:
    """How high a module stands: its floor, and its room there."""
    floor, _, rest = name.partition(".")
    room = rest.partition(".")[0]
    rooms = ROOMS[floor]
    # The package itself, which gives the public names, is the roof; on a floor without rooms all are alike.
    return FLOORS.index(floor), rooms.index(room) if room and rooms else len(rooms)


def test_every_room_is_known() -> None:
    for name in modules():
        rank(name)
    for floor, rooms in ROOMS.items():
        for room in rooms:
            assert f"{floor}.{room}" in modules(), f"{floor}/{room} is gone: take it out of ROOMS"


def test_arrows_only_point_down() -> None:
    wrong = [
        f"{name}, line {line}, imports {target}"
        for name in modules()
        for target, line in edges(name)
        if rank(target) > rank(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_there_are_no_circles() -> None:
    graph = {name: {target for target, _ in edges(name)} for name in modules()}
    for package in ("runtime", "export"):
        graph[package] = set()  # gives names when they are asked for
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_the_runtime_knows_nothing_of_the_export() -> None:
    for name in modules():
        if name.startswith(("runtime", "kernels")):
            for target, line in imports(name):
                top = target.partition(".")[0]
                assert top not in NEVER_IN_RUNTIME, f"{name}, line {line}, imports {target}"


def test_no_folder_or_file_is_called_as_a_library() -> None:
    names = {part for name in modules() for part in name.split(".")}
    ours = {"sdrt", *FLOORS}
    assert not (names - ours) & (LIBRARIES - set(sys.stdlib_module_names) - ours)


def test_files_are_no_longer_than_one_reads() -> None:
    # A page is about 400 lines; what is a little longer and one thing may stay so.
    lengths = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in modules().items()}
    assert not {name: length for name, length in lengths.items() if length > 440}


def test_rooms_say_what_they_are_and_nothing_more() -> None:
    for name, file in modules().items():
        if file.name == "__init__.py" and name not in FLOORS:
            (only,) = ast.parse(file.read_text(encoding="utf-8")).body
            assert isinstance(only, ast.Expr), f"{name} is more than a sentence"
