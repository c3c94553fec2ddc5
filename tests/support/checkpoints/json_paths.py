"""JSON documents with one thing changed: what the tests of both manifests damage."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

KeyPath = tuple[str | int, ...]


def replaced(document: dict[str, Any], path: KeyPath, value: Any) -> dict[str, Any]:
    """A copy of a document with the value at ``path`` replaced."""
    result = copy.deepcopy(document)
    holder: Any = result
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return result


def removed(document: dict[str, Any], path: KeyPath) -> dict[str, Any]:
    """A copy of a document without what is at ``path``."""
    result = copy.deepcopy(document)
    holder: Any = result
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    return result


def key_paths(value: Any, so_far: KeyPath = ()) -> Iterator[KeyPath]:
    """The path of everything inside a JSON value."""
    pairs: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    for key, inner in pairs:
        yield (*so_far, key)
        yield from key_paths(inner, (*so_far, key))
