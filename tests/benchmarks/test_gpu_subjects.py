"""``sd-bench`` on a GPU's backends, as far as that goes without one: engines, steps, memory, limits."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.fakes.example_document import document
from support.fakes.recorded_pipeline import Recorded, recording

import sdrt.benchmarks.peer_workers
from sdrt.benchmarks.document.document import Ceilings, Document, Model, Subject, from_json, to_json
from sdrt.benchmarks.document.recorder import Recorder
from sdrt.benchmarks.harness import ceilings, engine_models, measure, profiles
from sdrt.benchmarks.harness import warm as measure_warm
from sdrt.benchmarks.harness.free_memory import free_gpu_memory
from sdrt.benchmarks.harness.plan import backend_plans, export_options, find_model, settings_for
from sdrt.benchmarks.harness.progress import Progress
from sdrt.benchmarks.harness.run import Run, Settings, SubjectPlan
from sdrt.benchmarks.options import parser
from sdrt.benchmarks.report.limits import shares, warnings
from sdrt.benchmarks.report.page import page
from sdrt.benchmarks.report.summary import summary
from sdrt.runtime.bundle.bundle import EMBEDDED, Bundle
from sdrt.runtime.bundle.engine_search import list_engines
from sdrt.runtime.devices.gpu import discovery
from sdrt.runtime.devices.gpu.discovery import Gpu
from sdrt.runtime.errors import BackendError, SdrtError
from sdrt.runtime.pipeline import Pipeline

FAKE = Path(__file__).with_name("fake_worker.py")
WORKERS = Path(sdrt.benchmarks.peer_workers.__file__).parent
# Not the first: of that one TensorRT itself is asked whether it runs the engine.
GPU = Gpu(1, "NVIDIA RTX 4090", (8, 9))
QUIET = Progress(quiet=True)


# --- engines


def planned(bundle: Path, backend: str, *words: str) -> list[SubjectPlan]:
    arguments = parser().parse_args([str(bundle), "--backends", backend, "--only", "warm", *words])
    model = find_model(str(bundle), arguments, QUIET)
    settings = settings_for(model.bundle.manifest, arguments, lambda _: None)
    return backend_plans(model, arguments, settings, Recorder(("sd-bench",)), QUIET)


def test_engines_that_a_named_backend_lacks_are_built_once_and_the_bundle_stays_as_it_is(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(discovery, "find_gpu", lambda _index=0: GPU)
    words = ("--sizes", "16", "--batches", "1,2")
    (plan,) = planned(tiny_bundle, "tensorrt-rtx", *words)
    assert plan.subject.device == "cuda"
    assert plan.model.parent == tmp_path / "cache" / "bench" / "engines"
    engines, damaged = list_engines(Bundle.open(plan.model))
    parts = {engine.manifest.key.component: engine.manifest.key for engine in engines}
    assert (set(parts), damaged) == ({"text_encoder", "unet", "vae_decoder", "vae_encoder"}, [])
    rows = [profile.axes["rows"] for profile in parts["unet"].profiles]
    assert [(axis.minimum, axis.maximum) for axis in rows] == [(1, 2), (2, 4)]
    assert not (tiny_bundle / "engines").exists()

    monkeypatch.setattr(engine_models, "_build", lambda *_: pytest.fail("built a second time"))
    assert planned(tiny_bundle, "tensorrt-rtx", *words)[0].model == plan.model


def test_there_is_a_profile_for_each_batch_alone_or_one_for_all_sizes() -> None:
    one = ["--profile", "batch=1,height=64,width=96"]
    assert engine_models.engine_words([(64, 96)], [1]) == one
    assert engine_models.engine_words([(64, 96)], [1, 4]) == [
        *(*one, "--profile", "batch=4,height=64,width=96")
    ]
    assert engine_models.engine_words([(64, 64), (128, 96)], [1, 4])[2:] == [
        "--profile",
        "batch=1..4,height=64..64..128,width=64..64..96",
    ]


def test_without_a_gpu_nothing_is_built(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu(_index: int = 0) -> Gpu:
        raise BackendError("no NVIDIA driver: for a test")

    monkeypatch.setattr(discovery, "find_gpu", no_gpu)
    monkeypatch.setattr(engine_models, "_build", lambda *_: pytest.fail("built in vain"))
    with pytest.raises(BackendError, match="the backend tensorrt-rtx cannot run here: no NVIDIA driver"):
        planned(tiny_bundle, "tensorrt-rtx")


def test_automatic_backends_build_nothing(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "find_gpu", lambda _index=0: GPU)
    monkeypatch.setattr(engine_models, "_build", lambda *_: pytest.fail("takes minutes unasked"))
    assert [plan.subject.device for plan in planned(tiny_bundle, "auto")] == ["cpu", "cpu"]


def test_on_the_gpu_alone_what_cannot_be_had_is_a_row(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_bundle: Bundle, flavour: str, *_: object) -> Bundle:
        raise SdrtError(f"no {flavour} for a test")

    monkeypatch.setattr(discovery, "find_gpu", lambda _index=0: GPU)
    monkeypatch.setattr(engine_models, "with_engines", refuse)
    arguments = parser().parse_args([str(tiny_bundle), "--gpu"])
    model = find_model(str(tiny_bundle), arguments, QUIET)
    settings = settings_for(model.bundle.manifest, arguments, lambda _: None)
    assert (settings.batches, settings.rounds, "cold" in settings.blocks) == ((1,), 5, False)
    recorder = Recorder(("sd-bench",))
    recorder.set_model(Model(model.name, "m", 1, "ddim", 4, 7.5, "x", 1, settings.sizes))
    assert backend_plans(model, arguments, settings, recorder, QUIET) == []
    found = from_json(to_json(recorder.document(complete=True)))
    flavours = ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda"]
    assert [(entry.subject, entry.error) for entry in found.failures] == [
        (name, f"no {name} for a test") for name in flavours
    ]
    assert found.subjects == ()  # the first one is what ratios compare, and must have figures
    assert export_options(parser().parse_args(["sd15", "--gpu"])) == ["--batch", "1..4", "--fp16"]


def test_an_engine_that_takes_too_long_is_given_up(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SdrtError, match=r"engines were not built in 0 s"):
        engine_models.with_engines(Bundle.open(tiny_bundle), "tensorrt-rtx", GPU, [(16, 16)], [1], limit=0.1)


def test_engines_that_cannot_be_built_say_why_and_leave_nothing(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SdrtError, match=r"engines were not built: .*height") as caught:
        engine_models.with_engines(Bundle.open(tiny_bundle), "tensorrt-rtx", GPU, [(4096, 4096)], [1])
    assert caught.value.exit_status == 2
    assert not list((tmp_path / "cache" / "bench" / "engines").iterdir())


# --- step times


@pytest.fixture
def recorded(tiny_bundle: Path) -> Iterator[Recorded]:
    with recording(Pipeline.load(tiny_bundle, backend="onnxruntime-cpu")) as result:
        yield result


def worker_module(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    monkeypatch.syspath_prepend(str(WORKERS))
    return importlib.import_module(name)


def test_on_a_gpu_a_step_is_timed_by_the_devices_clock(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path
) -> None:
    """There the host hears of a step when it is queued, and the queue is long before the GPU is through."""
    subject = worker_module(monkeypatch, "worker_sdrt").Sdrt("tensorrt-rtx")
    subject._pipeline = recorded
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)
    drawing = worker_module(monkeypatch, "worker").Drawing("a", "", latents, 0, 3, 3.0, 16, 16)
    outputs = []
    call = Recorded.__call__

    def drawn(self: Recorded, *words: Any, **options: Any) -> Any:
        outputs.append(call(self, *words, **options))
        return outputs[-1]

    monkeypatch.setattr(Recorded, "__call__", drawn)
    found = subject.draw(drawing)
    assert found.step_ends == [0.0, outputs[0].timings["step"]]
    subject._pipeline = Pipeline.load(tiny_bundle, backend="onnxruntime-cpu")
    expected = subject.draw(drawing)
    assert len(expected.step_ends) == 3
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    np.testing.assert_array_equal(found.final_latents, expected.final_latents)


@pytest.mark.parametrize("stage", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_a_stage_on_a_gpu_is_waited_for(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    subject = worker_module(monkeypatch, "worker_sdrt").Sdrt("tensorrt-rtx")
    subject._pipeline = recorded
    run = subject.stage(stage, 16, 16, 2)
    before = recorded.driver.counts.copy()
    run()
    assert (recorded.driver.counts - before)["waits"] == 1


# --- memory


def fake_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An nvidia-smi that is a shell script."""
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


