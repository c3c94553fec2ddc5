"""What is measured, in which order, and what becomes of subjects that fail: with fake workers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdrt.benchmarks.document.document import Document, MemoryShortage, Model, Subject, from_json, to_json
from sdrt.benchmarks.document.recorder import Recorder
from sdrt.benchmarks.harness import warm as measure_warm
from sdrt.benchmarks.harness.cold import measure_cold
from sdrt.benchmarks.harness.fidelity import latent_error, measure_fidelity, psnr
from sdrt.benchmarks.harness.progress import Progress
from sdrt.benchmarks.harness.run import Run, Settings, SubjectPlan
from sdrt.benchmarks.harness.worker_process import Worker
from sdrt.benchmarks.report.derive import ratios
from sdrt.benchmarks.report.limits import warnings
from sdrt.benchmarks.report.page import page
from sdrt.benchmarks.report.summary import summary

FAKE = Path(__file__).with_name("fake_worker.py")
WEIGHTS = 1 << 20
SETTINGS = Settings(
    steps=4,
    sizes=((64, 64), (64, 128)),
    batches=(1, 2),
    growth_steps=(2, 4),
    rounds=3,
    growth_rounds=2,
    cold_rounds=2,
    threads=1,
    blocks=("cold", "warm", "growth"),
)


def make_run(folder: Path, subjects: dict[str, str], settings: Settings = SETTINGS) -> Run:
    """A run of fake subjects, name → how each misbehaves."""
    recorder = Recorder(("sd-bench",))
    recorder.set_model(Model("model", "m", WEIGHTS, "ddim", settings.steps, 7.5, "x", 1, settings.sizes))
    plans = []
    for name, told in subjects.items():
        subject = Subject(name, name.upper(), "peer")
        recorder.set_subject(subject)
        words = (sys.executable, "-S", "-E", str(FAKE), name, str(folder / "order"), told)
        plans.append(SubjectPlan(subject, words, folder))
    return Run("model", WEIGHTS, 4, 8, tuple(plans), settings, recorder, Progress(quiet=True), folder)


def finished(run: Run) -> Document:
    """The report, through its schema."""
    return from_json(to_json(run.recorder.document(complete=True)))


def order(run: Run, op: str) -> str:
    """Names of the subjects that were asked for something, in order."""
    lines = (run.folder / "order").read_text().splitlines()
    return "".join(line.split()[0] for line in lines if line.endswith(f" {op}"))


def test_cold_starts_are_interleaved_and_the_first_does_not_count(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"a": "@", "b": "@"})
    measure_cold(run)
    assert order(run, "load") == "ab" * 3
    document = finished(run)
    for subject in ("a", "b"):
        (total,) = document.select("cold_total", subject=subject)
        (start,) = document.select("cold_start", subject=subject)
        assert total.rounds == (0, 1)
        assert (total.height, total.width, total.batch, total.steps) == (64, 64, 1, 4)
        for whole, part in zip(total.values, start.values, strict=True):
            assert whole is not None
            assert part is not None
            assert whole > part > 0
        (peak,) = document.select("cold_peak_memory", subject=subject)
        (own,) = document.select("cold_peak_anonymous", subject=subject)
        assert (peak.values[0] or 0) > (own.values[0] or 0) > 1 << 20
    assert len(document.noise.probe_seconds) == 2
    assert document.subjects[0].versions == {"fake": "1.0"}


def test_a_slow_subject_has_fewer_cold_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdrt.benchmarks.harness.cold.SLOW_SECONDS", 0.0)
    run = make_run(tmp_path, {"a": "@"}, replace(SETTINGS, cold_rounds=3))
    measure_cold(run)
    assert finished(run).select("cold_total")[0].rounds == (0,)


def test_warm_rounds_are_interleaved(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"a": "@", "b": "@"}, replace(SETTINGS, blocks=("warm",)))
    measure_warm.measure_warm(run)
    assert order(run, "draw") == "ab" * 4
    assert order(run, "stage") == "ab" * 3
    document = finished(run)
    (step,) = document.select("step", subject="b")
    assert step.rounds == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert document.select("image", subject="a")[0].values == (0.03,) * 3
    assert document.select("memory", subject="a")[0].values[0]


def test_growth_covers_steps_sizes_and_batches(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"a": "@"})
    measure_warm.measure_warm(run)
    images = finished(run).select("image")
    settings = [(entry.height, entry.width, entry.batch, entry.steps) for entry in images]
    assert settings == [(64, 64, 1, 4), (64, 64, 1, 2), (64, 128, 1, 4), (64, 64, 2, 4)]
    assert [len(entry.values) for entry in images] == [3, 2, 2, 2]
    assert [entry.width for entry in finished(run).select("unet")] == [64, 128]


def test_without_memory_for_all_each_group_holds_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {0: 2 << 30, 1: 2 << 30, 2: 1 << 30}  # by subjects that are loaded
    live = watched(monkeypatch)
    monkeypatch.setattr(measure_warm, "available_memory", lambda: free[len(live())])
    run = make_run(tmp_path, {"a": "@", "b": "@", "c": "@"}, replace(SETTINGS, blocks=("warm",), rounds=2))
    measure_warm.measure_warm(run)
    assert order(run, "draw") == "ababab" + "cacac"
    document = finished(run)
    rounds = {subject: document.select("image", subject=subject)[0].rounds for subject in "abc"}
    assert rounds == {"a": (0, 1, 2, 3), "b": (0, 1), "c": (2, 3)}
    assert document.models[0].memory_shortage is None


def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Worker]]:
    """Tells which of the workers that were started from now on are alive."""
    begun: list[Worker] = []
    start = Run.start

    def starting(run: Run, plan: SubjectPlan) -> Worker:
        begun.append(start(run, plan))
        return begun[-1]

    monkeypatch.setattr(Run, "start", starting)
    return lambda: [worker for worker in begun if worker.memory().get("VmRSS")]


def too_short_for_two(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Memory for one subject alone; the list gets how many were alive at each probe of the noise."""
    live, seen = watched(monkeypatch), list[int]()
    monkeypatch.setattr(measure_warm, "available_memory", lambda: (2 << 30) - len(live()) * (1 << 30))
    monkeypatch.setattr(Recorder, "probe", lambda _: seen.append(len(live())))
    return seen


