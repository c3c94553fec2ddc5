"""Engines for real: TensorRT for RTX builds without a GPU, so what `sd-export --engine` leaves is seen."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from support.made_once import exported_once
from support.references.contrib_definitions import proto_written_out

from sdrt.export.cli import main as cli
from sdrt.export.engines.compare import NO_GPU, random_inputs, tolerance
from sdrt.export.engines.flavours import flavour_version
from sdrt.export.engines.options import EngineOptions, Extent
from sdrt.export.engines.process import run_build
from sdrt.export.engines.writer import LAYERS_NAME, add_engines, build_job, engine_key
from sdrt.export.parity.components import compare
from sdrt.runtime.bundle.bundle import EMBEDDED, Bundle
from sdrt.runtime.bundle.engine_search import find_engine, list_engines
from sdrt.runtime.bundle.engines import EngineManifest
from sdrt.runtime.devices.gpu.discovery import find_gpu
from sdrt.runtime.errors import BackendError

RTX = "tensorrt-rtx"
CHECKPOINT = EMBEDDED.parent
ONE_SIZE = {"batch": Extent(1, None, 1), "height": Extent(64, None, 64), "width": Extent(64, None, 64)}
ONE_SIZE_FLAGS = ("--batch", "1", "--height", "64", "--width", "64")
# The child with the graph left as it is, to see what TensorRT makes of it.
UNPREPARED = """
import sys
from dataclasses import make_dataclass
from sdrt.export.engines import child as engine_child
from sdrt.export.passes import pipeline as pass_pipeline
pass_pipeline.prepare_for_tensorrt = lambda *_: make_dataclass("Report", [])()
sys.exit(engine_child.main(*sys.argv[1:]))
"""


@pytest.fixture(scope="session")
def emoji_fp16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model exported in fp16, 64 to 128 pixels, 1 to 2 images. Read only."""

    def export(out: Path) -> None:
        sizes = ["--height", "64..128", "--width", "64..128", "--batch", "1..2"]
        assert cli.main([str(CHECKPOINT), str(out), "--fp16", "--quiet", *sizes]) == 0

    return exported_once("emoji-fp16", tmp_path_factory.mktemp("emoji") / "fp16", export, CHECKPOINT)


