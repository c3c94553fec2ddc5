"""``sd-bench`` as a command: what it refuses, a smoke run on the embedded model, Ctrl-C."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdrt.benchmarks.cli import main
from sdrt.benchmarks.document.document import Subject, read
from sdrt.benchmarks.harness import export_model, measure
from sdrt.benchmarks.harness.plan import default_sizes, growth_steps, settings_for
from sdrt.benchmarks.harness.run import SubjectPlan
from sdrt.benchmarks.options import parser
from sdrt.benchmarks.peers.environments import MARKER
from sdrt.kernels.cache import UNUSED_SECONDS
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.errors import SdrtError

FAKE = Path(__file__).with_name("fake_worker.py")


def options(*words: str) -> argparse.Namespace:
    return parser().parse_args(words)


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--sizes", "64x"], 2, "argument --sizes: '' is no whole number"),
        (
            ["--sizes", "72"],
            2,
            "--sizes has 72x72: the bundle admits a height of multiples of 16 from 64 to 128",
        ),
        (["--steps", "0"], 2, "'0' is no whole number of 1 or more"),
        (["--batches", "1,,2"], 2, "'' is no whole number"),
        (["--only", "cold,hot"], 2, "'hot' is none of cold, warm, growth, limits, fidelity"),
        (["--guidance-scale", "1"], 2, "every step is guided"),
        (["--guidance-scale", "nan"], 2, "every step is guided"),
        (["--peers", "dall-e"], 2, "unknown peer 'dall-e'; there is auto, none, "),
        (["--peers", ","], 2, "a list of names is empty"),
        (["--backends", "cuda"], 2, "unknown backend 'cuda'; there is auto, "),
        (["--backends", "tensorrt", "--peers", "none"], 7, "the backend tensorrt cannot run here: "),
        (["--backends", "none", "--peers", "none"], 2, "there is nothing to measure emoji with"),
        (["no-such-model"], 2, "MODEL is 'no-such-model': give a bundle"),
        (["emoji", "--checkpoint", "/no/such"], 2, "--checkpoint is /no/such: it has no model_index.json"),
        (["sd15", "--checkpoint", "/no/such"], 2, "--checkpoint goes with a bundle; sd15"),
        (["--quick", "--report", "/proc/no/such"], 8, "cannot make /proc/no/such"),
        (["--bogus"], 2, "unrecognized arguments: --bogus"),
    ],
)
def test_what_is_refused(
    words: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = [] if "--peers" in words else ["--peers", "none"]
    try:
        found = main([*words, "--quiet", *peers])
    except SystemExit as error:
        found = int(error.code or 0)
    out, err = capsys.readouterr()
    assert (found, out) == (status, "")
    assert says in err
    assert err.count("\n") == 1


def test_a_peer_that_was_named_and_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sdrt.benchmarks.peers.registry.is_installed", lambda _: False)
    assert main(["--peers", "diffusers", "--quiet"]) == 7
    assert (
        "the peer diffusers is not installed: `sd-bench peers install diffusers`" in capsys.readouterr().err
    )


def test_help_is_quick_and_lists_the_exit_statuses() -> None:
    program = "import sys; from sdrt.benchmarks.cli import main; main(['--help'])"
    report = "; ".join(
        ["import atexit, sys", "atexit.register(lambda: print(sorted(sys.modules), file=sys.stderr))"]
    )
    done = subprocess.run([sys.executable, "-c", f"{report}; {program}"], capture_output=True, text=True)
    assert "130 interrupted" in done.stdout
    assert not {"numpy", "onnx", "torch", "rich", "onnxruntime"} & set(
        json.loads(done.stderr.replace("'", '"'))
    )


def test_the_settings_of_the_embedded_model() -> None:
    manifest, said = Bundle.open().manifest, list[str]()
    settings = settings_for(manifest, options(), said.append)
    assert settings.main == (64, 64, 1, 20)
    assert settings.sizes == ((64, 64), (96, 96), (128, 128))
    assert settings.growth_steps == growth_steps(20) == (5, 10, 20, 40)
    assert (settings.batches, said) == ((1, 2, 4, 8), [])
    small = settings_for(manifest, options("--quick", "--steps", "3", "--batches", "2,16"), said.append)
    assert (small.steps, small.sizes, small.rounds, small.cold_rounds) == (3, ((64, 64),), 2, 1)
    assert small.batches == (2,)
    assert said == ["batch 16 is left out: the bundle draws up to 8 pictures at once"]


def test_sizes_that_nothing_grows_with_are_left_out() -> None:
    manifest = Bundle.open().manifest
    assert settings_for(manifest, options("--only", "warm"), lambda _: None).sizes == ((64, 64),)
    given = options("--only", "warm", "--sizes", "96,128")
    assert settings_for(manifest, given, lambda _: None).sizes == ((96, 96), (128, 128))


def test_few_steps_grow_from_two() -> None:
    assert growth_steps(2) == (2, 4)
    assert growth_steps(4) == (2, 4, 8)


def test_a_fixed_size_is_the_only_one(inpainting_bundle: Path) -> None:
    assert default_sizes(Bundle.open(inpainting_bundle).manifest) == ((16, 16),)


def test_a_model_that_reads_a_picture_is_refused(
    inpainting_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(inpainting_bundle), "--peers", "none", "--quiet"]) == 2
    assert "draws from a picture and a mask" in capsys.readouterr().err


def test_a_smoke_run_with_a_peer_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (sys.executable, "-S", "-E", str(FAKE), "fake", str(tmp_path / "order"), "exit@load")
    peer = SubjectPlan(Subject("fake", "Fake", "peer"), words, tmp_path)
    monkeypatch.setattr(measure, "peer_plans", lambda *_: [peer])
    report = tmp_path / "report"
    command = ["emoji", "--quick", "--peers", "none", "--rounds", "1", "--batches", "2"]
    command += ["--only", "cold,warm,growth,limits"]
    assert main([*command, "--backends", "onnxruntime-cpu", "--report", str(report)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("# sd-bench\n\n")
    assert "## emoji" in out.splitlines()
    assert "fake: cold start failed: it ended with exit status 3; its last line: the library says why" in err
    document = read(report / "report.json")
    assert document.complete
    assert document.command[:2] == ("sd-bench", "emoji")
    assert [(entry.subject, entry.stage) for entry in document.failures] == [("fake", "cold start")]
    assert [subject.name for subject in document.subjects] == ["onnxruntime-cpu", "fake"]
    measured = {entry.quantity for entry in document.measurements}
    assert measured >= {"cold_total", "image", "step", "unet", "vae_decoder", "vae_encoder", "text_encoder"}
    assert measured >= {"memory", "peak_memory", "cold_peak_memory", "cold_peak_anonymous"}
    (model,) = document.models
    assert model.weights_bytes == pytest.approx(22.6e6, rel=0.01)
    assert {work.component for work in model.work} >= {"unet", "vae_decoder"}
    (ceilings,) = document.ceilings
    assert ceilings.flop_per_s > 1e9
    assert len(document.noise.probe_seconds) == len(document.noise.load_average) > 3


def test_ctrl_c_leaves_a_valid_report(tmp_path: Path) -> None:
    report = tmp_path / "report"
    words = ["emoji", "--quick", "--peers", "none", "--only", "cold", "--cold-rounds", "1000"]
    command = [sys.executable, "-m", "sdrt.benchmarks", *words, "--quiet", "--report", str(report)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        for _ in range(300):
            time.sleep(0.1)
            if (report / "report.json").exists() and read(report / "report.json").measurements:
                break
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
    assert (running.returncode, out) == (130, "")
    assert err == f"sd-bench: interrupted; what was measured until then is in {report}\n"
    document = read(report / "report.json")
    assert not document.complete
    assert document.select("cold_total")[0].values


def test_a_model_that_cannot_be_converted_is_a_row_after_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> Path:
        raise SdrtError("its exporter failed")

    monkeypatch.setattr("sdrt.benchmarks.peers.registry.is_installed", lambda _: True)
    monkeypatch.setattr("sdrt.benchmarks.harness.plan.prepared", refuse)
    monkeypatch.setattr(measure, "measure_model", lambda *_: None)
    command = ["emoji", "--quick", "--quiet", "--peers", "openvino", "--only", "cold"]
    command += ["--backends", "onnxruntime-cpu", "--report", str(tmp_path)]
    assert main(command) == 1
    assert "nothing could be measured: openvino: converting the model" in capsys.readouterr().err
    document = read(tmp_path / "report.json")
    assert [subject.name for subject in document.subjects] == ["onnxruntime-cpu", "openvino"]
    assert [entry.error for entry in document.failures] == ["its exporter failed"]


def test_render_writes_a_report_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sdrt.benchmarks.document.document import to_json
    from sdrt.benchmarks.document.recorder import Recorder

    (tmp_path / "old.json").write_text(to_json(Recorder(("sd-bench",)).document(complete=False)))
    assert main(["render", str(tmp_path / "old.json"), "--report", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "index.html").is_file()
    assert main(["render", str(tmp_path / "none.json"), "--report", str(tmp_path / "new")]) == 2
    assert "none.json cannot be read: No such file" in capsys.readouterr().err


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The words of every export, which writes nothing but a manifest; the cache is empty."""
    from sdrt.export.cli import main as cli

    found: list[list[str]] = []

    def export(words: list[str]) -> int:
        found.append(words)
        Path(words[1]).mkdir(parents=True)
        (Path(words[1]) / "manifest.json").write_text("{}")
        return 0

    monkeypatch.setattr(cli, "main", export)
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "cache"))
    return found


