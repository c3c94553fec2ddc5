"""The options of ``sd-export`` about engines, bundles and architectures: what goes together, what not."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints.graph_fuzz import with_graph

from sdrt.export.cli import main as cli
from sdrt.export.cli.options import parse
from sdrt.export.engines import flavours as engine_flavours
from sdrt.export.engines.options import EngineOptions, Extent
from sdrt.export.engines.report import report_lines
from sdrt.export.engines.writer import EngineReport, add_engines, engine_key, islands_of, timing_cache
from sdrt.export.manifest import check_manifest, default_size
from sdrt.export.options import AxisRange
from sdrt.runtime.admission.records import accept
from sdrt.runtime.bundle.bundle import EMBEDDED, Bundle
from sdrt.runtime.bundle.engine_search import list_engines
from sdrt.runtime.bundle.engines import ENGINE_NAME, EngineManifest
from sdrt.runtime.bundle.manifest import FileEntry
from sdrt.runtime.devices.gpu.discovery import Gpu
from sdrt.runtime.errors import BackendError, OutputError, UsageError

BUNDLE = str(EMBEDDED)
RTX = "tensorrt-rtx"


# --- which command it is ---


def test_a_model_and_a_folder_export() -> None:
    arguments = parse(["models/emoji", "--fp16", "out", "--engine", RTX])  # options in between
    assert (arguments.mode, arguments.model, arguments.out) == ("export", "models/emoji", Path("out"))
    assert (arguments.dtype, arguments.opset) == ("fp16", 23)
    assert [options.flavour for options in arguments.engines] == [RTX]


def test_a_bundle_alone_gets_engines() -> None:
    arguments = parse([BUNDLE, "--engine", RTX, "--engine", "onnxruntime-cuda", "--engine", RTX])
    assert (arguments.mode, arguments.out) == ("engines", None)
    assert [options.flavour for options in arguments.engines] == [RTX, "onnxruntime-cuda"]


@pytest.mark.parametrize("seed", [["--weights-seed", "7"], ["--weights_seed=7"]])  # dashes or underscores
def test_an_architecture_takes_the_place_of_the_model(seed: list[str]) -> None:
    arguments = parse(["--architecture", "sd15", "--random-weights", "out", *seed])
    assert (arguments.mode, arguments.model, arguments.out) == ("export", None, Path("out"))
    assert (arguments.architecture, arguments.weights_seed) == ("sd15", 7)


def test_engines_take_the_sizes_of_the_export_and_their_own_profiles() -> None:
    flags = ["--batch", "1..2..4", "--height", "512", "--profile", "batch=1", "--profile", "width=256..512"]
    (options,) = parse(["model", "out", "--engine", RTX, *flags]).engines
    height = {"height": Extent(512, None, 512)}
    assert options.profiles == (
        {"batch": Extent(1, None, 1), **height},
        {"batch": Extent(1, 2, 4), **height, "width": Extent(256, None, 512)},
    )


def test_what_the_builder_is_told() -> None:
    flags = ["--workspace", "2GiB", "--optimization-level", "5", "--refit", "--timing-cache", "here"]
    targets = ["--compute-capability", "8.9", "8.6"]
    (options,) = parse([BUNDLE, "--engine", RTX, *flags, *targets, "--allow-unfused-attention"]).engines
    assert options == EngineOptions(
        RTX, ({},), 2 << 30, 5, ("8.6", "8.9"), refit=True, timing_cache=Path("here"), allow_unfused=True
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "MODEL is missing"),
        (["model"], "OUT is missing: the folder of the bundle to make of model"),
        (["model", "--engine", RTX], "model is no bundle (there is no manifest.json) and OUT is missing"),
        (["", "out"], "MODEL is empty"),
        (["model", ""], "OUT is empty"),
        ([BUNDLE], "is a bundle already; say with --engine which engines to add"),
        ([BUNDLE, "out"], "adds engines to it in its place, without OUT"),
        ([BUNDLE, "--engine", RTX, "--fp16"], "--dtype is for exporting"),
        ([BUNDLE, "--engine", RTX, "--opset", "0"], "--opset is for exporting"),
        ([BUNDLE, "--engine", RTX, "--vae", "x"], "--vae is for exporting"),
        ([BUNDLE, "--engine", RTX, "--zero-snr"], "--zero-snr is for exporting"),
        ([BUNDLE, "--engine", RTX, "--fp16-weights"], "--fp16-weights is for exporting"),
        (["--architecture", "sd15", "out"], "--architecture and --random-weights go together"),
        (["model", "out", "--random-weights"], "--architecture and --random-weights go together"),
        (["--architecture", "sd15", "--random-weights", "model", "out"], "takes the place of MODEL"),
        (["--architecture", "sd15", "--random-weights"], "OUT is missing"),
        (["--architecture", "sd15", "--random-weights", "out", "--revision", "main"], "--revision is for"),
        (["--architecture", "sd15", "--random-weights", "out", "--config", "x"], "--config is for a MODEL"),
        (
            ["--architecture", "sd15", "--random-weights", "out", "--weights-seed", "-1"],
            "--weights-seed is -1",
        ),
        (["model", "out", "--weights-seed", "1"], "--weights-seed is for --random-weights"),
        (["model", "out", "--batch", "1..2..3"], "OPT is for engines, give --engine too"),
        (["model", "out", "--profile", "batch=1"], "--profile is for engines: give --engine too"),
        (["model", "out", "--compute-capability", "8.6"], "--compute-capability is for engines"),
        (["model", "out", "--workspace", "1GiB"], "--workspace is for engines"),
        (["model", "out", "--optimization-level", "0"], "--optimization-level is for engines"),
        (["model", "out", "--refit"], "--refit is for engines"),
        (["model", "out", "--timing-cache", "x"], "--timing-cache is for engines"),
        (["model", "out", "--allow-unfused-attention"], "--allow-unfused-attention is for engines"),
        ([BUNDLE, "--engine", RTX, "--optimization-level", "6"], "--optimization-level is 6: 0 to 5"),
        ([BUNDLE, "--engine", RTX, "--workspace", "1GB"], "such as 512MiB or 4GiB"),
        ([BUNDLE, "--engine", RTX, "--profile", "depth=1"], "AXIS=SIZE"),
        ([BUNDLE, "--engine", RTX, "--compute-capability", "sm86"], "--compute-capability is 'sm86'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value).replace(BUNDLE, "BUNDLE"),
)
def test_what_does_not_go_together_is_one_line(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(flags) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("sd-export: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--engine", "tensorrt-9"], "invalid choice: 'tensorrt-9'"),
        (["--architecture", "sd3", "--random-weights"], "invalid choice: 'sd3'"),
        (["--compute-capability"], "expected at least one argument"),
        (["--weights-seed", "x"], "invalid int value"),
    ],
)
def test_values_that_do_not_exist_are_one_line(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["model", "out", *flags])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


# --- what the bundle or the machine does not allow ---


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")))


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--height", "72"], 2, "height 72: the bundle's graphs admit multiples of 16 from 64 to 128"),
        (["--batch", "9"], 2, "batch 9: the bundle's graphs admit 1 to 8 images"),
        (["--chunks", "16"], 2, "chunks 16: the bundle's graphs admit prompts of"),
        (["--compute-capability", "9.0"], 2, "tensorrt-rtx builds for 7.5, 8.0, 8.6"),
    ],
)
def test_sizes_and_targets_that_are_not_to_be_had(
    bundle: Path, flags: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(bundle), "--engine", RTX, *flags]) == status
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not (bundle / "engines").exists()


def test_a_damaged_bundle_gets_no_engines(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "unet" / "model.onnx").write_bytes(b"")
    assert cli.main([str(bundle), "--engine", RTX]) == 3
    assert "unet/model.onnx has 0 bytes" in capsys.readouterr().err


def test_a_strangers_graph_is_looked_through_before_a_builder_reads_it(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a bundle that was exported here it is not: that is known."""
    monkeypatch.setattr("sdrt.export.engines.writer.run_build", _refuse)
    with_graph(bundle, "unet", b"no graph")
    command = [str(bundle), "--engine", "onnxruntime-cuda"]
    assert cli.main(command) == 3
    assert "no graph that sdrt reads" in capsys.readouterr().err
    assert not (bundle / "engines").exists()
    for part in Bundle.open(bundle).manifest.components.values():
        accept(part.files)
    assert cli.main(command) == 7


