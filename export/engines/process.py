"""Run `sdrt.export.engines.child` and listen to it: a build that crashes or is stopped costs a process."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sdrt.export.engines.child import GRACE
from sdrt.runtime.errors import BackendError, OutputError, SdrtError, UsageError
from sdrt.runtime.system.child_process import Child, last_line, process_memory

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
    last: dict[str, Any] = {}
    peak = 0
    with output.open("wb") as log:
        child = Child([*command, str(job_file)], rest=log, talks=True)
        try:
            while True:
                try:
                    line = child.next_line(_POLL)
                except EOFError:
                    break
                peak = max(peak, process_memory(child.pid).get("VmHWM", 0))
                event = json.loads(line) if line else {}
                if event.get("event") == "progress":
                    on_phase(event["phase"], event["fraction"])
                elif event:
                    last = event
            status = child.status(math.inf)
        finally:
            child.stop(GRACE)
    assert status is not None
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
    said = last_line(output.read_text(encoding="utf-8", errors="replace"), "it said nothing")[:300]
    raise BackendError(f"the engine's build {how} ({said}); {held}")