def test_without_memory_for_two_each_is_held_alone_and_rounds_stay_interleaved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = too_short_for_two(monkeypatch)
    run = make_run(tmp_path, {"a": "@", "b": "@"})
    measure_warm.measure_warm(run)
    assert alive == [0] * 6  # before each turn of 3 rounds
    assert order(run, "load") == "a" + "ab" * 3
    # To be warm, the main setting, other steps, and a warm-up before each of another size and another batch.
    turns = ["a" * 7 + "b" * 7] * 2 + ["aabb"]
    assert order(run, "draw") == "a" + "".join(turns)
    assert order(run, "stage") == "aabb" * 2 + "ab"
    document = finished(run)
    for subject in "ab":
        images = document.select("image", subject=subject)
        assert [entry.rounds for entry in images] == [(0, 1, 2), (0, 1), (0, 1), (0, 1)]
        assert document.select("memory", subject=subject)[0].rounds == (0,)
    pairs = {tuple(ratio.setting): ratio.pairs for ratio in ratios(document, "image")}
    assert pairs == {tuple(point.setting): point.rounds for point in measure_warm.points(run)}
    short = document.models[0].memory_shortage
    assert short is not None
    assert (short.held, short.needed_bytes) == (1, measure_warm.needed(WEIGHTS))
    assert 0 < short.free_bytes <= 1 << 30
    (warning,) = [line for line in warnings(document) if line.startswith("model: memory did not suffice")]
    assert "(1.0" in warning
    assert "may need 1.08 GB), so they were measured one at a time" in warning
    for report in (page(document), summary(document)):
        assert "Subjects were held one at a time, for want of memory." in report
        assert warning in report.replace("\\", "")


@pytest.mark.parametrize("told", ["kill@load", "kill@stage", "refuse@stage", "refuse@draw"])
def test_a_subject_that_fails_alone_leaves_the_others_their_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    too_short_for_two(monkeypatch)
    run = make_run(tmp_path, {"a": "@", "bad": told, "c": "@"}, replace(SETTINGS, blocks=("warm",)))
    measure_warm.measure_warm(run)
    document = finished(run)
    assert [entry.subject for entry in document.failures] == ["bad"]  # told once, not in every round
    for subject in "ac":
        assert document.select("image", subject=subject)[0].rounds == (0, 1, 2)
        assert document.select("unet", subject=subject)[0].rounds[-1] == 2
    kept = {"kill@stage": (0,), "refuse@stage": (0, 1, 2)}.get(told, ())
    assert [entry.rounds for entry in document.select("image", subject="bad")] == [kept] * bool(kept)


def test_alone_and_out_of_time_one_round_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    too_short_for_two(monkeypatch)
    run = make_run(tmp_path, {"a": "@", "b": "@"})
    run.deadline = 0.0
    measure_warm.measure_warm(run)
    assert {entry.rounds for entry in finished(run).select("image")} == {(0,)}