@pytest.fixture(scope="module")
def built(emoji_fp16: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The same with engines for all its sizes, and what was said of them. Read only."""
    bundle = copy_of(emoji_fp16, tmp_path_factory.mktemp("built") / "fp16")
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "put", said.append)
        assert cli.main([str(bundle), "--engine", RTX]) == 0
    return bundle, "\n".join(said)


@pytest.fixture
def fp16_copy(emoji_fp16: Path, tmp_path: Path) -> Path:
    return copy_of(emoji_fp16, tmp_path / "fp16")


def copy_of(bundle: Path, target: Path) -> Path:
    """A bundle without its engines."""
    return Path(shutil.copytree(bundle, target, ignore=shutil.ignore_patterns("engines", ".engines*")))


def engines_of(bundle: Path) -> dict[str, EngineManifest]:
    engines, damaged = list_engines(Bundle.open(bundle))
    assert damaged == []
    return {engine.manifest.key.component: engine.manifest for engine in engines}


def attention_nodes(bundle: Path, component: str) -> list[str]:
    model = ir.load(bundle / component / "model.onnx")
    return [str(node.name) for node in model.graph.all_nodes() if node.op_type == "Attention"]


def left_over(bundle: Path) -> list[str]:
    return [path.name for path in bundle.rglob(".*")]


# --- whole bundles ---


def test_every_component_of_the_embedded_model_in_fp16(built: tuple[Path, str]) -> None:
    place, printed = built
    bundle = Bundle.open(place)
    assert list(engines_of(place)) == sorted(bundle.manifest.components)
    for name in bundle.manifest.components:
        engine = find_engine(bundle, name, RTX, flavour_version(RTX), (8, 6), {"batch": 2, "rows": 4})
        facts, key = engine.manifest.facts, engine.manifest.key
        assert len(engine.read_plan()) == engine.manifest.files[0].size > 1 << 20
        assert key.targets == ("8.0+",)
        assert key.precision == "fp16"
        assert facts["attention"]["decomposed"] == []
        assert facts["build_seconds"] > 0
        assert facts["peak_memory_bytes"] > engine.manifest.files[0].size
        assert facts["activation_bytes"] > 0
        assert f"{name}: {key.profiles[0]}; " in printed
        # At least: TensorRT finds the pattern of one that was written out, where it has a kernel for it.
        kernels = [layer for layer in layers_of(engine.folder) if "_mha_" in layer["name"]]
        assert len(kernels) >= facts["attention"]["nodes"]
    assert engines_of(place)["unet"].facts["attention"] == {
        "nodes": len(attention_nodes(place, "unet")),
        "fused": len(attention_nodes(place, "unet")),
        "decomposed": [],
    }
    assert engines_of(place)["text_encoder"].facts["attention"]["fused"] == 2
    assert left_over(place) == []
    assert ("compared with ONNX Runtime: " + NO_GPU in printed) == no_gpu()


def layers_of(folder: Path) -> list[dict[str, Any]]:
    document = json.loads((folder / LAYERS_NAME).read_text())
    assert document["source"] == "builder log"
    layers: list[dict[str, Any]] = document["layers"]
    assert len(layers) == json.loads((folder / "engine.json").read_text())["facts"]["layers"]
    return layers


def no_gpu() -> bool:
    try:
        find_gpu()
    except BackendError:
        return True
    return False


def test_the_embedded_bundle_in_fp32_has_its_attention_written_out(tmp_path: Path) -> None:
    bundle = copy_of(EMBEDDED, tmp_path / "bundle")
    reports = add_engines(bundle, EngineOptions(RTX, (ONE_SIZE,)))
    assert {
        report.component: report.manifest.facts["attention"]["nodes"] for report in reports
    } == dict.fromkeys(Bundle.open(bundle).manifest.components, 0)
    assert all(report.manifest.key.precision == "fp32" for report in reports)
    assert "mha" not in (reports[1].folder / LAYERS_NAME).read_text()


def test_several_profiles_and_targets_are_one_engine(fp16_copy: Path) -> None:
    profiles = [
        "--profile",
        "batch=1,rows=2,height=64,width=64",
        "--profile",
        "batch=1..2,height=64..96..128,chunks=1..4",
    ]
    targets = ["--compute-capability", "8.9", "8.6"]
    assert cli.main([str(fp16_copy), "--engine", RTX, *profiles, *targets, "--quiet"]) == 0
    unet = engines_of(fp16_copy)["unet"]
    assert unet.key.targets == ("8.6", "8.9")
    assert [str(profile) for profile in unet.key.profiles] == [
        "rows 2, latent_height 16, latent_width 16, context 77",
        "rows 1..4, latent_height 16..32, latent_width 16..32, context 77..308",
    ]
    assert unet.facts["attention"]["fused"] == len(attention_nodes(fp16_copy, "unet"))
    bundle, version = Bundle.open(fp16_copy), flavour_version(RTX)
    assert find_engine(bundle, "unet", RTX, version, (8, 6), {"rows": 4, "latent_height": 32})
    with pytest.raises(BackendError, match=r"it runs on compute capability 8\.6, 8\.9, this GPU has 12\.0"):
        find_engine(bundle, "unet", RTX, version, (12, 0))


def test_onnxruntimes_engine_is_a_graph_that_shares_the_weights(tmp_path: Path) -> None:
    place = copy_of(EMBEDDED, tmp_path / "bundle")
    assert cli.main([str(place), "--engine", "onnxruntime-cuda", "--quiet"]) == 0
    bundle = Bundle.open(place)
    sizes = {"batch": 2, "rows": 2, "latent_height": 16, "latent_width": 24, "height": 64, "width": 96}
    sizes["context"] = 77
    for name, engine in engines_of(place).items():
        assert [entry.path for entry in engine.files] == ["model.onnx"]
        assert engine.files[0].size < (place / name / "model.onnx.data").stat().st_size / 2
        assert engine.key.targets == ()
        (folder,) = (place / "engines").glob(f"onnxruntime-cuda-*-{name}-*")
        feeds = random_inputs(bundle, name, sizes)
        graph = onnx.load(folder / "model.onnx", load_external_data=False)
        actual = outputs_of(proto_written_out(graph).SerializeToString(), place / name, feeds)
        expected = outputs_of((place / name / "model.onnx").read_bytes(), place / name, feeds)
        for got, want in zip(actual, expected, strict=True):
            assert compare(got, want)[0] <= tolerance(bundle, name)


def outputs_of(graph: bytes, weights: Path, feeds: dict[str, Any]) -> list[NDArray[Any]]:
    """Run a graph on the CPU with the weights of a folder, as the CUDA executor opens it."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[Any]] = session.run(None, feeds)
    return outputs


# --- attention that is not fused ---


def job_of(bundle: Path, component: str, folder: Path, **changes: Any) -> Mapping[str, Any]:
    """The job of one component at one size, with the folders that the writer would have made."""
    opened = Bundle.open(bundle)
    options = EngineOptions(RTX, (ONE_SIZE,))
    key = engine_key(opened, component, options, flavour_version(RTX), ("8.0+",))
    (folder / "work").mkdir()
    return {**build_job(opened, key, options, folder, folder / "model.plan"), **changes}


def test_a_float32_attention_does_not_build_and_is_named(tmp_path: Path) -> None:
    job = job_of(EMBEDDED, "text_encoder", tmp_path)
    first, _ = attention_nodes(EMBEDDED, "text_encoder")
    with pytest.raises(BackendError, match=f"no fused kernel .*{first}: FLOAT, heads 32 wide.*--fp16"):
        run_build(job, tmp_path / "work", command=[sys.executable, "-c", UNPREPARED])
    assert not (tmp_path / "model.plan").exists()


def test_an_attention_that_tensorrt_takes_apart_in_silence_is_an_error(
    emoji_fp16: Path, tmp_path: Path
) -> None:
    # The decoder's one head of one small image: it builds, with a softmax between two matrix products.
    (node,) = attention_nodes(emoji_fp16, "vae_decoder")
    command = [sys.executable, "-c", UNPREPARED]
    for folder in ("strict", "lenient"):
        (tmp_path / folder).mkdir()
    strict = job_of(emoji_fp16, "vae_decoder", tmp_path / "strict")
    with pytest.raises(BackendError, match=rf"1 of 1 attentions as separate kernels \({node}\)"):
        run_build(strict, tmp_path / "strict" / "work", command=command)
    lenient = job_of(emoji_fp16, "vae_decoder", tmp_path / "lenient", allow_unfused=True)
    result = run_build(lenient, tmp_path / "lenient" / "work", command=command)
    assert result.facts["attention"] == {"nodes": 1, "fused": 0, "decomposed": [node]}


# --- what is there already, and accidents ---


def test_an_engine_that_is_there_is_kept_unless_forced(
    built: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(built[0], tmp_path / "bundle"))
    arguments = [str(bundle), "--engine", RTX]
    before = stamps(bundle)
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.count("is there already") == 4
    assert stamps(bundle) == before

    # One that is cut short counts as not there, and is built again, alone.
    (plan,) = (bundle / "engines").glob("*text_encoder*/model.plan")
    plan.write_bytes(plan.read_bytes()[:-1])
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.count("is there already") == 3
    engines, damaged = list_engines(Bundle.open(bundle))
    assert [len(engine.read_plan()) > 0 for engine in engines] == [True] * 4
    assert damaged == []

    assert cli.main([*arguments, "--force", "--quiet"]) == 0
    assert stamps(bundle).keys() == before.keys()
    assert not set(stamps(bundle).values()) & set(before.values())
    assert left_over(bundle) == []


def stamps(bundle: Path) -> dict[str, int]:
    return {plan.parent.name: plan.stat().st_ino for plan in (bundle / "engines").glob("*/model.plan")}


def test_a_build_that_fails_leaves_nothing_and_says_what_to_do(
    fp16_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(fp16_copy), "--engine", RTX, "--workspace", "1MiB", *ONE_SIZE_FLAGS]) == 7
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "TensorRT cannot build the " in message
    assert "raise --workspace (now 1MiB)" in message
    assert not (fp16_copy / "engines").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_leaves_no_process_and_no_engine(fp16_copy: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-m", "sdrt.export.cli", str(fp16_copy), "--engine", RTX, *ONE_SIZE_FLAGS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            assert any("unet: build" in line for line in parent.stdout)
            children = wait_for_child(parent.pid)
            parent.send_signal(how)
            _, message = parent.communicate(timeout=60)
        finally:
            parent.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    if how == signal.SIGKILL:
        # What it left is hidden from the runtime, and the next build of the same engines removes it.
        assert list_engines(Bundle.open(fp16_copy)) == ([], [])
        assert cli.main([*command[3:], "--quiet"]) == 0
        assert len(engines_of(fp16_copy)) == 4
    else:
        assert parent.returncode == 130
        assert message == "sd-export: interrupted; nothing unfinished was left behind\n"
        assert not (fp16_copy / "engines").exists()
    assert left_over(fp16_copy) == []


def wait_for_child(pid: int) -> list[int]:
    """The processes that a process has started, as soon as there are any."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        if text.strip():
            return [int(child) for child in text.split()]
        time.sleep(0.02)
    pytest.fail("the build started no process")
