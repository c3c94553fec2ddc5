"""The numbers of a component's initializers as its bundle has them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from sdrt.runtime.backends.onnx_graph import Initializer, read_graph
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.errors import BundleError


class OwnWeights:
    """What an executor goes back to when weights that were replaced are not any more."""

    def __init__(self, bundle: Bundle, component: str) -> None:
        """Nothing is read yet.

        Args:
            bundle: The bundle, opened.
            component: The component's name.
        """
        self._bundle, self._part = bundle, bundle.component(component)

    @cached_property
    def _initializers(self) -> dict[str, Initializer]:
        try:
            return read_graph(self._bundle.file(self._part.model_entry).read_bytes())[1]
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def find(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        """Dtype (of bfloat16 ``uint16``) and shape of an initializer; None where there is none.

        Raises:
            BundleError: The graph cannot be read.
        """
        found = self._initializers.get(name)
        return None if found is None else (found.dtype, found.shape)

    def read(self, name: str) -> NDArray[Any]:
        """The numbers of an initializer that `find` finds.

        Raises:
            BundleError: They cannot be read.
        """
        found = self._initializers[name]
        folder = self._bundle.file(self._part.model_entry).parent
        listed = {self._bundle.file(entry) for entry in self._part.files}
        try:
            if found.file and folder / found.file not in listed:
                raise ValueError(f"{found.file[:100]!r} is not in the manifest")
            return found.read(folder)
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> BundleError:
        return BundleError(
            f"the weights of {self._part.model} in {self._bundle.path} cannot be read: {error}; "
            "export it again"
        )
