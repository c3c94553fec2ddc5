"""Run `sdrt.export.engines.child` and listen to it: a build that crashes or is stopped costs a process."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sdrt.export.engines.child import GRACE, peak_memory
from sdrt.runtime.errors import BackendError, OutputError, SdrtError, UsageError

OnPhase = Callable[[str, float], None]  # the phase's name, and the share of the build that is done
COMMAND: Final = (sys.executable, "-P", "-m", "sdrt.export.engines.child")
_POLL: Final = 0.5  # seconds between two looks at the child's memory
_STATUSES: Final = {kind.exit_status: kind for kind in (UsageError, BackendError, OutputError)}


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What a finished build reports: wall seconds, the process's peak memory in bytes, and its facts."""

    seconds: float
    peak_bytes: int
    facts: dict[str, Any]


def run_build(
    job: Mapping[str, Any],
    folder: Path,
    *,
    on_phase: OnPhase = lambda _phase, _fraction: None,
    command: Sequence[str] = COMMAND,
) -> BuildResult:
    """Run one build to its end.

    Args:
        job: See `sdrt.export.engines.child.build`.
        folder: Where the job and the child's output are written; the caller deletes it.
        on_phase: Told how far the build is.
        command: The child; tests give another.

    Raises:
        SdrtError: The build failed; the class and message are the child's.
        BackendError: The child died; the message says how, and how much memory it had.
        KeyboardInterrupt: As raised in the caller meanwhile; the child is gone by then.
    """
    job_file, output = folder / "job.json", folder / "build.log"
    job_file.write_text(json.dumps(job), encoding="utf-8")
    read, write = os.pipe()
    with output.open("wb") as log, os.fdopen(read, "rb") as events:
        try:
            child = subprocess.Popen(
                [*command, str(job_file), str(write)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(write,),
                start_new_session=True,  # Ctrl-C is for the parent alone, which then ends the child
            )
        finally:
            os.close(write)
        last: dict[str, Any] = {}
        peak = 0
        try:
            for event, held in _listen(events.fileno(), child.pid):
                peak = max(peak, held)
                if event.get("event") == "progress":
                    on_phase(event["phase"], event["fraction"])
                elif event:
                    last = event
            status = child.wait()
        finally:
            _stop(child)
    return _result(last, status, peak, output)


def _result(last: Mapping[str, Any], status: int, peak: int, output: Path) -> BuildResult:
    if last.get("event") == "done" and status == 0:
        return BuildResult(last["build_seconds"], last["peak_bytes"], last["facts"])
    if last.get("event") == "error":
        raise _STATUSES.get(last["status"], SdrtError)(last["message"])
    held = f"it held up to {peak / 2**30:.1f} GiB"
    if status == -signal.SIGKILL:
        raise BackendError(
            f"the engine's build was killed, as the system does when memory runs out; {held}: "
            "smaller sizes or a smaller --batch need less"
        )
    how = f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    said = _last_line(output)
    raise BackendError(f"the engine's build {how} ({said}); {held}")


def _last_line(output: Path) -> str:
    lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it said nothing"


def _listen(descriptor: int, pid: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Events as they come, each with the memory that the process has held; an empty one now and then."""
    waiting = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            ready = selector.select(_POLL)
            held = peak_memory(pid)
            if not ready:
                yield {}, held
                continue
            received = os.read(descriptor, 1 << 16)
            if not received:
                return
            *lines, waiting = (waiting + received).split(b"\n")
            for line in lines:
                yield json.loads(line), held


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ask the child to end by closing its standard input; insist when it does not."""
    assert child.stdin is not None
    child.stdin.close()
    deadline = time.monotonic() + GRACE
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if child.poll() is None:
        child.kill()
        child.wait()
