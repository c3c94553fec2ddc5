"""``make gpu`` as far as it goes without a GPU: its stages, time limits, partial results, the report."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.fakes.example_document import document

from sdrt.benchmarks import make_gpu
from sdrt.benchmarks.document.document import Document, Profile, read, to_json
from sdrt.benchmarks.harness.plan import check_peers, export_options
from sdrt.benchmarks.make_gpu import GpuRun, renamed
from sdrt.benchmarks.options import parser
from sdrt.runtime.devices.gpu.discovery import Gpu
from sdrt.runtime.errors import BackendError
from sdrt.runtime.system.child_process import Child, Ended


def a_run(folder: Path, seconds: float = 600.0) -> GpuRun:
    (folder / "work").mkdir()
    return GpuRun(folder / "work", folder / "report", time.monotonic() + seconds)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_without_a_gpu_it_says_so_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_gpu(_index: int = 0) -> Gpu:
        raise BackendError("no NVIDIA driver: for a test")

    monkeypatch.setattr(make_gpu, "find_gpu", no_gpu)
    assert make_gpu.main(["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]) == 7
    assert capsys.readouterr().err == "no GPU can be used here: no NVIDIA driver: for a test\n"
    assert not list(tmp_path.iterdir())


def test_a_stage_is_ended_at_its_limit_and_its_log_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path)
    monkeypatch.setattr(make_gpu, "LEAST", 1.0)
    ended = run.run("a stage", python("import time; print('working', flush=True); time.sleep(60)"), 2)
    assert ended is not None
    assert (ended.status, ended.last_line) == (None, "working")
    assert run.log("a stage").read_text() == "working\n"
    failed = run.run("another", python("raise SystemExit('it broke')"), 30)
    assert failed is not None
    assert (failed.status, failed.last_line) == (1, "it broke")
    run.deadline = time.monotonic()
    assert run.run("late", python("raise SystemExit(1)")) is None


Stages = dict[str, tuple[Sequence[str], float]]


def recorded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, ends: int | None = 0, writes: bool = True
) -> tuple[GpuRun, Stages]:
    """A run whose stages end at once: command and limit of each. ``sd-bench`` writes the example's sd15."""
    stages: Stages = {}
    run = a_run(folder)

    def stage(stage: str, command: Sequence[str], limit: float = 180.0) -> Ended:
        stages[stage] = (command, limit)
        if "--report" in command and writes:
            report = Path(command[command.index("--report") + 1])
            report.mkdir(exist_ok=True)
            (report / "report.json").write_text(to_json(one_model()))
        return Ended(ends, "", "3 passed in 1 s", 1.0)

    monkeypatch.setattr(run, "run", stage)
    monkeypatch.setattr(run, "start_export", lambda name: Child(python("")))
    return run, stages


def one_model() -> Document:
    example = document()
    measurements = tuple(entry for entry in example.measurements if entry.model == "sd15")
    profile = Profile("sd15", "onnxruntime-cpu", 1, 1.0, 2.0, {}, ())
    return replace(
        example, models=example.models[1:], measurements=measurements, profiles=(profile,), failures=()
    )


def test_torch_compile_comes_last_with_a_share_of_its_own_and_all_is_one_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, stages = recorded(tmp_path, monkeypatch)
    assert run.everything(["sd15", "sdxl"], compiles=True)
    compiled = [f"sd-bench {name} beside torch.compile" for name in ("sd15", "sdxl")]
    assert list(stages) == ["tests", "sd-bench sd15", "sd-bench sdxl", *compiled]
    # Nothing has taken any time here; the last measurement may take all but what is kept.
    assert stages["sd-bench sdxl"][1] <= 600 * (1 - make_gpu.COMPILED_SHARE)
    assert stages[compiled[0]][1] >= 0.49 * 590
    found = read(tmp_path / "report" / "report.json")
    assert [model.name for model in found.models] == ["sd15", "sdxl", *(name[9:] for name in compiled)]
    assert {entry.model for entry in found.measurements} == {model.name for model in found.models}
    assert [entry.model for entry in found.profiles] == [model.name for model in found.models]
    assert found.notes == ("Tests marked gpu: 3 passed in 1 s.",)
    assert found.complete
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Tests marked gpu: 3 passed in 1 s." in text
    assert "## sdxl beside torch.compile" in text


def test_its_commands_are_those_of_sd_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdrt.benchmarks.peers.registry.importable", lambda: True)
    run, stages = recorded(tmp_path, monkeypatch)
    run.everything(["sd15"], compiles=True)
    for command, limit in list(stages.values())[1:]:
        arguments = parser().parse_args(command[3:])
        assert arguments.gpu
        assert arguments.seconds <= limit - make_gpu.MARGIN
        assert export_options(arguments) == ["--batch", "1..4", "--fp16"]  # the bundle that is there already
        compared = check_peers(arguments)
        assert compared[0] == "diffusers-cuda"
        assert ("torch-compile-cuda" in compared) == (arguments.models == ["sd15"] and "--peers" in command)


def test_torch_compile_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, stages = recorded(tmp_path, monkeypatch)
    run.everything(["sd15"], compiles=False)
    assert list(stages) == ["tests", "sd-bench sd15"]


def test_what_did_not_run_is_a_row_and_what_was_measured_until_then_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = recorded(tmp_path, monkeypatch, ends=None)
    assert not run.everything(["sd15"], compiles=False)
    found = read(tmp_path / "report" / "report.json")
    assert [(entry.model, entry.stage, entry.error) for entry in found.failures] == [
        ("sd15", "sd-bench", "stopped after 1 s: 3 passed in 1 s")
    ]
    assert found.select("image", model="sd15")


def test_an_export_that_failed_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, stages = recorded(tmp_path, monkeypatch, writes=False)
    run.log("export sd15").write_text("...\nsd-export: no space left\n\n")
    monkeypatch.setattr(run, "start_export", lambda name: Child(python("raise SystemExit(8)")))
    run.everything(["sd15"], compiles=True)
    assert list(stages) == ["tests"]
    (failure,) = read(tmp_path / "report" / "report.json").failures
    assert (failure.stage, failure.error) == ("export", "exit status 8: sd-export: no space left")


def test_the_same_model_under_another_name() -> None:
    found = renamed(one_model(), "again")
    assert {entry.model for entry in found.measurements} == {"again"}
    assert [entry.model for entry in found.profiles] == ["again"]
    joined = one_model().joined(found)
    assert len(joined.models) == 2
    assert len(joined.subjects) == len(document().subjects)
    assert len(joined.ceilings) == 1
