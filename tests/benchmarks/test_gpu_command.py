"""``make gpu`` as far as it goes without a GPU: time limits, partial results, the peers' arithmetic."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sdrt.benchmarks import gpu, gpu_report, gpu_stages
from sdrt.benchmarks.gpu_ceilings import guided_step_flop
from sdrt.benchmarks.gpu_peers import COMPILE_MODE, GUIDANCE, DiffusersPeer, Texts
from sdrt.benchmarks.gpu_profile import MOST, Kernel, by_name, per_step
from sdrt.benchmarks.gpu_timings import Plan, bundle_tokenizer, time_architecture
from sdrt.export.checkpoint.architectures import open_architecture
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.cli import options as cli_options
from sdrt.export.parity.components import compare
from sdrt.export.parity.sampling import SAMPLING_GUIDANCE
from sdrt.runtime import Bundle, Pipeline
from sdrt.runtime.devices.gpu.discovery import find_gpu
from sdrt.runtime.errors import BackendError

EMOJI = Path(gpu.ROOT) / "models" / "emoji"


def _sampling_tolerance() -> float:
    """What the parity gate allowed this bundle's sampling run; it grows with the guidance scale."""
    figures = Bundle.open().manifest.parity["figures"]
    (allowed,) = (figure["tolerance"] for figure in figures if figure["component"] == "sampling")
    return float(allowed) * GUIDANCE / SAMPLING_GUIDANCE