def gpu_run(folder: Path, devices: dict[str, str]) -> Run:
    """A run of fake subjects, name → device."""
    recorder = Recorder(("sd-bench",))
    settings = Settings(4, ((64, 64),), (1,), (2,), 2, 1, 1, 1, blocks=("warm",))
    recorder.set_model(Model("model", "m", 1 << 20, "ddim", 4, 7.5, "x", 1, settings.sizes))
    plans = []
    for name, device in devices.items():
        subject = Subject(name, name.upper(), "backend", device=device)
        recorder.set_subject(subject)
        words = (sys.executable, "-S", "-E", str(FAKE), name, str(folder / "order"))
        plans.append(SubjectPlan(subject, words, folder))
    return Run("model", 1 << 20, 4, 8, tuple(plans), settings, recorder, QUIET, folder)


def finished(run: Run) -> Document:
    return from_json(to_json(run.recorder.document(complete=True)))


def test_gpu_memory_is_what_is_less_free_after_drawing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = f"cat {tmp_path}/order 2>/dev/null | grep -c draw"
    fake_smi(tmp_path, monkeypatch, f"echo $((80000 - 1500 * $({count})))")
    run = gpu_run(tmp_path, {"rtx": "cuda", "cpu": "cpu"})
    measure_warm.measure_warm(run)
    found = finished(run)
    (memory,) = found.select("gpu_memory")
    assert (memory.subject, memory.values, memory.rounds) == ("rtx", (1500 * 2**20,), (0,))
    assert "GPU memory, warm, GB" in summary(found)
    assert not found.failures


