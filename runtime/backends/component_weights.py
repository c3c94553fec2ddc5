"""The numbers of a component's initializers as its bundle has them, read without the package onnx.

Graphs keep their weights in files beside them; these are mapped into memory, so that only what is asked for
is read. What is not as a bundle has it is refused before it is used.
"""

from __future__ import annotations

import mmap
import os
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from numpy.typing import NDArray

from sdrt.runtime.backends.onnx_graph import Initializer, read_graph
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.limits import MAX_GRAPH_BYTES, MAX_TENSORS
from sdrt.runtime.errors import BundleError
from sdrt.runtime.system.untrusted import open_regular, read_limited


class ComponentWeights:
    """A component's own weights: what a LoRA is added to, and what an executor goes back to."""

    def __init__(self, bundle: Bundle, component: str) -> None:
        """Nothing is read yet, and the bundle is not kept.

        Args:
            bundle: The bundle, opened.
            component: The component's name.
        """
        part = bundle.component(component)
        self._where = f"{part.model} of {bundle.path}"
        self._model = bundle.file(part.model_entry)
        folder = PurePosixPath(part.model).parent
        self._files = {
            str(PurePosixPath(entry.path).relative_to(folder)): bundle.file(entry)
            for entry in part.files
            if PurePosixPath(entry.path).is_relative_to(folder)
        }
        self._mapped: dict[str, memoryview] = {}

    @cached_property
    def _initializers(self) -> dict[str, Initializer]:
        try:
            found = read_graph(read_limited(self._model, MAX_GRAPH_BYTES))[1]
            if len(found) > MAX_TENSORS:
                raise ValueError(f"it has more than {MAX_TENSORS} weights, which is the limit")
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error
        return found

    def find(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        """Dtype (of bfloat16 ``uint16``) and shape of an initializer; None where there is none.

        Raises:
            BundleError: The graph cannot be read.
        """
        found = self._initializers.get(name)
        return None if found is None else (found.dtype, found.shape)

    def read(self, name: str) -> NDArray[Any]:
        """The numbers of an initializer that `find` finds, of its dtype and shape; they must not be changed.

        Raises:
            BundleError: They cannot be read.
        """
        found = self._initializers[name]
        try:
            return found.within(self._content(found.file) if found.data is None else found.data)
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def _content(self, name: str) -> memoryview:
        """A file beside the graph, mapped when it is first asked for."""
        if name not in self._mapped:
            if name not in self._files:
                raise ValueError(f"a weight is in the file {name[:100]!r}, which the manifest does not name")
            with open_regular(self._files[name]) as stream:
                size = os.fstat(stream.fileno()).st_size
                whole = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            self._mapped[name] = memoryview(whole)
        return self._mapped[name]

    def _unreadable(self, error: OSError | ValueError) -> BundleError:
        reason = error.strerror if isinstance(error, OSError) else error
        return BundleError(f"the weights of {self._where} cannot be read: {reason}; export it again")
