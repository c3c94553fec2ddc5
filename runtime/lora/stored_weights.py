"""The weights of a bundle by the names of its checkpoint's tensors: the map, and the numbers it leads to."""

from __future__ import annotations

from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.backends.component_weights import ComponentWeights
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.weight_map import WeightMap, read_weight_map
from sdrt.runtime.errors import BundleError

BFLOAT16: Final = "bfloat16"
_BITS: Final = "uint16"  # what NumPy, which has no bfloat16, holds of one


class StoredWeights:
    """The weight map of a bundle, and the numbers that it tells of."""

    def __init__(self, bundle: Bundle) -> None:
        """Read the map; graphs are read when a number of theirs is asked for.

        Raises:
            BundleError: The map cannot be read.
        """
        self.map: WeightMap = read_weight_map(bundle)
        self._path = bundle.path
        self._components: dict[str, ComponentWeights] = {}

    def open(self, bundle: Bundle, component: str) -> ComponentWeights:
        """A component's own weights, whose graph is read once.

        Raises:
            BundleError: Its graph cannot be read.
        """
        if component not in self._components:
            weights = ComponentWeights(bundle, component)
            weights.find("")
            self._components[component] = weights
        return self._components[component]

    def numbers(self, bundle: Bundle, component: str, initializer: str) -> tuple[NDArray[np.float32], str]:
        """An initializer in float32, and the type of number that it is stored in.

        Args:
            bundle: Which this was made of.
            component: Of the bundle.
            initializer: Its name in the component's graph.

        Raises:
            BundleError: There is none such, or it cannot be read.
        """
        weights = self.open(bundle, component)
        if weights.find(initializer) is None:
            raise BundleError(
                f"the {component} of {self._path} has no weights {initializer!r}, which the weight map "
                "names: export the bundle again"
            )
        found = weights.read(initializer)
        if found.dtype != _BITS:
            return found.astype(np.float32, copy=False), found.dtype.name
        wide = found.astype(np.uint32) << 16  # the upper half of a float32
        return wide.view(np.float32), BFLOAT16


_OPENED: WeakKeyDictionary[Bundle, StoredWeights] = WeakKeyDictionary()


def stored_weights(bundle: Bundle) -> StoredWeights:
    """The weights of a bundle, read once for as long as the bundle is in use.

    Raises:
        BundleError: The weight map cannot be read.
    """
    if bundle not in _OPENED:
        _OPENED[bundle] = StoredWeights(bundle)
    return _OPENED[bundle]
