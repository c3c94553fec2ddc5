"""``make gpu``: test, measure and report on a machine with an NVIDIA GPU.

    python -m sdrt.benchmarks.make_gpu [--out DIR] [--work DIR] [--seconds 480] [--architectures NAME …]

Runs the tests marked ``gpu`` while models with random weights are exported beside them, then ``sd-bench
--gpu`` for each architecture, and when all else is done once more beside torch.compile, which takes minutes.
Every stage is a process with a time limit. What could not run stands in the report with the reason, and
the report is written again after every stage, so that nothing measured is lost.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import sdrt
from sdrt.benchmarks.document.document import Document, Failure, read
from sdrt.benchmarks.document.recorder import Recorder
from sdrt.benchmarks.harness.plan import export_options
from sdrt.benchmarks.options import parser
from sdrt.benchmarks.report.summary import summary
from sdrt.benchmarks.report.writing import JSON, write_report
from sdrt.runtime.devices.gpu.discovery import find_gpu
from sdrt.runtime.errors import BackendError, UsageError
from sdrt.runtime.system.child_process import Child, Ended, last_line, run_told

ROOT: Final = Path(sdrt.__file__).resolve().parents[2]
PYTEST: Final = (sys.executable, "-m", "pytest", "-m", "gpu", "-q")
TESTS_SECONDS: Final = 180.0
COMPILED_SHARE: Final = 0.3  # of the time that is left for measuring, kept for torch.compile
MARGIN: Final = 30.0  # seconds before its limit at which sd-bench is told to be done
LEAST: Final = 20.0  # seconds that a stage is begun with
TIME_USED_UP: Final = "the time was used up"


def main(argv: Sequence[str] | None = None) -> int:
    """Run every stage and write the report; 0 if the tests passed and something was timed."""
    arguments = _parser().parse_args(argv)
    try:
        gpu = find_gpu()
    except BackendError as error:
        print(f"no GPU can be used here: {error}", file=sys.stderr)
        return BackendError.exit_status
    arguments.work.mkdir(parents=True, exist_ok=True)
    report = arguments.out / re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    run = GpuRun(arguments.work, report, time.monotonic() + arguments.seconds)
    passed = run.everything(arguments.architectures, compiles=not arguments.no_compile)
    print(summary(run.document))
    return 0 if passed and run.document.select("image") else 1


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description="test, measure and report on a machine with an NVIDIA GPU")
    result.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="of the report")
    result.add_argument("--work", type=Path, default=ROOT / "out" / "gpu", help="of logs")
    result.add_argument("--seconds", type=float, default=480.0, help="for everything (480)")
    result.add_argument("--architectures", nargs="+", default=["sd15", "sdxl"], metavar="NAME")
    result.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    return result


class GpuRun:
    """The stages so far.

    Attributes:
        document: What they found.
    """

    def __init__(self, work: Path, report: Path, deadline: float) -> None:
        """Begin.

        Args:
            work: For logs, and for the reports of the runs of ``sd-bench``.
            report: The folder of the report.
            deadline: ``time.monotonic()`` at which everything should be over.
        """
        self.work, self.report, self.deadline = work, report, deadline
        self.document = Recorder(("make", "gpu")).document(complete=False)

    def everything(self, architectures: Sequence[str], *, compiles: bool) -> bool:
        """Every stage in its order; whether the tests passed."""
        exports = {name: self.start_export(name) for name in architectures}
        try:
            tests = self.run("tests", [*PYTEST, str(ROOT / "tests")])
            self.tell(f"Tests marked gpu: {tests.last_line if tests else TIME_USED_UP}.")
            kept = COMPILED_SHARE if compiles else 0.0
            exported = []
            for index, name in enumerate(architectures):
                if self.wait_for_export(name, exports[name]):
                    exported.append(name)
                    share = self.left() * (1 - kept) / (len(architectures) - index)
                    self.measure(name, name, share)
            for index, name in enumerate(exported if compiles else ()):
                share = self.left() / (len(exported) - index)
                peers = ["--peers", "diffusers-cuda,torch-compile-cuda", "--only", "warm,fidelity"]
                self.measure(f"{name} beside torch.compile", name, share, *peers)
        finally:
            for child in exports.values():
                child.kill()
        self.document = replace(self.document, complete=True)
        write_report(self.document, self.report)
        return tests is not None and tests.status == 0

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def log(self, stage: str) -> Path:
        """What a stage printed."""
        return self.work / f"{stage.replace(' ', '-')}.log"

    def start_export(self, name: str) -> Child:
        """Exports need no GPU: they run beside the tests, and are there for ``sd-bench`` afterwards."""
        options = export_options(parser().parse_args([name, "--gpu"]))
        command = [sys.executable, "-m", "sdrt.benchmarks.harness.export_model", name, *options]
        with self.log(f"export {name}").open("wb") as log:
            return Child(command, rest=log)

    def wait_for_export(self, name: str, child: Child) -> bool:
        """Whether a bundle is there, once its export has ended."""
        print(f"[{self.left():4.0f} s left] export {name}", flush=True)
        status = child.status(max(0.0, self.left()))
        if status == 0:
            return True
        said = last_line(
            self.log(f"export {name}").read_text(encoding="utf-8", errors="replace"), "no output"
        )
        self.fail(name, "export", TIME_USED_UP if status is None else f"exit status {status}: {said}")
        return False

    def measure(self, title: str, name: str, seconds: float, *words: str) -> None:
        """Run ``sd-bench --gpu`` for some seconds and take over what it found; it writes that as it goes."""
        part = self.work / title.replace(" ", "-")
        (part / JSON).unlink(missing_ok=True)
        budget = max(LEAST, seconds - MARGIN)
        command = [sys.executable, "-m", "sdrt.benchmarks", name, "--gpu", "--seconds", str(int(budget))]
        ended = self.run(f"sd-bench {title}", [*command, "--report", str(part), *words], seconds)
        try:
            found: Document | None = read(part / JSON, check=False)  # what checks it may not be here
        except UsageError:
            found = None
        if ended is None:
            self.fail(title, "sd-bench", TIME_USED_UP)
        elif ended.status != 0:
            reason = f"stopped after {ended.seconds:.0f} s" if ended.status is None else "failed"
            self.fail(title, "sd-bench", f"{reason}: {ended.last_line}")
        if found is not None:
            self.document = self.document.joined(replace(renamed(found, title), complete=True))
        self.write()

    def run(self, stage: str, command: Sequence[str], limit: float = TESTS_SECONDS) -> Ended | None:
        """Run a stage to its end or its limit, whichever comes first; None where there is no time left."""
        seconds = min(limit, self.left())
        if seconds < LEAST:
            return None
        print(f"[{self.left():4.0f} s left] {stage}", flush=True)
        with self.log(stage).open("wb") as log:
            ended = run_told(command, reads="both", log=log, seconds=seconds, cwd=ROOT)
        print(f"    exit status {ended.status}: {ended.last_line}", flush=True)
        return ended

    def fail(self, model: str, stage: str, reason: str) -> None:
        """A row of the report: what could not be done."""
        print(f"    {model}: {reason}", flush=True)
        failure = Failure(model, "make gpu", stage, reason)
        self.document = replace(self.document, failures=(*self.document.failures, failure))

    def tell(self, note: str) -> None:
        """A sentence of the report."""
        self.document = replace(self.document, notes=(*self.document.notes, note))
        self.write()

    def write(self) -> None:
        """The report as it stands."""
        write_report(self.document, self.report, with_page=False)


def renamed(document: Document, title: str) -> Document:
    """A run on one model, under another name of that."""

    return replace(
        document,
        models=tuple(replace(entry, name=title) for entry in document.models),
        measurements=tuple(replace(entry, model=title) for entry in document.measurements),
        profiles=tuple(replace(entry, model=title) for entry in document.profiles),
        failures=tuple(replace(entry, model=title) for entry in document.failures),
    )


if __name__ == "__main__":
    sys.exit(main())
