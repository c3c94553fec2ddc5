"""A stranger's component is loaded for the first time: its graph is checked, then it is tried elsewhere.

`sdrt.runtime.admission.graph_check` refuses what can be seen to be no graph of a bundle. What is left may
still end an engine library with a crash, or keep it busy for ever. So the component is loaded and evaluated
once in a process of its own, with limits on time and memory (`sdrt.runtime.backends.first_load_child`). That
process is no sandbox: it is for accidents.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from sdrt.kernels.cache import usable_folder
from sdrt.runtime.admission.graph_check import check_graph_file, external_files
from sdrt.runtime.bundle import limits
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.manifest import Component
from sdrt.runtime.bundle.prepared_folder import WORTH_TELLING
from sdrt.runtime.errors import BackendError, BundleError, SdrtError
from sdrt.runtime.system.files import clear_leftovers
from sdrt.runtime.system.interrupts import finishing, undone
from sdrt.runtime.system.untrusted import parse_json, read_limited

_COMMAND: Final = ("-P", "-m", "sdrt.runtime.backends.first_load_child")
_SAID: Final = 1 << 16  # bytes of what the child says
_STATUSES: Final = {kind.exit_status: kind for kind in (BundleError, BackendError)}


def check_component(bundle: Bundle, part: Component) -> None:
    """Check a component's graph.

    Raises:
        BundleError: It is no graph that may be loaded, or cannot be read.
    """
    check_graph(read_graph(bundle, part), f"{part.model} of {bundle.path}", part)


def read_graph(bundle: Bundle, part: Component) -> bytes:
    """The bytes of a component's graph, without its weights.

    Raises:
        BundleError: It cannot be read, or is larger than any graph is.
    """
    try:
        return read_limited(bundle.file(part.model_entry), limits.MAX_GRAPH_BYTES)
    except ValueError as error:
        raise BundleError(f"{error}: the weights of a bundle's graph lie beside it") from None
    except OSError as error:
        raise BundleError(f"{part.model} of {bundle.path} cannot be read: {error.strerror}") from error


def check_graph(content: bytes, where: str, part: Component) -> None:
    """Check a graph that takes a component's weights; ``where`` names it.

    Raises:
        BundleError: It is no graph that may be loaded.
    """
    sizes = {entry.path: entry.size for entry in part.files}
    check_graph_file(content, where, external_files(part.model, sizes))


def load_apart(bundle: Bundle, names: Sequence[str], backend: str, *, verify: bool) -> None:
    """Load and evaluate components in a process of their own; see `sdrt.runtime.admission.records`."""
    sizes = [sum(entry.size for entry in bundle.component(name).files) for name in names]
    shape = bundle.manifest.limits
    pixels = shape.min_batch * shape.height.minimum * shape.width.minimum
    memory = (
        limits.FIRST_LOAD_BYTES
        + max(sizes) * limits.FIRST_LOAD_BYTES_PER_BYTE  # they are loaded one after the other
        + pixels * limits.FIRST_LOAD_BYTES_PER_PIXEL
    )
    seconds = (
        limits.FIRST_LOAD_SECONDS
        + sum(sizes) * limits.FIRST_LOAD_SECONDS_PER_BYTE
        + pixels * limits.FIRST_LOAD_SECONDS_PER_PIXEL
    )
    if sum(sizes) >= WORTH_TELLING:
        logging.getLogger("sdrt").info(
            "trying %s in a process of its own, once: it was not exported here", bundle.path
        )
    job = {
        "bundle": str(bundle.path),
        "components": list(names),
        "backend": backend,
        "verify": verify,
        "memory": memory,
        "seconds": seconds,
    }
    said, status = _run(job, seconds)
    _judge(said, status, f"of {bundle.path}", f"{memory / 2**30:.0f} GiB and {seconds:.0f} s")


def _run(job: dict[str, Any], seconds: float) -> tuple[list[dict[str, Any]], int | None]:
    """What the child said, and its exit status; None where its time was up."""
    status: int | None = None
    with contextlib.ExitStack() as undo:
        with finishing():
            child = _started(job)
            end = partial(_end, child, job["backend"])
            undo.enter_context(undone(end))
            undo.callback(end)
        try:
            output, _ = child.communicate(timeout=seconds)
            status = child.returncode
        except subprocess.TimeoutExpired as expired:
            output = expired.stdout or b""
    said = []
    for line in output[-_SAID:].decode("utf-8", "replace").splitlines():
        with contextlib.suppress(ValueError):
            said.append(parse_json(line))
    return [entry for entry in said if isinstance(entry, dict)], status


def _started(job: dict[str, Any]) -> subprocess.Popen[bytes]:
    from multiprocessing.spawn import get_executable  # what an embedder has set, where it is not Python's own

    # It must find the same packages, and NumPy's BLAS need not reserve memory for threads.
    path = os.pathsep.join(entry for entry in sys.path if isinstance(entry, str))
    environment = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
    try:
        return subprocess.Popen(
            [os.fsdecode(get_executable() or ""), *_COMMAND, json.dumps(job)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent alone, which then ends the child
        )
    except OSError as error:
        raise BackendError(f"no process can be started to try the bundle in: {error.strerror}") from error


def _end(child: subprocess.Popen[bytes], backend: str) -> None:
    """End the child, if it is not done, and delete what it was preparing then: nobody holds its locks now."""
    child.kill()
    child.wait()
    folder = usable_folder(backend)
    if folder is not None:
        with contextlib.suppress(OSError):
            clear_leftovers(folder)


def _judge(said: list[dict[str, Any]], status: int | None, whose: str, limit: str) -> None:
    """Raise what the child's end means, if that is not that all went well."""
    last = said[-1] if said else {}
    if status == 0 and "done" in last:
        return
    if "error" in last:
        raise _STATUSES.get(last.get("status", 0), SdrtError)(str(last["error"]))
    tried = f"the {last.get('component', 'bundle')} {whose} was tried in a process of its own and"
    if status is None:
        raise BundleError(
            f"{tried} was not ready in time (limits {limit}): try again when less else runs here; if that "
            "does not help, it is too large for this computer, or damaged"
        )
    if status < 0:
        names = {number.value: number.name for number in signal.Signals}
        how = f"ended it with {names.get(-status, f'signal {-status}')}"
    else:
        how = f"ended it with status {status}"
    raise BundleError(f"{tried} {how} (limits {limit}): it is damaged or made to do harm, do not use it")
