"""What others planted, exchanged or damaged in a cache or beside it draws no other picture, nor stays."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from support.checkpoints.strange_files import make_device, make_nested, make_pipe
from support.runs.cache_fuzz import KINDS, fuzz
from support.runs.cache_runs import replace_bytes, source_of

from sdrt.runtime.backends.onnxruntime_cpu.prepared_graphs import PreparedGraph
from sdrt.runtime.bundle import prepared_folder, verified_files
from sdrt.runtime.bundle.bundle import ALWAYS, EMBEDDED, Bundle, Verify
from sdrt.runtime.bundle.manifest import FileEntry
from sdrt.runtime.bundle.prepared_folder import PreparedFolder, Source
from sdrt.runtime.cli.main import main
from sdrt.runtime.cli.options import parser
from sdrt.runtime.errors import BundleError
from sdrt.runtime.pipeline import Pipeline

SHORT: dict[str, Any] = {"num_inference_steps": 1, "seed": 1, "output_type": "numpy"}
WEIGHTS = "unet/model.onnx.data"
IN_THE_WAY = 0.1  # seconds that a record may cost


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder; what was hashed is remembered at once, since every change here takes its time."""
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verified_files, "SETTLED_SECONDS", 0.0)
    return tmp_path / "cache"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the embedded bundle that a test may damage."""
    return Path(shutil.copytree(EMBEDDED, tmp_path / "bundle"))


def draw(path: Path | None = None, **options: Any) -> Any:
    with Pipeline.load(path, backend="onnxruntime-cpu", **options) as pipeline:
        return pipeline("x", **SHORT).latents


@pytest.fixture(scope="module")
def wanted() -> Any:
    """What is drawn without a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDRT_CACHE", os.devnull)
        return draw()


def altered(weights: bytes) -> bytes:
    """Others of the same size."""
    return np.frombuffer(weights, np.float32)[::-1].tobytes()


@contextmanager
def hashes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files of the cache that are hashed inside."""
    found: list[str] = []

    def noted(stream: Any) -> Any:
        found.append(Path(f"/proc/self/fd/{stream.fileno()}").readlink().name)
        return verified_files.hashed(stream)

    with monkeypatch.context() as patch:
        patch.setattr(prepared_folder, "hashed", noted)
        yield found


# --- bytes


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("compiled")])
def test_a_flipped_byte_draws_no_other_picture(kind: str, cache: Path) -> None:
    """`cache_fuzz.py` does it as often as it is told, with OpenVINO's models besides, which take seconds."""
    assert fuzz(KINDS[kind], 1, np.random.default_rng(0)) == []


