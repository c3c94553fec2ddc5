"""The numbers of a bundle's initializers, read from its graphs without the package onnx.

Graphs keep their weights in files beside them; these are mapped into memory, so that only what is merged is
read. Where something is not as a bundle has it, it is refused: sizes are compared before anything is used.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.admission.graph_messages import ELEMENT_TYPES, EXTERNAL, MESSAGES
from sdrt.runtime.admission.wire_format import BYTES, parse, read_fields
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.limits import MAX_GRAPH_BYTES, MAX_TENSORS
from sdrt.runtime.bundle.manifest import Component
from sdrt.runtime.bundle.weight_map import WeightMap, read_weight_map
from sdrt.runtime.errors import BundleError
from sdrt.runtime.system.untrusted import open_regular, read_limited

BFLOAT16: Final = "bfloat16"
_GRAPH, _INITIALIZER = 7, 5  # numbers of the fields ModelProto.graph and GraphProto.initializer
_FLOATS: Final = ("float32", "float16", BFLOAT16)


class _Stored(NamedTuple):
    """Where an initializer's numbers are."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class StoredWeights:
    """The weight map of a bundle, and the numbers that it tells of."""

    def __init__(self, bundle: Bundle) -> None:
        """Read the map; graphs are read when a number of theirs is asked for.

        Raises:
            BundleError: The map cannot be read.
        """
        self.map: WeightMap = read_weight_map(bundle)
        self._path = bundle.path
        self._graphs: dict[str, dict[str, _Stored]] = {}

    def open(self, bundle: Bundle, component: str) -> None:
        """Read where a component's numbers are, unless that is known.

        Raises:
            BundleError: Its graph cannot be read.
        """
        if component not in self._graphs:
            self._graphs[component] = _initializers(bundle, bundle.component(component))

    def numbers(self, bundle: Bundle, component: str, initializer: str) -> tuple[NDArray[np.float32], str]:
        """An initializer in float32, and the type of number that it is stored in.

        Args:
            bundle: Which this was made of.
            component: Of the bundle.
            initializer: Its name in the component's graph.

        Raises:
            BundleError: There is none such, or it cannot be read.
        """
        self.open(bundle, component)
        found = self._graphs[component].get(initializer)
        if found is None:
            raise BundleError(
                f"the {component} of {self._path} has no weights {initializer!r}, which the weight map "
                "names: export the bundle again"
            )
        return _as_float32(found), found.dtype


_OPENED: WeakKeyDictionary[Bundle, StoredWeights] = WeakKeyDictionary()


def stored_weights(bundle: Bundle) -> StoredWeights:
    """The weights of a bundle, read once for as long as the bundle is in use.

    Raises:
        BundleError: The weight map cannot be read.
    """
    if bundle not in _OPENED:
        _OPENED[bundle] = StoredWeights(bundle)
    return _OPENED[bundle]


def _as_float32(stored: _Stored) -> NDArray[np.float32]:
    if stored.dtype == BFLOAT16:  # the upper half of a float32
        wide = np.frombuffer(stored.data, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(stored.shape)
    return np.frombuffer(stored.data, stored.dtype).astype(np.float32, copy=False).reshape(stored.shape)


def _initializers(bundle: Bundle, part: Component) -> dict[str, _Stored]:
    where = f"{part.model} of {bundle.path}"
    try:
        graph = memoryview(read_limited(bundle.file(part.model_entry), MAX_GRAPH_BYTES))
        files = _Files(bundle, part)
        return dict(_stored(tensor, files) for tensor in _tensors(graph))
    except ValueError as error:  # also for what is not UTF-8
        raise BundleError(f"the weights of {where} cannot be read: {error}; export it again") from None
    except OSError as error:
        raise BundleError(f"the weights of {where} cannot be read: {error.strerror}") from error


def _tensors(model: memoryview) -> Iterator[dict[str, Any]]:
    """The initializers of a graph, as messages; its nodes are passed over."""
    count = 0
    for number, wire, graph in read_fields(model):
        if (number, wire) != (_GRAPH, BYTES):
            continue
        for inner, kind, content in read_fields(graph):
            if (inner, kind) == (_INITIALIZER, BYTES):
                count += 1
                if count > MAX_TENSORS:
                    raise ValueError(f"it has more than {MAX_TENSORS} weights, which is the limit")
                yield parse(content, "tensor", MESSAGES)


class _Files:
    """The files beside a graph, each mapped into memory when it is first asked for."""

    def __init__(self, bundle: Bundle, part: Component) -> None:
        folder = PurePosixPath(part.model).parent
        self._entries = {
            str(PurePosixPath(entry.path).relative_to(folder)): entry
            for entry in part.files
            if PurePosixPath(entry.path).is_relative_to(folder)
        }
        self._bundle = bundle
        self._mapped: dict[str, memoryview] = {}

    def content(self, name: str, offset: int, length: int) -> memoryview:
        """A part of a file."""
        if name not in self._mapped:
            if name not in self._entries:
                raise ValueError(f"a weight is in the file {name[:100]!r}, which the manifest does not name")
            with open_regular(self._bundle.file(self._entries[name])) as stream:
                size = os.fstat(stream.fileno()).st_size
                whole = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            self._mapped[name] = memoryview(whole)
        found = self._mapped[name][offset : offset + length]
        if offset < 0 or length < 0 or len(found) != length:
            raise ValueError(f"a weight lies beyond the end of {name}")
        return found


def _stored(tensor: Mapping[str, Any], files: _Files) -> tuple[str, _Stored]:
    """An initializer's name, and where its numbers are; of those that hold no floats none is read."""
    name, shape = tensor.get("name", ""), tuple(tensor.get("dims", ()))
    dtype, width, typed = ELEMENT_TYPES.get(tensor.get("data_type", 0), ("", 0, ""))
    if dtype not in _FLOATS:
        return name, _Stored(dtype, shape, memoryview(b""))
    length = math.prod(shape) * width
    if tensor.get("data_location", 0) == EXTERNAL:
        place = {pair.get("key", ""): pair.get("value", "") for pair in tensor.get("external_data", [])}
        data = files.content(place.get("location", ""), int(place.get("offset") or 0), length)
    elif dtype == "float32" and typed in tensor:
        data = memoryview(np.asarray(tensor[typed], "<f4").tobytes())
    else:
        data = tensor.get("raw_data", memoryview(b""))
    if len(data) != length or min(shape, default=0) < 0:
        raise ValueError(f"{name[:100]!r} has {len(data)} bytes for the shape {list(shape)}")
    return name, _Stored(dtype, shape, data)
