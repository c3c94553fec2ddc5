"""``sd-run --interactive``: a loop that stays warm, driven by lines of JSON.

Standard input has one request a line, standard output one result a line, in the same order; the first line of
output says that the loop is ready. A bad request is answered and the next one works. The recipe of a result
is a request that draws it again.

::

    ← {"ready": {"backend": "onnxruntime-cpu", "reasons": […], "seconds": {"load": 0.5}}}
    → {"prompt": "a red apple", "seed": 3, "output": "apple.png", "id": 1}
    ← {"id": 1, "paths": ["apple.png"], "seeds": [3], "seconds": {…}, "recipes": [{…}]}
    → {"prompt": "a red apple", "output": "base64", "num_inference_steps": 10}
    ← {"id": null, "png": ["iVBORw0…"], "seeds": [1234567], "seconds": {…}, "recipes": [{…}]}
    → {"prompt": "a red apple", "image": "apple.png", "strength": 0.5, "output": "base64"}
    ← …
    → {"prompt": "a red apple", "num_inference_steps": 0, "id": "x"}
    ← {"id": "x", "error": "num_inference_steps is 0: …", "status": 2}
"""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np

from sdrt.runtime.bundle.families.components import LOW_RES
from sdrt.runtime.cli.json_lines import check_options, json_object, with_inline_pictures
from sdrt.runtime.cli.saving import BASE64, PictureFiles, check_output, encoded
from sdrt.runtime.console.printable import one_line
from sdrt.runtime.console.run_command import own_warnings, put
from sdrt.runtime.errors import SdrtError, UsageError
from sdrt.runtime.request.recipes import is_recipe
from sdrt.runtime.system.interrupts import telling

if TYPE_CHECKING:
    from sdrt.runtime.pipeline import Pipeline

MAX_LINE_BYTES: Final = 1 << 24  # with pictures in it; what has no line ends must not fill the memory


def serve(
    pipeline: Pipeline,
    defaults: Mapping[str, Any],
    output: Path | None,
    *,
    load_seconds: float,
    warm_up: bool,
    stream: IO[bytes] | None = None,
) -> None:
    """Answer requests until the input ends.

    Args:
        pipeline: Draws.
        defaults: Options of requests that do not name them; a recipe names all.
        output: Where the pictures of a request go that does not say it; ``base64`` for into the result.
        load_seconds: How long loading took, for the first line.
        warm_up: Draw a picture of the default size before the first line, so that the first request finds
            buffers and graphs.
        stream: The requests; by default standard input.

    Raises:
        UsageError: There is no standard input or output.
        OutputError: Standard output cannot be written.
    """
    if sys.stdout is None or (stream is None and sys.stdin is None):
        raise UsageError("--interactive talks over standard input and output: one of them is closed")
    seconds = {"load": load_seconds}
    if warm_up:
        started = time.perf_counter()
        pipeline(**_warm_up_request(pipeline, defaults))
        seconds["warm_up"] = time.perf_counter() - started
    reasons = [one_line(reason) for reason in pipeline.backend_reasons]
    about = {"backend": pipeline.backend, "reasons": reasons, "seconds": _rounded(seconds)}
    _answer({"ready": about})
    for line in _lines(sys.stdin.buffer if stream is None else stream):
        if line is None or line.strip():
            _answer(_result(pipeline, defaults, output, line))


def _result(
    pipeline: Pipeline, defaults: Mapping[str, Any], output: Path | None, line: bytes | None
) -> dict[str, Any]:
    """What one line is answered with; never an exception but an interruption."""
    identity: Any = None
    try:
        request = _request(line)
        identity = request.pop("id", None)
        _check_names(request, defaults)
        noted: list[str] = []
        with own_warnings(noted.append):  # they belong to the request, and come with its result
            result = _draw(pipeline, defaults, output, request)
    except SdrtError as error:
        return {"id": identity, "error": one_line(str(error)), "status": error.exit_status}
    except Exception as error:
        words = f"internal error: {type(error).__name__}: {error}"
        return {"id": identity, "error": one_line(words), "status": SdrtError.exit_status}
    return {"id": identity, **result, **({"warnings": [*map(one_line, noted)]} if noted else {})}


def _draw(
    pipeline: Pipeline, defaults: Mapping[str, Any], output: Path | None, request: dict[str, Any]
) -> dict[str, Any]:
    started = time.perf_counter()
    where = request.pop("output", None)
    if where is not None and not isinstance(where, str):
        raise UsageError(f"output is {where!r}: a path or {BASE64!r} is wanted")
    target = output if where is None else Path(where)
    in_result = target == Path(BASE64)
    if not in_result:
        check_output(target)
    usual = {} if is_recipe(request) else defaults  # what a recipe does not have, its picture had not
    options = {**usual, **with_inline_pictures(request)}
    if in_result:
        drawn = pipeline(**options)
        saving = time.perf_counter()
        places = {"png": [base64.b64encode(png).decode("ascii") for png in encoded(drawn)]}
        saved = time.perf_counter() - saving
    else:
        files = PictureFiles(target)
        with telling(files.last_words):
            drawn = pipeline(**options, callback_on_batch_end=files)
        places, saved = {"paths": [str(path) for path in files.paths]}, files.seconds
    seconds = {**drawn.timings, "save": saved, "request": time.perf_counter() - started}
    seeds = [recipe["seed"] for recipe in drawn.recipes]
    return {**places, "seeds": seeds, "seconds": _rounded(seconds), "recipes": drawn.recipes}


def _warm_up_request(pipeline: Pipeline, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of one drawing with the defaults, and with what a bundle cannot do without."""
    manifest = pipeline.bundle.manifest
    request = {**defaults, "num_images_per_prompt": 1, "prompt": ""}
    smaller = manifest.latents.factor if manifest.record.picture_input == LOW_RES else 1
    size = (manifest.defaults.height // smaller, manifest.defaults.width // smaller)
    if not manifest.record.reads_text:
        del request["prompt"]
    if manifest.needs_picture and request.get("image") is None:
        request["image"] = np.zeros((*size, 3), np.uint8)
        if manifest.reads_mask:
            request["mask_image"] = np.full(size, 255, np.uint8)
    if manifest.reads_depth and request.get("depth_map") is None:
        request["depth_map"] = np.arange(size[0] * size[1]).reshape(size)
    return request


def _request(line: bytes | None) -> dict[str, Any]:
    """The request in a line.

    Raises:
        UsageError: It is none.
    """
    if line is None:
        raise UsageError(f"a request of more than {MAX_LINE_BYTES} bytes: one JSON object a line is wanted")
    return json_object(line)


def _check_names(request: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    check_options(request)
    if "prompt" not in request and "image" not in request and defaults.get("image") is None:
        raise UsageError("a request needs a prompt, or an image")


def _lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Line by line as they come; None for one that is too long."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE_BYTES)
        yield None


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {stage: round(value, 4) for stage, value in seconds.items()}


def _answer(document: Mapping[str, Any]) -> None:
    put(json.dumps(document, allow_nan=False))