def test_what_was_prepared_is_hashed_once_after_a_start_and_whenever_that_is_asked_for(
    cache: Path, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw()
    with hashes(monkeypatch) as found:
        draw()
        assert found == []
        monkeypatch.setattr(prepared_folder, "boot_id", lambda: "another")
        np.testing.assert_array_equal(draw(), wanted)
        assert sorted(found) == sorted(["model.onnx", "model.onnx.data"] * 3)
        draw()
        assert len(found) == 6
        np.testing.assert_array_equal(draw(verify=ALWAYS), wanted)
        assert len(found) == 12
        monkeypatch.setattr(prepared_folder, "boot_id", str)  # a system that does not say when it was started
        draw()
        draw()
        assert len(found) == 24


@pytest.mark.parametrize(
    ("words", "verify"), [((), True), (("--verify",), ALWAYS), (("--no-verify",), False)]
)
def test_sd_run_says_what_is_hashed(words: tuple[str, ...], verify: Verify) -> None:
    assert parser().parse_args(["x", *words]).verify == verify


# --- what goes in


def planted_record(path: Path, files: dict[str, list[Any]]) -> None:
    """A record that says so, as all wrote it before, and as one does who does not know the key."""
    content = json.dumps({"folder": os.fsencode(path).hex(), "files": files}).encode()
    (record,) = Path(os.environ["SDRT_CACHE"], "verified").iterdir()
    tag = hmac.digest(bytes(32), f"verified/{record.name}\0".encode() + content, "sha256")
    record.write_bytes(content + tag)


def test_a_planted_record_lets_no_altered_bundle_draw(cache: Path, bundle: Path, wanted: Any) -> None:
    np.testing.assert_array_equal(draw(bundle), wanted)
    shutil.rmtree(cache / "onnxruntime-cpu")
    weights = bundle / WEIGHTS
    content = weights.read_bytes()
    replace_bytes(weights, altered(content))
    entries = Bundle.open(bundle, verify=False).manifest.files()
    planted_record(
        bundle,
        {
            entry.path: [verified_files.file_state((bundle / entry.path).stat()), entry.sha256]
            for entry in entries
        },
    )
    with pytest.raises(BundleError, match="altered or damaged"):
        draw(bundle)
    assert not np.array_equal(draw(bundle, verify=False), wanted)  # as it was asked for: the bundle's own
    # What may have been prepared of its other components is theirs.
    np.testing.assert_array_equal(draw(), wanted)
    weights.write_bytes(content)
    np.testing.assert_array_equal(draw(bundle), wanted)


def _in_place(weights: Path, content: bytes) -> None:
    replace_bytes(weights, content)


def _by_folder(weights: Path, content: bytes) -> None:
    """Another folder with the name: no file's own times say that."""
    other = weights.parent.with_name("other")
    shutil.copytree(weights.parent, other)
    (other / weights.name).write_bytes(content)
    weights.parent.rename(weights.parent.with_name("good"))
    other.rename(weights.parent)


@pytest.mark.parametrize("exchange", [_in_place, _by_folder])
def test_a_file_exchanged_after_it_was_compared_poisons_nothing(
    cache: Path,
    bundle: Path,
    wanted: Any,
    exchange: Callable[[Path, bytes], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = (bundle / WEIGHTS).read_bytes()
    exchanged: list[bool] = []

    def compare_and_exchange(stream: Any) -> Any:
        found = verified_files.hashed(stream)
        if stream.name == str(bundle / WEIGHTS) and not exchanged:
            exchanged.append(True)
            exchange(bundle / WEIGHTS, altered(content))
        return found

    monkeypatch.setattr("sdrt.runtime.bundle.bundle.hashed", compare_and_exchange)
    with pytest.raises(BundleError, match="altered while it was loaded"):
        draw(bundle)
    assert exchanged
    # Neither what was found of it nor what would have been made of it stays.
    assert not Bundle.open(bundle, verify=False).is_verified(
        Bundle.open(bundle, verify=False).component("unet").files
    )
    with pytest.raises(BundleError, match="altered or damaged"):
        draw(bundle)
    np.testing.assert_array_equal(draw(), wanted)  # the embedded bundle lists the same files


def graph_of(folder: Path, value: float) -> None:
    """A graph whose weights lie in a folder below it."""
    (folder / "sub").mkdir(parents=True)
    weight = onnx.numpy_helper.from_array(np.full(4096, value, np.float32), "w")
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4096]) for name in "xy"]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weight]),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=9,
    )
    onnx.save(
        model, folder / "model.onnx", save_as_external_data=True, location="sub/w.bin", size_threshold=0
    )