def test_gpu_memory_that_nobody_knows_is_a_row_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_smi(tmp_path, monkeypatch, "echo no devices were found; exit 6")
    run = gpu_run(tmp_path, {"rtx": "cuda"})
    measure_warm.measure_warm(run)
    found = finished(run)
    assert [(entry.stage, entry.error) for entry in found.failures] == [
        ("gpu_memory", "free GPU memory is not known: nvidia-smi says 'no devices were found'")
    ]
    assert len(found.select("image")[0].values) == 2
    assert not found.select("gpu_memory")


def test_the_gpu_that_programs_see_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, monkeypatch, 'case "$*" in *"--id 3"*) echo 7;; *) echo 5; echo 6;; esac')
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert free_gpu_memory() == 5 << 20
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert free_gpu_memory() == 7 << 20
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match="nvidia-smi"):
        free_gpu_memory()


def test_weights_that_main_memory_does_not_hold_stop_only_subjects_on_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_warm, "available_memory", lambda: 1000)
    monkeypatch.setattr(measure_warm, "free_gpu_memory", lambda: 1 << 30)
    run = gpu_run(tmp_path, {"cpu": "cpu", "rtx": "cuda"})
    measure_warm.measure_warm(run)
    found = finished(run)
    assert [entry.subject for entry in found.failures] == ["cpu"]
    assert found.select("image")[0].subject == "rtx"


# --- limits


def test_a_gpu_is_held_against_its_own_limits_alone() -> None:
    example = document()
    first, *others = example.subjects
    on_gpu = replace(example, subjects=(replace(first, device="cuda"), *others))
    assert {share.subject for share in shares(example)} - {share.subject for share in shares(on_gpu)} == {
        first.name
    }
    assert shares(on_gpu)
    told = " ".join(warnings(on_gpu))
    assert f"The limits of the GPU are not measured: there are no shares of {first.label}." in told
    assert f"{first.label} ran on the GPU and {others[0].label}" in told
    assert "compare two devices" in told
    assert "GPU" not in " ".join(warnings(example))
    fast = Ceilings(1e14, 1e12, "by hand", "cuda")
    measured = replace(on_gpu, ceilings=(*example.ceilings, fast))
    limits = {share.subject: share.attainable for share in shares(measured) if share.component == "unet"}
    assert limits[first.name] == 1e14
    assert limits[others[0].name] == example.ceilings[0].flop_per_s
    assert "limits of the GPU" not in " ".join(warnings(measured))
    text = summary(measured)
    assert "At most on the GPU 100 Tflop/s and 1000 GB/s" in text
    assert "roofline" in page(measured)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_limits_are_measured_of_what_something_runs_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    def ceilings(_threads: int, device: str, *, quick: bool) -> Ceilings:
        return Ceilings(1.0, 1.0, f"quick: {quick}", device)

    monkeypatch.setattr(measure, "measured_ceilings", ceilings)
    run = gpu_run(tmp_path, {"a": device})
    model = find_model("emoji", parser().parse_args([]), QUIET)
    measure._measure_limits(replace(run, settings=replace(run.settings, batches=(1, 2))), model)
    found = finished(run)
    assert [entry.device for entry in found.ceilings] == [device]
    batches = {work.batch for work in found.models[0].work}
    assert batches == ({1, 2} if device == "cuda" else {1})  # where each batch's networks are timed, too


