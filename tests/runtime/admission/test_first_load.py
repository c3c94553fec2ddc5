"""A stranger's bundle is loaded in a process of its own first; one that is known is not."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from support.checkpoints.graph_fuzz import fuzz, with_graph
from support.checkpoints.strange_files import make_nested, make_pipe

from sdrt.runtime import Pipeline
from sdrt.runtime.admission import first_load
from sdrt.runtime.admission import records as admission
from sdrt.runtime.admission.records import admit
from sdrt.runtime.bundle import limits
from sdrt.runtime.bundle.bundle import EMBEDDED, Bundle
from sdrt.runtime.errors import BackendError, BundleError
from sdrt.runtime.system.interrupts import NOTHING_LEFT

Child = Callable[[str], None]
CPU = "onnxruntime-cpu"
OURS = (BackendError, BundleError)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who has loaded nothing yet."""
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(admission, "_KNOWN", set())


@pytest.fixture
def stranger(fresh: None, tmp_path: Path) -> Path:
    """A bundle that came from elsewhere."""
    return Path(shutil.copytree(EMBEDDED, tmp_path / "stranger"))


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Child:
    """Puts a program in the place of the one that loads; what it prints is what the parent hears."""

    def put(program: str) -> None:
        monkeypatch.setattr(first_load, "_COMMAND", ("-c", f"import os, sys, time\n{program}"))

    return put


def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", started)


TRIED = "of {} was tried in a process of its own and"
SAYS = """print('{"component": "unet"}', flush=True)\n"""