def test_an_export_is_made_once(tiny_checkpoint: Path, made: list[list[str]]) -> None:
    for _ in range(2):
        assert export_model.main([str(tiny_checkpoint), "--batch", "1..2"]) == 0
    assert export_model.main([str(tiny_checkpoint), "--batch", "1..4"]) == 0
    assert [words[2:] for words in made] == [["--batch", "1..2"], ["--batch", "1..4"]]


def test_another_exporter_exports_anew(
    tiny_checkpoint: Path, made: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for digest in ("a", "a", "b"):
        monkeypatch.setattr(export_model, "exporter_digest", lambda _, digest=digest: digest)
        assert export_model.main([str(tiny_checkpoint)]) == 0
    assert len({words[1] for words in made}) == len(made) == 2


def test_exports_that_nobody_used_for_a_month_are_removed(
    tiny_checkpoint: Path, made: list[list[str]]
) -> None:
    for batch in ("1", "2"):
        assert export_model.main([str(tiny_checkpoint), "--batch", batch]) == 0
    first, second = (Path(words[1]) for words in made)
    mine = first.parent / "mine"
    mine.mkdir()
    for path in (first / MARKER, second / MARKER, mine):
        long_ago = time.time() - UNUSED_SECONDS - 60
        os.utime(path, (long_ago, long_ago))
    assert export_model.main([str(tiny_checkpoint), "--batch", "1"]) == 0  # which is a use
    assert export_model.main([str(tiny_checkpoint), "--batch", "3"]) == 0
    assert (first.is_dir(), second.exists(), mine.is_dir(), len(made)) == (True, False, True, 3)


@pytest.mark.parametrize(
    "file", ["export/new.py", "export/data/sd15/config.json", "runtime/bundle/manifest.py"]
)
def test_what_decides_a_graph_decides_the_digest_of_the_exporter(tmp_path: Path, file: str) -> None:
    root = export_model.package_root()
    for pattern in export_model.RUNTIME_SOURCES:
        found = list((root / "runtime").glob(pattern))
        assert found, f"{pattern} is not where the digest looks for it"
        for source in found:
            copy = tmp_path / source.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())
    (tmp_path / "export").mkdir()
    before = export_model.exporter_digest(tmp_path)
    (tmp_path / "export" / "__pycache__").mkdir()
    (tmp_path / "export" / "__pycache__" / "new.py").write_text("of no account")
    (tmp_path / "runtime" / "pipeline.py").write_text("of no account")
    assert export_model.exporter_digest(tmp_path) == before
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    with (tmp_path / file).open("a") as stream:
        stream.write("# changed")
    assert export_model.exporter_digest(tmp_path) != before