def test_the_ceilings_of_a_gpu_are_what_pytorch_reaches() -> None:
    found = ceilings.gpu_ceilings("cpu", side=64, copied=1 << 20)
    assert found.device == "cuda"
    assert found.flop_per_s > 1e6
    assert found.bytes_per_s > 1e6


# --- profiles


def event(name: str, where: str, microseconds: float) -> Any:
    lasting = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(name=name, device_type=SimpleNamespace(name=where), time_range=lasting)


def test_a_profile_is_what_more_steps_add(monkeypatch: pytest.MonkeyPatch) -> None:
    module = worker_module(monkeypatch, "worker_sdrt")
    few = [event("gemm", "CUDA", 500.0)] * 10 + [
        event("decode", "CUDA", 9e3),
        event("cuLaunchKernel", "CPU", 1.0),
    ]
    many = few + [event("gemm", "CUDA", 700.0)] * 100 + [event("n" * 200, "CUDA", 1e4)] * 10
    many += [event("cudaGraphLaunch", "CPU", 1.0)] * 10 + [event("cudaMemcpyAsync", "CPU", 1.0)] * 5
    many += [event("aten::mm", "CPU", 1.0)] * 7
    found = module.per_step(module.by_name(few), module.by_name(many), 10)
    assert found["seconds"] == pytest.approx(0.017)
    assert found["launches"] == 11
    assert found["host"] == {"launches": 1.0, "waits": 0, "copies": 0.5, "allocations": 0}
    assert [kernel["name"] for kernel in found["kernels"]] == ["n" * 90, "gemm", "decode"]
    assert found["kernels"][1] == {"name": "gemm", "seconds": pytest.approx(0.007), "launches": 10.0}


def test_the_profiler_has_the_fields_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    module = worker_module(monkeypatch, "worker_sdrt")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        torch.ones(3).add(1)
    assert trace.events()
    assert module.by_name(trace.events()) == {}  # there are no events of a GPU, and no field is missing
    assert all(entry.time_range.elapsed_us() >= 0 for entry in trace.events())


def test_profiles_are_asked_of_ours_on_the_gpu_and_are_tables(tmp_path: Path) -> None:
    run = gpu_run(tmp_path, {"rtx": "cuda", "cpu": "cpu"})
    profiles.measure_profiles(run)
    assert (tmp_path / "order").read_text().split() == ["rtx", "load", "rtx", "profile"]
    found = finished(run)
    (profile,) = found.profiles
    assert (profile.subject, profile.batch, profile.kernels[0].launches) == ("rtx", 1, 4.0)
    text = summary(found)
    assert "| RTX, batch 1 | 2.00 | 5 | 1 | 0 |" in text
    assert "### Kernels of a step: RTX, batch 1" in text
    assert "| a\\_gemm\\<half\\> | 1.500 | 4 |".replace("\\<", "&lt;").replace("\\>", "\\>") in text


# --- diffusers on a GPU


def test_diffusers_is_compiled_and_laid_out_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its users would: fp16, channels last, CUDA graphs; the embedded model stays on the CPU here."""
    options: list[dict[str, Any]] = []
    moved: list[Any] = []
    module = worker_module(monkeypatch, "worker_diffusers")

    def compile_(network: Any, **words: Any) -> Any:
        options.append(words)
        return network

    monkeypatch.setattr(torch, "compile", compile_)
    from diffusers import StableDiffusionPipeline

    monkeypatch.setattr(StableDiffusionPipeline, "to", lambda pipe, device: moved.append(device))
    subject = module.Diffusers(device="cuda", compiled=True)
    subject.load(EMBEDDED.parent, 1)
    assert moved == ["cuda"]
    assert [entry["mode"] for entry in options] == ["reduce-overhead"] * 2
    assert subject._pipe.unet.dtype == torch.float16
    assert subject._pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert 'mode="reduce-overhead"' in subject.notes[-1]