def test_an_engines_manifest_that_is_a_pipe_is_no_engine(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdrt.export.engines.writer.run_build", _refuse)
    options = EngineOptions("onnxruntime-cuda")
    version = engine_flavours.flavour_version(options.flavour)
    folder = bundle / "engines" / engine_key(Bundle.open(bundle), "unet", options, version, ()).folder_name()
    folder.mkdir(parents=True)
    os.mkfifo(folder / ENGINE_NAME)
    with pytest.raises(BackendError, match="not here"):
        add_engines(bundle, options, components=["unet"])


def test_a_flavour_that_is_not_installed_says_what_to_install(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("tensorrt", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    for flavour, hint in ((RTX, "pip install 'sdrt[rtx]'"), ("tensorrt", "from NVIDIA")):
        assert cli.main([str(bundle), "--engine", flavour]) == 7
        message = capsys.readouterr().err
        assert f"{flavour} is not installed" in message
        assert hint in message


def test_a_flavour_that_is_missing_is_said_before_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_export", lambda *_: pytest.fail("exported"))
    monkeypatch.setattr(engine_flavours, "flavour_version", _refuse)
    assert cli.main([str(EMBEDDED.parent), str(tmp_path / "out"), "--engine", RTX]) == 7


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What an export was asked to write, which ends there: checkpoint, place, options."""
    given: list[Any] = []

    def write(checkpoint: Any, out: Path, options: Any, **_: object) -> Any:
        given[:] = checkpoint, out, options
        raise BackendError("enough")

    monkeypatch.setattr("sdrt.export.writer.write_bundle", write)
    return given


def test_an_architecture_is_exported_with_its_seed(tmp_path: Path, asked: list[Any]) -> None:
    arguments = ["--architecture", "sd15", "--random-weights", str(tmp_path / "out"), "--weights-seed", "7"]
    assert cli.main([*arguments, "--fp16", "--batch", "2"]) == 7
    checkpoint, out, options = asked
    assert "sd15 with random weights, seed 7" in checkpoint.source
    assert out == (tmp_path / "out").resolve()
    assert (options.precision, options.batch.maximum, options.height.maximum) == ("fp16", 2, 1024)


@pytest.mark.parametrize(
    ("flags", "height", "width"),
    [
        ([], AxisRange(8, 32, 4), AxisRange(8, 32, 4)),
        (["--height", "16"], AxisRange(16, 16, 2), AxisRange(8, 32, 4)),
        (["--height", "16..24", "--width", "18"], AxisRange(16, 24, 4), AxisRange(18, 18, 2)),
        (["--engine", "onnxruntime-cuda"], AxisRange(16, 16, 2), AxisRange(16, 16, 2)),
    ],
    ids=["no option", "one side", "both sides", "an engine"],
)
def test_an_export_without_an_engine_draws_half_to_twice_the_models_own_size(
    tiny_checkpoint: Path,
    tmp_path: Path,
    asked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    height: AxisRange,
    width: AxisRange,
) -> None:
    monkeypatch.setattr(cli, "check_flavour", lambda *_: None)
    assert cli.main([str(tiny_checkpoint), str(tmp_path / "out"), *flags]) == 7
    checkpoint, _, options = asked
    assert (options.height, options.width) == (height, width)
    check_manifest(checkpoint, options)
    assert default_size(checkpoint, options)[0] == 16


@pytest.mark.parametrize(
    ("native", "multiple", "sides"),
    [
        (512, 64, (256, 1024)),
        (768, 64, (384, 1536)),
        (1024, 32, (512, 2048)),
        (192, 128, (192, 192)),  # no multiple: it would not be in the range
        (192, 64, (128, 384)),  # half is no multiple
        (64, 64, (64, 128)),
        (4096, 64, (2048, 4096)),
        (8192, 64, (4096, 8192)),  # refused afterwards, by its own size
    ],
)
def test_half_to_twice_in_whole_multiples(native: int, multiple: int, sides: tuple[int, int]) -> None:
    assert cli.usual_side(native, multiple, fixed=False) == sides
    assert cli.usual_side(native, multiple, fixed=True) == (native, native)


def test_engines_that_cannot_be_built_cost_no_bundle(
    tiny_checkpoint: Path,
    tmp_path: Path,
    traced_before: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, flavour = tmp_path / "out", "onnxruntime-cuda"
    with monkeypatch.context() as patch:
        patch.setattr("sdrt.export.engines.writer.run_build", _refuse)
        assert cli.main([str(tiny_checkpoint), str(out), "--engine", flavour, *traced_before]) == 7
    assert capsys.readouterr().err.splitlines()[-1] == "sd-export: not here"  # after remarks on the model
    bundle = Bundle.open(out)
    assert not (out / "engines").exists()
    assert cli.main([str(out), "--engine", flavour, "--quiet"]) == 0
    engines, damaged = list_engines(bundle)
    assert {engine.manifest.key.component for engine in engines} == set(bundle.manifest.components)
    assert damaged == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _refuse(*_: object, **__: object) -> Any:
    raise BackendError("not here")


def test_tensorrt_builds_for_the_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_flavours, "find_gpu", lambda: Gpu(0, "imagined", (9, 0)))
    for asked in ((), ("current",)):
        assert engine_flavours.resolve_targets("tensorrt", asked) == ("9.0",)
    assert engine_flavours.resolve_targets(RTX, ("current",)) == ("9.0",)
    with pytest.raises(UsageError, match="tensorrt builds for the GPU of the machine"):
        engine_flavours.resolve_targets("tensorrt", ("8.6",))
    monkeypatch.setattr(engine_flavours, "find_gpu", _refuse)
    with pytest.raises(BackendError, match="not here; tensorrt-rtx builds without one"):
        engine_flavours.resolve_targets("tensorrt", ())
    with pytest.raises(BackendError, match=r"not here; name targets such as 8\.6"):
        engine_flavours.resolve_targets(RTX, ("current",))


def test_onnxruntimes_graph_is_for_any_gpu() -> None:
    assert engine_flavours.resolve_targets("onnxruntime-cuda", ()) == ()
    with pytest.raises(UsageError, match="its graph runs on any GPU"):
        engine_flavours.resolve_targets("onnxruntime-cuda", ("8.6",))


# --- the timing cache, islands, the report ---


def test_only_tensorrt_measures_and_keeps_its_timings_apart_by_version_and_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "cache"))
    opened = Bundle.open(EMBEDDED, verify=False)
    options = EngineOptions("tensorrt")
    key = engine_key(opened, "unet", options, "11.1.0", ("9.0",))
    assert timing_cache(options, key) == str(tmp_path / "cache" / "timings" / "11.1.0-sm9.0.cache")
    assert timing_cache(EngineOptions(RTX), key) is None
    named = EngineOptions("tensorrt", timing_cache=tmp_path / "a" / "b")
    assert timing_cache(named, key) == str(tmp_path / "a" / "b")
    # A cache of the user's own that cannot be kept is no reason to stop; a file that was asked for is.
    (tmp_path / "file").touch()
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "file"))
    assert timing_cache(options, key) is None
    with pytest.raises(OutputError):
        timing_cache(EngineOptions("tensorrt", timing_cache=tmp_path / "file" / "b"), key)


def test_islands_are_those_of_the_manifests_range_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(EMBEDDED, verify=False)
    ranges = {"vae_decoder": {"islands": ["conv_1", "conv_2"]}, "unet": {}}
    monkeypatch.setattr(type(opened.manifest), "ranges", ranges, raising=False)
    assert islands_of(opened, "vae_decoder") == ["conv_1", "conv_2"]
    assert islands_of(opened, "unet") == []
    assert islands_of(opened, "text_encoder") == []


def test_the_report_gives_the_figures_of_each_engine() -> None:
    opened = Bundle.open(EMBEDDED, verify=False)
    key = engine_key(opened, "unet", EngineOptions(RTX), "1.7", ("8.0+",))
    facts = {
        "build_seconds": 21.4,
        "peak_memory_bytes": 3 << 30,
        "activation_bytes": 27 << 20,
        "passes": {"written_out": {"node_sdpa_7": "its heads are 512 wide"}},
        "attention": {"nodes": 31, "fused": 31, "decomposed": []},
        "compared": [
            {"relative_l2": 1e-4, "tolerance": 2e-2},
            {"relative_l2": 3e-4, "tolerance": 2e-2},
        ],
    }
    manifest = EngineManifest(key, (FileEntry("model.plan", 1_700_000_000, "0" * 64),), facts)
    heading, line = report_lines([EngineReport("unet", Path("x"), manifest, new=True)])
    assert heading == "tensorrt-rtx 1.7, compute capability 8.0+:"
    assert line == (
        "  unet: rows 1..16, latent_height 16..32, latent_width 16..32, context 77; "
        "31 of 32 attentions fused, 1 written out; "
        "1700.0 MB; 27 MiB of scratch memory; built in 21.4 s with 3.0 GiB; "
        "compared with ONNX Runtime: 3.0e-04 at most, 2.0e-02 allowed"
    )
    (_, again) = report_lines([EngineReport("unet", Path("x"), manifest, new=False)])
    assert "; was there already; " in again
    assert report_lines([]) == []
