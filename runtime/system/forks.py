"""What a forked child does with the engines of its parent: nothing, not even destroy them."""

from __future__ import annotations

import os
from typing import Any
from weakref import WeakSet

_KEPT: WeakSet[Any] = WeakSet()


def keep_in_children(owner: object) -> None:
    """Have forked children never destroy ``owner`` and what it holds.

    Engine libraries wait for their threads when an engine is destroyed. Those of the parent are not in the
    child, which would wait for ever, at the latest when it ends.
    """
    _KEPT.add(owner)


def _keep() -> None:
    import ctypes

    for owner in list(_KEPT):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


os.register_at_fork(after_in_child=_keep)