def listed(folder: Path, *names: str) -> Source:
    files = [(name, (folder / name).read_bytes()) for name in names]
    entries = [FileEntry(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files]
    return Source(folder, "model.onnx", tuple(entries))


def test_what_no_list_names_has_no_part_in_a_prepared_graph(cache: Path, tmp_path: Path) -> None:
    """Two bundles with the same listed files draw from one prepared graph: it must be made of those alone."""
    for name, value in (("one", 1.0), ("two", 2.0)):
        graph_of(tmp_path / name, value)
        assert not PreparedGraph(onnxruntime, listed(tmp_path / name, "model.onnx")).make()
        whole = PreparedGraph(onnxruntime, listed(tmp_path / name, "model.onnx", "sub/w.bin"))
        assert not whole.exists()
        assert whole.make()
        session = whole.load(onnxruntime.SessionOptions())
        np.testing.assert_array_equal(session.run(None, {"x": np.zeros(4096, np.float32)})[0], value)


def test_the_key_covers_all_that_decides_what_is_prepared(cache: Path, tmp_path: Path) -> None:
    graph_of(tmp_path / "b", 1.0)
    (tmp_path / "b" / "other.onnx").write_bytes((tmp_path / "b" / "model.onnx").read_bytes())
    names = ("model.onnx", "other.onnx", "sub/w.bin")
    source = listed(tmp_path / "b", *names)
    places = [
        PreparedFolder("onnxruntime-cpu", source, {"options": "a"}),
        PreparedFolder("onnxruntime-cpu", source, {"options": "b"}),
        PreparedFolder(
            "onnxruntime-cpu", Source(source.folder, "other.onnx", source.files), {"options": "a"}
        ),
        PreparedFolder("onnxruntime-cpu", listed(tmp_path / "b", *names[:2]), {"options": "a"}),
    ]
    assert len({place.path for place in places}) == len(places)


# --- records


def _no_record(record: Path) -> None:
    record.write_bytes(b"[]")


def _truncated(record: Path) -> None:
    record.write_bytes(record.read_bytes()[:40])


@pytest.mark.parametrize("mess", [make_pipe, make_device, make_nested, _no_record, _truncated])
def test_a_record_that_is_none_is_a_miss_at_once(
    cache: Path, wanted: Any, mess: Callable[[Path], None]
) -> None:
    draw()
    records = [*cache.glob("verified/*"), *cache.glob("onnxruntime-cpu/*/record.json")]
    assert len(records) == 4
    for record in records:
        mess(record)
    bundle = Bundle.open()
    unet = PreparedGraph(onnxruntime, source_of(bundle))
    began = time.perf_counter()
    assert not bundle.is_verified(bundle.component("unet").files)
    assert not unet.exists()
    assert time.perf_counter() - began < IN_THE_WAY
    np.testing.assert_array_equal(draw(), wanted)
    assert unet.exists()


def test_a_folder_that_is_a_link_is_not_loaded(cache: Path) -> None:
    draw()
    unet = PreparedGraph(onnxruntime, source_of(Bundle.open()))
    unet.folder.rename(cache / "elsewhere")
    unet.folder.symlink_to(cache / "elsewhere")
    assert not unet.exists()
    assert unet.make()
    assert unet.exists()
    assert not unet.folder.is_symlink()
    assert (cache / "elsewhere").is_dir()


# --- words


@pytest.mark.parametrize("quiet", [False, True])
def test_a_cache_that_others_can_write_is_told_in_a_line(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    cache.mkdir(mode=0o700)
    cache.chmod(0o777)
    words = ["x", "--steps", "1", "--backend", "onnxruntime-cpu", "-o", str(tmp_path / "a.png")]
    # What is told once in a process may have been told by another test: the folder is in its words.
    assert main([*words, *(["-q"] if quiet else [])]) == 0
    logging.getLogger("sdrt").handlers.clear()
    line = (
        f"sd-run: warning: {cache} is not used as a cache: others can write there; `chmod go-w {cache}`, "
        "or set SDRT_CACHE to a folder of your own\n"
    )
    assert capsys.readouterr().err == ("" if quiet else line)
    assert (tmp_path / "a.png").exists()
    assert list(cache.iterdir()) == []


# --- several processes


def started(cache: Path, output: Path) -> subprocess.Popen[str]:
    words = ["x", "--steps", "1", "--seed", "1", "-q", "--backend", "onnxruntime-cpu", "-o", str(output)]
    return subprocess.Popen(
        [sys.executable, "-m", "sdrt.runtime.cli", *words],
        env={**os.environ, "SDRT_CACHE": str(cache)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_one_killed_while_two_prepare(cache: Path, tmp_path: Path) -> None:
    """The others go on, and so does the next; what was begun does not count."""
    pictures = [tmp_path / f"{name}.png" for name in ("killed", "beside", "after")]
    killed = started(cache, pictures[0])
    while not list(cache.glob("onnxruntime-cpu/.*")):
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.001)
    beside = started(cache, pictures[1])
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    for process in (beside, started(cache, pictures[2])):
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 0
    assert not pictures[0].exists()
    assert pictures[1].read_bytes() == pictures[2].read_bytes()
    assert len([path for path in (cache / "onnxruntime-cpu").iterdir() if not path.name.startswith(".")]) == 3
