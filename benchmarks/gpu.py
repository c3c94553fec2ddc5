"""``make gpu``: test, measure and report on a machine with an NVIDIA GPU.

    python -m sdrt.benchmarks.gpu [--out DIR] [--work DIR] [--keep] [--seconds 480] [--architectures NAME …]

Runs the tests marked ``gpu``; exports SD 1.5 and SDXL with random weights; builds engines for whatever of
TensorRT, TensorRT for RTX and ONNX Runtime is installed; lists the kernels of a step; times them beside
diffusers, eager and, when all else is done, compiled.
Every stage is a process with a time limit. What could not run stands in the report with the reason, and
the report is written again after every stage, so that nothing measured is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import sdrt
from sdrt.benchmarks.gpu_report import markdown
from sdrt.runtime.child_process import last_line
from sdrt.runtime.engines import ENGINES_FOLDER
from sdrt.runtime.files import write_atomically
from sdrt.runtime.manifest import MANIFEST_NAME

ROOT: Final = Path(sdrt.__file__).resolve().parents[2]
FLAVOURS: Final = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda")
BATCHES: Final = (1, 4)
COMPILED_SHARE: Final = 0.3  # of the time for measuring, kept for torch.compile, which comes last
SECONDS_FOR_MORE: Final = 240  # engines for further batches are built if so much is left
EXIT_NO_GPU: Final = 7


def main(argv: Sequence[str] | None = None) -> int:
    """Run every stage and write the report; 0 if the tests passed and something was timed."""
    arguments = _parser().parse_args(argv)
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    run = _Run(arguments.work, arguments.out, time.monotonic() + arguments.seconds)
    facts = run.stage("facts", _stage_command("facts", run.result("facts")), 60)
    if facts["status"] != "ran":
        print(f"no GPU can be used here: {facts['reason']}", file=sys.stderr)
        return EXIT_NO_GPU
    exports = {name: _start_export(run, name, arguments.keep) for name in arguments.architectures}
    run.stage("ceilings", _stage_command("ceilings", run.result("ceilings")), 60)
    run.stage("tests", [sys.executable, "-m", "pytest", "-m", "gpu", "-q", str(ROOT / "tests")], 180)
    built = {name: _measure(run, name, exports[name], arguments) for name in arguments.architectures}
    if not arguments.no_compile:
        _time_compiled(run, built, arguments)
    run.write()
    print(run.paths()[1].read_text(encoding="utf-8"))
    passed = run.stages["tests"]["status"] == "ran"
    timed = any(run.stages.get(f"timings {name}", {}).get("data") for name in arguments.architectures)
    return 0 if passed and timed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="test, measure and report on a machine with an NVIDIA GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="of the report")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "gpu", help="bundles, engines, logs")
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything (480)")
    parser.add_argument("--architectures", nargs="+", default=["sd15", "sdxl"], metavar="NAME")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each timing (5)")
    parser.add_argument("--keep", action="store_true", help="use bundles that an earlier run left in --work")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    return parser


@dataclass(slots=True)
class _Run:
    """The stages so far, and where everything is written."""

    work: Path
    out: Path
    deadline: float
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def result(self, name: str) -> Path:
        return self.work / f"{_slug(name)}.json"

    def log(self, name: str) -> Path:
        return self.work / f"{_slug(name)}.log"

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def stage(self, name: str, command: Sequence[str], limit: float) -> dict[str, Any]:
        """Run a stage to its end or its limit, whichever comes first, and record it."""
        seconds = min(limit, self.left())
        if seconds < 5:
            return self.record(name, {"status": "not run", "reason": "the time was used up"})
        self.result(name).unlink(missing_ok=True)
        print(f"[{self.left():4.0f} s left] {name}", flush=True)
        started = time.monotonic()
        with self.log(name).open("w", encoding="utf-8") as log:
            process = _start(command, log)
            code = _wait(process, seconds)
        return self.record(name, self.outcome(name, code, time.monotonic() - started))

    def outcome(self, name: str, code: int | None, seconds: float) -> dict[str, Any]:
        """What is to be said of a stage that has ended; ``None`` for one that was stopped."""
        found: dict[str, Any] = {"status": "ran", "seconds": round(seconds, 1)}
        if code != 0:
            reason = f"stopped after {seconds:.0f} s" if code is None else f"exit status {code}"
            found |= {"status": "failed", "reason": f"{reason}: {last_words(self.log(name))}"}
        else:
            found["last_line"] = last_words(self.log(name))
        if self.result(name).exists():
            found["data"] = json.loads(self.result(name).read_text(encoding="utf-8"))
        return found

    def record(self, name: str, found: dict[str, Any]) -> dict[str, Any]:
        self.stages[name] = found
        print(f"    {found['status']}{': ' + found['reason'] if 'reason' in found else ''}", flush=True)
        self.write()
        return found

    def paths(self) -> tuple[Path, Path]:
        gpu = self.stages.get("facts", {}).get("data", {}).get("gpu", "no-gpu")
        return self.out / f"{_slug(gpu)}.json", self.out / f"{_slug(gpu)}.md"

    def write(self) -> None:
        if self.stages.get("facts", {}).get("status") != "ran":
            return
        document = {"sdrt": sdrt.__version__, "stages": self.stages}
        table, text = self.paths()
        write_atomically(table, (json.dumps(document, indent=2) + "\n").encode())
        write_atomically(text, markdown(document).encode())


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _stage_command(stage: str, result: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "sdrt.benchmarks.gpu_stages", stage, str(result), *options]


def _start(command: Sequence[str], log: IO[str]) -> subprocess.Popen[bytes]:
    environment: Mapping[str, str] = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        list(command), stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
    )


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit status; a process that takes longer is ended with all that it started."""
    try:
        return process.wait(timeout=max(seconds, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 15)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()


def last_words(log: Path) -> str:
    """The last line of a log that is not empty."""
    return last_line(log.read_text(encoding="utf-8", errors="replace"), "no output")[:600]


def export_arguments(name: str, out: Path) -> list[str]:
    """For ``sd-export``: an architecture with random weights."""
    batch = f"{min(BATCHES)}..{max(BATCHES)}"
    return ["--architecture", name, "--random-weights", str(out), "--fp16", "--batch", batch, "--force"]


def engine_arguments(bundle: Path, flavour: str, batch: int) -> list[str]:
    """For ``sd-export``: engines for guided pictures of one batch and size alone, which run fastest.

    They are not compared with ONNX Runtime on the CPU, which takes minutes at full size: the timings bring a
    comparison of whole runs with diffusers on the GPU.
    """
    profile = f"batch={batch},rows={2 * batch}"
    return [str(bundle), "--engine", flavour, "--profile", profile, "--no-engine-parity", "--force"]


def _sd_export(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "sdrt.export.cli", *arguments]


def _start_export(run: _Run, name: str, keep: bool) -> tuple[subprocess.Popen[bytes], float] | None:
    """Exports need no GPU: they run beside the tests. None for one that is kept from before."""
    if keep and (run.work / name / MANIFEST_NAME).exists():
        return None
    with run.log(f"export {name}").open("w", encoding="utf-8") as log:
        return _start(_sd_export(export_arguments(name, run.work / name)), log), time.monotonic()


def _build_engines(run: _Run, name: str, bundle: Path) -> list[str]:
    """Engines of every flavour for every batch; the flavours that could be built."""
    built: list[str] = []
    for batch in BATCHES:
        first = batch == BATCHES[0]
        for flavour in FLAVOURS if first else tuple(built):
            stage = f"engine {name} {flavour} batch {batch}"
            if not first and run.left() < SECONDS_FOR_MORE:
                run.record(stage, {"status": "not run", "reason": "too little time was left"})
            elif (
                run.stage(stage, _sd_export(engine_arguments(bundle, flavour, batch)), 150)["status"] == "ran"
            ):
                built += [flavour] if first else []
    return built


def _exported(run: _Run, name: str, export: tuple[subprocess.Popen[bytes], float] | None) -> bool:
    """Whether there is a bundle, once its export has ended."""
    stage = f"export {name}"
    if export is None:
        # Engines are built anew: earlier ones may be of earlier passes.
        shutil.rmtree(run.work / name / ENGINES_FOLDER, ignore_errors=True)
        run.record(stage, {"status": "ran", "seconds": 0.0, "last_line": "kept from an earlier run"})
        return True
    process, started = export
    code = _wait(process, run.left())
    return bool(run.record(stage, run.outcome(stage, code, time.monotonic() - started))["status"] == "ran")


def _measure(
    run: _Run,
    name: str,
    export: tuple[subprocess.Popen[bytes], float] | None,
    arguments: argparse.Namespace,
) -> list[str] | None:
    """Everything about one architecture, once its export has ended; flavours, or None without a bundle."""
    if not _exported(run, name, export):
        return None
    built = _build_engines(run, name, run.work / name)
    # The last architecture gets what is left; the others their share.
    remaining = len(arguments.architectures) - arguments.architectures.index(name)
    kept = 0.0 if arguments.no_compile else COMPILED_SHARE
    share = max(run.left() * (1 - kept) / remaining - 40, 30)
    _time(run, "timings", name, built, arguments, share)
    common = _common(run, name, built)
    stage = f"launches {name}"
    run.stage(stage, _stage_command("launches", run.result(stage), *common), 60)
    for flavour in built:
        single = ["--bundle", str(run.work / name), "--backends", flavour]
        for kind in ("profile", "memory"):
            stage = f"{kind} {name} {flavour}"
            run.stage(stage, _stage_command(kind, run.result(stage), *single), 60)
    return built


def _time_compiled(run: _Run, built: Mapping[str, list[str] | None], arguments: argparse.Namespace) -> None:
    """Once more with torch.compile; a compilation that is not done in time loses no other figure."""
    waiting = [name for name, flavours in built.items() if flavours is not None]
    while waiting:
        share = run.left() / len(waiting)
        name = waiting.pop(0)
        _time(run, "compiled", name, built[name] or [], arguments, share, "--compiled")


def _common(run: _Run, name: str, built: Sequence[str]) -> list[str]:
    return ["--model", name, "--bundle", str(run.work / name), "--backends", *built]


def _time(
    run: _Run,
    kind: str,
    name: str,
    built: Sequence[str],
    arguments: argparse.Namespace,
    share: float,
    *more: str,
) -> None:
    options = [*_common(run, name, built), "--repeats", str(arguments.repeats), *more]
    stage = f"{kind} {name}"
    command = _stage_command("timings", run.result(stage), *options, "--seconds", f"{share * 0.7:.0f}")
    run.stage(stage, command, share)


if __name__ == "__main__":
    sys.exit(main())