def test_a_bundle_is_tried_once(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pipeline.load(stranger, backend=CPU) as pipeline:
        ours = pipeline("a red apple", seed=1, num_inference_steps=1, output_type="numpy").images
    no_process(monkeypatch)
    monkeypatch.setattr(admission, "_KNOWN", set())  # as in another process
    with Pipeline.load(stranger, backend=CPU) as pipeline:
        again = pipeline("a red apple", seed=1, num_inference_steps=1, output_type="numpy").images
    assert (ours[0] == again[0]).all()
    with pytest.raises(AssertionError, match="a process was started"):  # another library may choke on it
        admit(Bundle.open(stranger), ["unet"], "openvino-cpu", verify=True)


@pytest.mark.parametrize(("backend", "kept"), [(CPU, [CPU]), ("openvino-cpu", [])])
def test_what_a_call_can_use_is_kept(stranger: Path, backend: str, kept: list[str]) -> None:
    """OpenVINO's models are for one shape, here the smallest."""
    admit(Bundle.open(stranger), ["text_encoder"], backend, verify=True)
    cache = Path(os.environ["SDRT_CACHE"])
    assert [folder.name for folder in cache.iterdir() if folder.name.endswith("-cpu")] == kept


def test_what_sdrt_ships_is_not_tried(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_process(monkeypatch)
    Pipeline.load(backend=CPU).close()
    assert not (tmp_path / "cache" / "accepted").exists()


def test_an_altered_graph_is_another_one(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where files are not compared with the manifest."""
    bundle = Bundle.open(stranger)
    for part in bundle.manifest.components.values():
        admission.accept(part.files, CPU)
    admit(bundle, ["unet"], CPU, verify=False)
    graph = bytearray((stranger / "unet" / "model.onnx").read_bytes())
    graph[graph.index(b"pytorch")] ^= 1
    (stranger / "unet" / "model.onnx").write_bytes(graph)
    no_process(monkeypatch)
    with pytest.raises(AssertionError, match="a process was started"):
        admit(bundle, ["unet"], CPU, verify=False)


@pytest.mark.parametrize("make", [None, os.mkfifo, os.mkdir], ids=["nothing", "pipe", "folder"])
def test_a_graph_that_is_gone_when_it_is_wanted_is_told(
    stranger: Path, make: Callable[[Path], None] | None
) -> None:
    bundle = Bundle.open(stranger)
    (stranger / "unet" / "model.onnx").unlink()
    if make is not None:
        make(stranger / "unet" / "model.onnx")
    with pytest.raises(BundleError, match=r"unet/model\.onnx in .* cannot be read"):
        admit(bundle, ["unet"], CPU, verify=False)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (
            f"{SAYS}os.kill(os.getpid(), 11)",
            f"the unet {TRIED} ended it with SIGSEGV",
        ),
        (
            "os.kill(os.getpid(), 6)",
            f"the bundle {TRIED} ended it with SIGABRT",
        ),
        (f"{SAYS}sys.exit(3)", "ended it with status 3"),
        ("""print('{"error": "no", "status": 7}')""", "no"),
        (f"{SAYS}print(chr(123)); sys.exit(1)", "ended it with status 1"),
    ],
    ids=["crash", "abort", "exit", "refused", "nonsense"],
)
def test_what_ends_a_process_ends_not_ours(stranger: Path, child: Child, program: str, words: str) -> None:
    child(program)
    with pytest.raises(OURS) as caught:
        admit(Bundle.open(stranger), ["unet"], CPU, verify=True)
    assert words.format(stranger) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (Path(os.environ["SDRT_CACHE"]) / "accepted").exists()


def test_memory_has_a_limit(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FIRST_LOAD_BYTES", 100 << 20)
    monkeypatch.setattr(limits, "FIRST_LOAD_BYTES_PER_BYTE", 0)
    monkeypatch.setattr(limits, "FIRST_LOAD_BYTES_PER_PIXEL", 0)
    with pytest.raises(OURS):
        admit(Bundle.open(stranger), ["unet"], CPU, verify=True)
    assert not (Path(os.environ["SDRT_CACHE"]) / "accepted").exists()


# A child that is in the middle of preparing something.
PREPARES = """
from sdrt.kernels.cache import private_folder
from sdrt.runtime.system.files import new_folder
with new_folder(private_folder("onnxruntime-cpu") / "0123abcd") as folder:
    (folder / "weights").write_bytes(b"half")
    (folder.parent.parent / "pid").write_text(str(os.getpid()))
    time.sleep(60)
"""
# A command that tries a bundle with that child.
TRIES = f"""
import sys
from sdrt.runtime.admission import first_load
from sdrt.runtime.console.run_command import run_command
from sdrt.runtime.console.enter import enter

first_load._COMMAND = ("-c", "import os, time" + {PREPARES!r})

def body():
    from sdrt.runtime.admission.records import admit
    from sdrt.runtime.bundle.bundle import Bundle

    admit(Bundle.open(sys.argv[1]), ["unet"], "onnxruntime-cpu", verify=True)

sys.exit(enter("command", lambda: lambda: run_command("command", body)))
"""


def prepares() -> int:
    """The child's process id, when it has begun to prepare something."""
    file, began = Path(os.environ["SDRT_CACHE"]) / "pid", time.monotonic()
    while not file.exists() or not file.read_text():
        assert time.monotonic() - began < 30
        time.sleep(0.02)
    return int(file.read_text())


def nothing_left(pid: int) -> bool:
    """Whether neither the process nor what it was preparing is there any more."""
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    return list((Path(os.environ["SDRT_CACHE"]) / CPU).iterdir()) == []


def test_an_interrupt_ends_the_process_too(stranger: Path, child: Child) -> None:
    child(PREPARES)
    found = []

    def interrupt() -> None:
        found.append(prepares())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        admit(Bundle.open(stranger), ["unet"], CPU, verify=True)
    thread.join()
    assert nothing_left(*found)


def test_an_interrupted_command_leaves_nothing_of_the_process(stranger: Path) -> None:
    command = subprocess.Popen(
        [sys.executable, "-c", TRIES, str(stranger)], stderr=subprocess.PIPE, text=True
    )
    pid = prepares()
    command.send_signal(signal.SIGINT)
    assert command.communicate(timeout=30)[1] == f"command: {NOTHING_LEFT}\n"
    assert command.returncode == 130
    assert nothing_left(pid)


def test_a_process_that_was_not_ready_in_time_leaves_nothing(
    stranger: Path, child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which need not be its fault."""
    child(SAYS + PREPARES)
    monkeypatch.setattr(limits, "FIRST_LOAD_SECONDS", 3.0)
    with pytest.raises(BundleError) as caught:
        admit(Bundle.open(stranger), ["unet"], CPU, verify=True)
    assert f"the unet {TRIED.format(stranger)} was not ready in time" in str(caught.value)
    assert "harm" not in str(caught.value)
    assert nothing_left(prepares())


def test_there_is_time_for_all_components_and_memory_for_the_largest(
    stranger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, jobs = Bundle.open(stranger), []

    def run(job: dict[str, Any], _seconds: float) -> tuple[list[dict[str, Any]], int]:
        jobs.append(job)
        return [{"done": True}], 0

    monkeypatch.setattr(first_load, "_run", run)
    for names in (["unet"], ["vae_decoder"], ["unet", "vae_decoder"]):
        first_load.load_apart(bundle, names, CPU, verify=True)
    one, other, both = jobs
    assert both["memory"] == max(one["memory"], other["memory"])
    extra = sum(entry.size for entry in bundle.component("vae_decoder").files)
    assert both["seconds"] - one["seconds"] == pytest.approx(extra * limits.FIRST_LOAD_SECONDS_PER_BYTE)


def test_a_cache_that_cannot_be_written_is_no_error(
    stranger: Path, child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    child("""print('{"done": true}')""")
    monkeypatch.setenv("SDRT_CACHE", os.devnull)
    admit(Bundle.open(stranger), ["unet"], CPU, verify=True)
    no_process(monkeypatch)
    admit(Bundle.open(stranger), ["unet"], CPU, verify=True)  # known as long as the process lives


@pytest.mark.parametrize("damage", [make_pipe, make_nested, lambda file: file.write_bytes(b"{}")])
def test_a_damaged_record_is_none(stranger: Path, child: Child, damage: Callable[[Path], None]) -> None:
    bundle = Bundle.open(stranger)
    child("""print('{"done": true}')""")
    admit(bundle, ["unet"], CPU, verify=True)
    (file,) = (Path(os.environ["SDRT_CACHE"]) / "accepted").iterdir()
    damage(file)
    admission._KNOWN.clear()
    assert not admission.accepted(bundle.component("unet").files, CPU)


@pytest.mark.parametrize("backend", [CPU, "openvino-cpu"])
def test_damaged_graphs_are_refused_or_run(fresh: None, tmp_path: Path, backend: str) -> None:
    """`support.checkpoints.graph_fuzz` tries thousands."""
    outcomes = fuzz(tmp_path, backend, seed=1, count=8)
    assert sum(outcomes.values()) == 8


def test_graphs_that_crashed_openvino_are_refused(stranger: Path) -> None:
    whole = (stranger / "text_encoder" / "model.onnx").read_bytes()
    model = onnx.load_from_string(whole)
    first = {node.op_type: index for index, node in reversed([*enumerate(model.graph.node)])}
    for index in first.values():
        damaged = onnx.load_from_string(whole)
        node = damaged.graph.node[index]
        node.op_type = "Pad"
        if len(node.input) == 1 or node.attribute:  # what is left is refused by OpenVINO, without a crash
            with_graph(stranger, "text_encoder", damaged.SerializeToString())
            with pytest.raises(BundleError, match="no graph that sdrt reads"):
                admit(Bundle.open(stranger, verify=False), ["text_encoder"], "openvino-cpu", verify=True)


@pytest.mark.parametrize("listed", [False, True], ids=["unlisted", "listed"])
def test_weights_are_read_from_listed_files_alone(stranger: Path, child: Child, listed: bool) -> None:
    """A file in a folder of the component's is not looked at by who lists files; its hash must be known."""
    child("""print('{"done": true}')""")
    (stranger / "unet" / "more").mkdir()
    shutil.copy(stranger / "unet" / "model.onnx.data", stranger / "unet" / "more" / "weights")
    graph = onnx.load_from_string((stranger / "unet" / "model.onnx").read_bytes())
    for tensor in graph.graph.initializer:
        for pair in tensor.external_data:
            if pair.key == "location":
                pair.value = "more/weights"
    with_graph(stranger, "unet", graph.SerializeToString())
    if listed:
        document = json.loads((stranger / "manifest.json").read_text(encoding="utf-8"))
        files = document["components"]["unet"]["files"]
        (weights,) = (entry for entry in files if entry["path"].endswith(".data"))
        files.append({**weights, "path": "unet/more/weights"})
        (stranger / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    refusal = pytest.raises(BundleError, match="'more/weights', which the manifest does not list")
    with contextlib.nullcontext() if listed else refusal:
        admit(Bundle.open(stranger), ["unet"], CPU, verify=True)
    if listed:
        (stranger / "unet" / "more" / "weights").write_bytes(bytes(weights["size"]))
        with pytest.raises(BundleError, match="unet/more/weights does not have the SHA-256"):
            Bundle.open(stranger)
