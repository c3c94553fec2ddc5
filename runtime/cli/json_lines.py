"""A request as a line of JSON: of ``sd-run --interactive``, and of files of prompts."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from sdrt.runtime.errors import UsageError
from sdrt.runtime.request.options import JSON_OPTIONS, check_names
from sdrt.runtime.system.untrusted import parse_json

A_REQUEST = "a request"  # for messages, where a line has no number


def json_object(line: str | bytes, name: str = A_REQUEST) -> dict[str, Any]:
    """The object in a line.

    Args:
        line: Text or UTF-8.
        name: The line's, for messages.

    Raises:
        UsageError: It holds none.
    """
    try:
        request = parse_json(line)
    except ValueError as error:
        wrong = "is one line of JSON" if name == A_REQUEST else "is no JSON"
        raise UsageError(f"{name} {wrong}: {error}") from error
    if not isinstance(request, dict):
        raise UsageError(f"{name} is {type(request).__name__}: a JSON object is wanted")
    return request


def check_options(request: Mapping[str, Any], name: str = A_REQUEST) -> None:
    """Refuse an option that there is not.

    Raises:
        UsageError: Names it, and the nearest that there is.
    """
    check_names(request, ("prompt", *JSON_OPTIONS, "output", "id"), name)


def with_inline_pictures(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request with the pictures that it holds itself as bytes.

    They come as ``data:image/png;base64,…`` in place of a path.

    Raises:
        UsageError: Such an address is damaged.
    """
    pictures = {}
    for name in ("image", "mask_image", "depth_map"):
        value = request.get(name)
        if isinstance(value, str) and value.startswith("data:"):
            head, _, data = value.partition(",")
            try:
                if not head.endswith(";base64"):
                    raise ValueError("not base64")
                pictures[name] = base64.b64decode(data, validate=True)
            except ValueError as error:
                raise UsageError(f"{name} is a data URI that cannot be read: {error}") from error
    return {**request, **pictures}
