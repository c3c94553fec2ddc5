"""Damaged graphs: a bundle with one of them is refused or draws, and never ends or stops who loads it.

``PYTHONPATH=tests python -m support.checkpoints.graph_fuzz --count 2000`` tries as many; the test suite tries
a few.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx

from sdrt.runtime.admission.graph_operators import operator_lines
from sdrt.runtime.admission.records import admit
from sdrt.runtime.bundle.bundle import EMBEDDED, Bundle
from sdrt.runtime.errors import SdrtError

COMPONENTS = ("text_encoder", "vae_encoder", "vae_decoder", "unet")


def with_graph(bundle: Path, component: str, graph: bytes) -> None:
    """Put a graph into a bundle's folder, and its size and SHA-256 into the manifest."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    part = manifest["components"][component]
    (bundle / part["model"]).write_bytes(graph)
    for entry in part["files"]:
        if entry["path"] == part["model"]:
            entry |= {"size": len(graph), "sha256": hashlib.sha256(graph).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def flipped(graph: bytes, source: random.Random) -> bytes:
    """Some bytes are others."""
    damaged = bytearray(graph)
    for _ in range(source.choice((1, 1, 2, 8))):
        damaged[source.randrange(len(damaged))] = source.randrange(256)
    return bytes(damaged)


def cut(graph: bytes, source: random.Random) -> bytes:
    """A piece is missing, at the end or inside."""
    begin = source.randrange(len(graph))
    return graph[:begin] + graph[begin + source.randrange(1, 200) :]


def _changed(change: Callable[[onnx.GraphProto, random.Random], None]) -> Callable[..., bytes]:
    def mutate(graph: bytes, source: random.Random) -> bytes:
        model = onnx.load_from_string(graph)
        change(model.graph, source)
        return bytes(model.SerializeToString())

    mutate.__name__ = change.__name__
    return mutate


@_changed
def renamed(graph: onnx.GraphProto, source: random.Random) -> None:
    """A node is another operator."""
    source.choice(graph.node).op_type = source.choice(list(operator_lines("")))


@_changed
def rewired(graph: onnx.GraphProto, source: random.Random) -> None:
    """A node reads something else, which there is."""
    index = source.randrange(1, len(graph.node))
    names = [tensor.name for tensor in graph.initializer] + [entry.name for entry in graph.input]
    names += [output for node in graph.node[:index] for output in node.output]
    node = graph.node[index]
    if node.input:
        node.input[source.randrange(len(node.input))] = source.choice(names)


@_changed
def reshaped(graph: onnx.GraphProto, source: random.Random) -> None:
    """A constant in the graph has other numbers."""
    inside = [tensor for tensor in graph.initializer if tensor.raw_data]
    tensor = source.choice(inside)
    tensor.raw_data = bytes(source.choice((0, 1, 0x7F, 0x80, 0xFF)) for _ in range(len(tensor.raw_data)))


@_changed
def reset(graph: onnx.GraphProto, source: random.Random) -> None:
    """An attribute has another number."""
    attributes = [entry for node in graph.node for entry in node.attribute]
    attribute = source.choice(attributes)
    number = source.choice((-(2**63), -1, 0, 1, 7, 2**31, 2**62))
    if attribute.ints:
        attribute.ints[source.randrange(len(attribute.ints))] = number
    else:
        attribute.i = number


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flipped,
    flipped,
    cut,
    renamed,
    renamed,
    rewired,
    reshaped,
    reset,
)


def outcome(bundle: Path, component: str, backend: str) -> str:
    """What comes of loading a component: ``accepted``, or the error's class and what refused it."""
    try:
        admit(Bundle.open(bundle), [component], backend, verify=True)
    except SdrtError as error:
        text = str(error)
        return f"{type(error).__name__} " + (
            "checked" if "no graph that sdrt reads" in text else "limits" if "(limits " in text else "tried"
        )
    return "accepted"


def fuzz(folder: Path, backend: str, seed: int, count: int) -> Counter[str]:
    """Load that many damaged graphs; outcome → how many.

    Args:
        folder: An empty one, for the bundle.
        backend: Of the CPU.
        seed: Of the damage.
        count: How many.
    """
    found: Counter[str] = Counter()
    bundle = folder / "bundle"
    shutil.copytree(EMBEDDED, bundle)
    for index in range(count):
        source = random.Random(seed + index)
        component = COMPONENTS[index % len(COMPONENTS)]
        whole = (EMBEDDED / component / "model.onnx").read_bytes()
        mutate = source.choice(MUTATIONS)
        with_graph(bundle, component, mutate(whole, source))
        try:
            found[outcome(bundle, component, backend)] += 1
        except BaseException:
            print(f"seed {seed + index}: {mutate.__name__} {component} on {backend}")
            raise
        with_graph(bundle, component, whole)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backend", nargs="+", default=["onnxruntime-cpu", "openvino-cpu"])
    arguments = parser.parse_args()
    for backend in arguments.backend:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["SDRT_CACHE"] = str(Path(folder) / "cache")
            for outcomes, number in fuzz(
                Path(folder), backend, arguments.seed, arguments.count
            ).most_common():
                print(f"{backend}: {number} {outcomes}", flush=True)


if __name__ == "__main__":
    main()