def _run(tmp_path: Path, seconds: float = 60.0) -> gpu._Run:
    return gpu._Run(tmp_path, tmp_path, time.monotonic() + seconds)


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_without_a_gpu_it_says_so_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if _has_gpu():
        pytest.skip("this machine has a GPU")
    assert gpu.main(["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]) == gpu.EXIT_NO_GPU
    assert "no GPU can be used here" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def _has_gpu() -> bool:
    try:
        return bool(find_gpu())
    except BackendError:
        return False


def test_a_stage_that_fails_is_recorded_with_its_last_words(tmp_path: Path) -> None:
    stage = _run(tmp_path).stage("x", _python("print('working'); raise SystemExit('it broke')"), 30)
    assert stage["status"] == "failed"
    assert stage["reason"] == "exit status 1: it broke"


def test_a_stage_that_takes_too_long_is_ended_with_its_children_and_keeps_what_it_wrote(
    tmp_path: Path,
) -> None:
    run = _run(tmp_path)
    child = "import time; time.sleep(60)"
    code = (
        "import pathlib, subprocess, sys, time\n"
        f"pathlib.Path({str(run.result('x'))!r}).write_text('{{\"rows\": [1]}}')\n"
        f"process = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(process.pid, flush=True)\n"
        "time.sleep(60)"
    )
    started = time.monotonic()
    stage = run.stage("x", _python(code), 6)
    assert time.monotonic() - started < 30
    assert stage["status"] == "failed"
    assert stage["reason"].startswith("stopped after")
    assert stage["data"] == {"rows": [1]}
    child_pid = int(stage["reason"].rpartition(" ")[2])
    deadline = time.monotonic() + 10  # it was told to end with its parent, which alone was waited for
    while _alive(child_pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(child_pid)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_when_the_time_is_used_up_nothing_is_started(tmp_path: Path) -> None:
    stage = _run(tmp_path, seconds=0).stage("x", _python("raise SystemExit(1)"), 30)
    assert stage == {"status": "not run", "reason": "the time was used up"}


def test_the_report_is_written_after_every_stage(tmp_path: Path) -> None:
    run = _run(tmp_path)
    result = run.result("facts")
    facts = {"gpu": "NVIDIA H100 80GB HBM3", "versions": {}}
    run.stage("facts", _python(f"open({str(result)!r}, 'w').write({json.dumps(facts)!r})"), 30)
    table, page = run.paths()
    assert table.name == "nvidia-h100-80gb-hbm3.json"
    run.stage("tests", _python("print('3 passed in 1 s')"), 30)
    assert json.loads(table.read_text())["stages"]["tests"]["last_line"] == "3 passed in 1 s"
    assert "3 passed in 1 s" in page.read_text()


@pytest.mark.parametrize("flavour", gpu.FLAVOURS)
def test_the_commands_are_those_of_sd_export(tmp_path: Path, flavour: str) -> None:
    exporting = cli_options.parse(gpu.export_arguments("sdxl", tmp_path / "out"))
    assert (exporting.mode, exporting.architecture, exporting.dtype) == ("export", "sdxl", "fp16")
    (tmp_path / "manifest.json").touch()
    building = cli_options.parse(gpu.engine_arguments(tmp_path, flavour, 4))
    assert building.mode == "engines"
    (options,) = building.engines
    assert options.flavour == flavour
    (profile,) = options.profiles
    assert (profile["batch"].maximum, profile["rows"].minimum, profile["rows"].maximum) == (4, 8, 8)


def test_the_peer_draws_what_the_runtime_draws() -> None:
    """Same networks, tokens, latents and sampler: else its times would be of another picture."""
    peer_pipeline = Pipeline.load(backend="onnxruntime-cpu")
    latents = peer_pipeline.initial_latents(7)
    texts = Texts("a red apple", "a face")
    checkpoint = open_checkpoint(str(EMOJI))
    peer = DiffusersPeer(checkpoint, bundle_tokenizer(Bundle.open()), torch.device("cpu"), compiled=False)
    theirs = peer.draw(texts, latents, 4)
    ours = peer_pipeline(
        texts.prompt,
        negative_prompt=texts.negative,
        latents=latents,
        num_inference_steps=4,
        guidance_scale=GUIDANCE,
        sampler="ddim",
        output_type="numpy",
    )
    assert compare(ours.latents, theirs.latents)[0] < _sampling_tolerance()
    assert np.abs(theirs.pixels.astype(int) - ours.images).max() <= 1


def test_timing_on_the_cpu_gives_every_row_and_names_what_cannot_run() -> None:
    saved: list[dict[str, Any]] = []
    plan = Plan(64, batches=[1], steps=[1], repeats=2, deadline=time.monotonic() + 300, compiled=False)
    found = time_architecture(
        open_checkpoint(str(EMOJI)),
        Bundle.open(),
        ["onnxruntime-cpu", "tensorrt"],
        torch.device("cpu"),
        plan,
        lambda partial: saved.append(json.loads(json.dumps(partial))),
    )
    (row,) = found["rows"]
    assert set(row["contenders"]) == {"sdrt onnxruntime-cpu", "diffusers"}
    for stages in row["contenders"].values():
        assert all(stages[name]["median"] > 0 for name in ("step", "text_encoder", "vae_decoder", "total"))
    assert "not_run" in found["contenders"]["sdrt tensorrt"]
    assert found["fidelity"]["sdrt onnxruntime-cpu"]["relative_l2_to_diffusers"] < _sampling_tolerance()
    assert saved[-1] == json.loads(json.dumps(found))


def test_out_of_time_is_a_row_that_says_so() -> None:
    plan = Plan(64, batches=[1], steps=[1], repeats=1, deadline=time.monotonic() - 1, compiled=False)
    found = time_architecture(
        open_checkpoint(str(EMOJI)),
        Bundle.open(),
        ["onnxruntime-cpu"],
        torch.device("cpu"),
        plan,
        lambda _: None,
    )
    assert found["rows"] == [{"batch": 1, "steps": 1, "not_run": "out of time"}]


def test_operations_of_the_embedded_unet_are_counted() -> None:
    """A 3×3 convolution at full size alone is known; the whole is larger, and grows with the pixels."""
    checkpoint = open_checkpoint(str(EMOJI))
    small, large = guided_step_flop(checkpoint, 64), guided_step_flop(checkpoint, 128)
    width = checkpoint.configs["unet"]["block_out_channels"][0]
    assert small > 2 * 2 * 9 * width * width * 16 * 16
    assert 3.5 < large / small < 5  # convolutions by 4, attention by 16


@pytest.mark.parametrize(("name", "tera"), [("sd15", 1.61), ("sdxl", 13.5)])
def test_operations_of_the_published_architectures(name: str, tera: float) -> None:
    """The numbers that others give for a guided step: twice 803 and 6761 GFLOP."""
    checkpoint = open_architecture(name)
    assert guided_step_flop(checkpoint, checkpoint.native_size) / 1e12 == pytest.approx(tera, rel=0.02)


@pytest.mark.parametrize("stage", sorted(gpu_stages.STAGES))
def test_every_stage_is_reachable_from_the_command_line(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_stages.main(["--help"])
    assert ended.value.code == 0
    assert stage in capsys.readouterr().out


def _recorded_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> dict[str, tuple[Sequence[str], float]]:
    """The stages of a whole ``make gpu``: command and limit of each; all succeed at once."""
    stages: dict[str, tuple[Sequence[str], float]] = {}

    def stage(run: gpu._Run, name: str, command: Sequence[str], limit: float) -> dict[str, Any]:
        stages[name] = (command, min(limit, run.left()))
        return run.record(name, {"status": "ran", "data": {"gpu": "none"} if name == "facts" else {}})

    monkeypatch.setattr(gpu._Run, "stage", stage)
    monkeypatch.setattr(gpu, "_start_export", lambda run, name, keep: (None, time.monotonic()))
    monkeypatch.setattr(gpu, "_wait", lambda process, seconds: 0)
    monkeypatch.setattr(gpu, "last_words", lambda log: "done")
    gpu.main(["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *options])
    return stages


def test_torch_compile_comes_last_with_a_share_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = _recorded_run(tmp_path, monkeypatch, "--seconds", "600")
    assert list(stages)[-2:] == ["compiled sd15", "compiled sdxl"]
    for name in ("sd15", "sdxl"):
        assert "--compiled" not in stages[f"timings {name}"][0]
        assert "--compiled" in stages[f"compiled {name}"][0]
        assert f"profile {name} onnxruntime-cuda" in stages
    # Nothing has taken any time here; the last measurement may take all but what is kept.
    assert stages["timings sdxl"][1] <= 600 * (1 - gpu.COMPILED_SHARE)
    assert stages["compiled sd15"][1] >= 600 * gpu.COMPILED_SHARE / 2


def test_torch_compile_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = _recorded_run(tmp_path, monkeypatch, "--no-compile", "--architectures", "sd15")
    assert "timings sd15" in stages
    assert not [name for name in stages if name.startswith("compiled")]


def test_a_bundle_of_an_earlier_run_is_measured_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, started = _run(tmp_path), []
    monkeypatch.setattr(gpu, "_start", lambda command, log: started.append(command))
    for name in ("sd15", "sdxl"):
        (tmp_path / name).mkdir()
    (tmp_path / "sd15" / "manifest.json").touch()
    assert gpu._start_export(run, "sd15", True) is None
    assert gpu._exported(run, "sd15", None)
    assert run.stages["export sd15"]["last_line"] == "kept from an earlier run"
    assert not started
    for name, keep in (("sdxl", True), ("sd15", False)):
        assert gpu._start_export(run, name, keep) is not None
    assert [command[-1] == "--force" for command in started] == [True, True]


def test_the_peer_is_compiled_with_what_the_report_says(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def compile_(module: Any, *, mode: str, fullgraph: bool) -> Any:
        assert fullgraph
        modes.append(mode)
        return module

    monkeypatch.setattr(torch, "compile", compile_)
    checkpoint = open_checkpoint(str(EMOJI))
    peer = DiffusersPeer(checkpoint, bundle_tokenizer(Bundle.open()), torch.device("cpu"), compiled=True)
    assert peer.name == "torch.compile"
    assert modes == [COMPILE_MODE] * 2  # U-Net and decoder
    assert f'mode="{COMPILE_MODE}"' in gpu_report.COMPILED


def test_kernels_of_a_step_are_what_more_steps_add() -> None:
    few = {"conv": Kernel(3.0, 10), "decoder": Kernel(5.0, 1)}
    many = {"conv": Kernel(23.0, 110), "decoder": Kernel(5.0, 1), "n" * 200: Kernel(50.0, 10)}
    found = per_step(few, many, 10)
    assert (found["gpu_ms"], found["launches"]) == (7.0, 11.0)
    assert found["kernels"][:2] == [
        {"name": "n" * 90, "ms": 5.0, "launches": 1.0},
        {"name": "conv", "ms": 2.0, "launches": 10.0},
    ]
    several = {f"kernel {number}": Kernel(float(number), 1) for number in range(40)}
    longest = per_step({}, several, 1)["kernels"]
    assert [kernel["name"] for kernel in longest] == [f"kernel {39 - number}" for number in range(MOST)]


def test_only_what_ran_on_the_gpu_is_summed() -> None:
    def event(name: str, where: str, microseconds: float) -> Any:
        lasting = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=SimpleNamespace(name=where), time_range=lasting)

    events = [
        event("gemm", "CUDA", 500.0),
        event("cudaLaunchKernel", "CPU", 9.0),
        event("gemm", "CUDA", 1500.0),
    ]
    assert by_name(events) == {"gemm": Kernel(2.0, 2)}


def test_the_profiler_has_the_fields_that_are_read() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        torch.ones(3).add(1)
    assert trace.events()
    assert by_name(trace.events()) == {}  # there are no events of a GPU, and reading them fails on no field
    assert all(event.time_range.elapsed_us() >= 0 for event in trace.events())