def test_memory_that_may_not_do_for_one_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_warm, "available_memory", lambda: 1 << 29)
    run = make_run(tmp_path, {"a": "@"}, replace(SETTINGS, blocks=("warm",)))
    measure_warm.measure_warm(run)
    document = finished(run)
    assert document.select("image")[0].rounds == (0, 1, 2)
    assert document.models[0].memory_shortage == MemoryShortage(0, 1 << 29, measure_warm.needed(WEIGHTS))
    assert any(
        "even for one subject (537 MB were free, it may need 1.08 GB)" in w for w in warnings(document)
    )
    assert "one at a time" not in page(document)


def test_memory_that_does_not_hold_the_weights_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_warm, "available_memory", lambda: WEIGHTS - 1)
    run = make_run(tmp_path, {"a": "@", "b": "@"})
    measure_warm.measure_warm(run)
    document = finished(run)
    assert [(entry.subject, entry.stage) for entry in document.failures] == [
        ("a", "loading"),
        ("b", "loading"),
    ]
    assert "the weights alone take 0.0 GB" in document.failures[0].error
    assert not document.measurements
    assert not (tmp_path / "order").exists()  # none was started


def test_mapped_pages_of_others_are_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be taken away from a subject that is being measured, which then reads its weights again."""
    monkeypatch.setattr(measure_warm, "available_memory", lambda: 20)
    facts = [{"VmRSS": 9, "RssAnon": 2}, {"VmRSS": 4, "RssAnon": 4}, {}]  # the last one has just died
    group: Any = [
        SimpleNamespace(worker=SimpleNamespace(memory=lambda found=found: found)) for found in facts
    ]
    assert measure_warm.room(group) == 20 - 7


@pytest.mark.parametrize(
    ("available", "weights", "enough"), [(11 << 30, 4 << 30, True), (10 << 30, 4 << 30, False)]
)
def test_what_fits(available: int, weights: int, enough: bool) -> None:
    assert measure_warm.fits(available, weights) is enough


@pytest.mark.parametrize(
    ("told", "stages"),
    [
        ("exit@load", ["cold start"]),
        ("kill@draw", ["cold start"]),
        ("refuse@stage", ["unet 64 x 64"]),
        ("kill@stage", ["unet 64 x 64"]),
    ],
)
def test_a_subject_that_fails_is_a_row_and_the_others_go_on(
    tmp_path: Path, told: str, stages: list[str]
) -> None:
    settings = replace(SETTINGS, blocks=("cold", "warm"), cold_rounds=1)
    run = make_run(tmp_path, {"bad": told, "b": "@", "c": "@"}, settings)
    measure_cold(run)
    measure_warm.measure_warm(run)
    document = finished(run)
    assert [(entry.subject, entry.stage) for entry in document.failures] == [("bad", *stages)]
    for subject in ("b", "c"):
        assert len(document.select("image", subject=subject)[0].values) == 3
        assert len(document.select("unet", subject=subject)[0].rounds) >= 3
    if told == "refuse@stage":
        assert len(document.select("image", subject="bad")[0].values) == 3


def test_fidelity_uses_the_drawings_that_are_there(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"a": "@", "diffusers": "@"}, replace(SETTINGS, blocks=("warm",), rounds=1))
    run.reference = run.plans[1]
    measure_warm.measure_warm(run)
    drawn = order(run, "draw")
    measure_fidelity(run)
    assert order(run, "draw") == drawn
    document = finished(run)
    assert [entry.subject for entry in document.select("psnr")] == ["a"]
    # Pictures of 1 and of 9; so are the latents.
    assert document.select("psnr")[0].values[0] == pytest.approx(10 * np.log10(255**2 / 64))
    assert document.select("latent_error")[0].values[0] == pytest.approx(8 / 9)


def test_fidelity_without_a_reference_is_a_row(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"a": "@"})
    measure_fidelity(run)
    (failure,) = finished(run).failures
    assert "peers install diffusers" in failure.error


def test_equal_pictures_and_arrays_of_other_shapes() -> None:
    picture = np.full((1, 2, 2, 3), 7, np.uint8)
    assert psnr(picture, picture) == np.inf
    assert np.isnan(psnr(picture, picture[:, :1]))
    assert np.isnan(latent_error(picture, picture[:, :1]))
    assert latent_error(np.array([3.0, 4.0]), np.array([3.0, 4.0])) == 0


def test_a_report_is_valid_before_anything_was_measured(tmp_path: Path) -> None:
    document = finished(make_run(tmp_path, {"a": "@"}))
    assert document.measurements == ()
    assert json.loads(to_json(document))["machine"]["cores"] >= 1
