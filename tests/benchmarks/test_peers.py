"""The table of peers and their environments; nothing is installed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sdrt.benchmarks.peers import environments as peer_environments
from sdrt.benchmarks.peers import registry as peers
from sdrt.benchmarks.peers.environments import (
    COMPLETE,
    ENVIRONMENTS,
    Environment,
    environment_key,
    run_logged,
)
from sdrt.benchmarks.peers.installed_size import closure, installed_bytes
from sdrt.kernels.cache import CacheWarning
from sdrt.runtime.errors import BackendError, OutputError, UsageError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "cache"))


def test_every_peer_has_a_worker_an_environment_and_exact_requirements() -> None:
    for name, peer in peers.PEERS.items():
        assert peer.name == name
        assert {peer.environment, peer.converter} <= {"", *ENVIRONMENTS}
        # PyTorch for CUDA is not installed anew: it is where this interpreter has it.
        assert (peer.environment == "") == (peer.device == "cuda")
        assert (peers.WORKERS / peer.worker[0]).is_file()
    for environment in ENVIRONMENTS.values():
        for text in (*environment.requirements, *environment.for_worker):
            assert [entry.operator for entry in Requirement(text).specifier] == ["=="], text


def test_another_requirement_is_another_environment() -> None:
    first = Environment(("a==1",), ("b==1",), ("c",))
    others = [
        replace(first, requirements=("a==2",)),
        replace(first, requirements=("a==1", "b==1"), for_worker=()),
        replace(first, for_worker=("b==2",)),
        replace(first, removed=()),
    ]
    assert len({environment_key(environment) for environment in (first, *others)}) == 5
    assert environment_key(first) == environment_key(Environment(("a==1",), ("b==1",), ("c",)))


def test_another_python_is_another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = Environment(("a==1",))
    key = environment_key(environment)
    monkeypatch.setattr("platform.python_version", lambda: "9.9.9")
    assert environment_key(environment) != key


def test_an_environment_made_by_half_is_not_used() -> None:
    folder = peer_environments.environment_folder("openvino")
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    assert not peers.is_installed("openvino")
    with pytest.raises(BackendError, match="openvino is not installed: `sd-bench peers install openvino`"):
        peers.worker_command("openvino")
    (folder / COMPLETE).write_text("{}")
    assert peers.is_installed("openvino")
    python, worker, *words = peers.worker_command("openvino")
    assert (python, Path(worker).name, words) == (str(folder / "bin" / "python"), "worker_openvino.py", [])
    peers.remove("openvino")
    assert not folder.exists()
    assert not peers.is_installed("openvino")


@pytest.mark.parametrize("failing", ["no-such-package==1", "pip-is-not-reached"])
def test_what_pip_says_last_is_the_error_and_the_next_try_begins_anew(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip itself is replaced: making an environment with it takes seconds."""
    monkeypatch.setitem(ENVIRONMENTS, "broken", Environment((failing,)))
    folder = peer_environments.environment_folder("broken")

    def create(where: Path, **_: object) -> None:
        (where / "bin").mkdir(parents=True)
        python = where / "bin" / "python"
        python.write_text(
            '#!/bin/sh\necho "WARNING: nothing"\necho "ERROR: no $6"\necho "a warning"\nexit 3\n'
        )
        python.chmod(0o755)

    monkeypatch.setattr("venv.create", create)
    told: list[str] = []
    for _ in range(2):  # what the first try left is no obstacle
        with pytest.raises(BackendError, match=f"exit status 3: ERROR: no {failing}; its log is ") as caught:
            peer_environments.install("broken", told.append)
    assert Path(str(caught.value).rpartition("its log is ")[2]).read_text().count(f"ERROR: no {failing}") == 1
    assert peer_environments.find("broken") is None
    assert not (folder / COMPLETE).exists()
    assert f"broken: ERROR: no {failing}" in told


def test_only_environments_are_removed_and_never_through_a_link(tmp_path: Path) -> None:
    folder = peer_environments.environment_folder("openvino")
    elsewhere = tmp_path / "elsewhere"
    for other in (elsewhere, folder):
        other.mkdir(parents=True)
        (other / "thesis.txt").write_text("")
    (elsewhere / COMPLETE).write_text("{}")
    with pytest.raises(OutputError, match="no environment that sd-bench made: remove it by hand"):
        peer_environments.remove("openvino")
    (folder / "thesis.txt").unlink()
    peer_environments.remove("openvino")
    assert not folder.exists()
    folder.symlink_to(elsewhere)
    with pytest.raises(OutputError, match="remove it by hand"):
        peer_environments.remove("openvino")
    assert {file.name for file in elsewhere.iterdir()} == {"thesis.txt", COMPLETE}


def test_no_environment_is_taken_where_others_can_write() -> None:
    folder = peer_environments.environment_folder("openvino")
    folder.mkdir(parents=True)
    (folder / COMPLETE).write_text("{}")
    folder.parent.chmod(0o777)
    with pytest.warns(CacheWarning, match=f"{folder.parent} is not used as a cache: others can write there"):
        assert peer_environments.find("openvino") is None
    with pytest.raises(OutputError, match="others can write there; `chmod go-w"):
        peer_environments.install("openvino")


def test_a_program_that_prints_nothing_and_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="exit status 1: it printed nothing; its log is"):
        run_logged(["false"], tmp_path / "log", lambda _: None)


def test_unknown_names_are_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="unknown peer 'x'; there is diffusers"):
        peers.find("x")
    with pytest.raises(UsageError, match="the environment is 'x': one of diffusers"):
        peer_environments.install("x")


def distribution(
    site: Path, name: str, files: dict[str, int], requires: tuple[str, ...] = (), extra: str = ""
) -> None:
    """An installed distribution with files of so many bytes; RECORD and METADATA count too."""
    info = site / f"{name}-1.dist-info"
    info.mkdir(parents=True)
    for path, size in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(b"x" * size)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        "Version: 1",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (info / "METADATA").write_text("\n".join([*lines, *([f"Provides-Extra: {extra}"] if extra else []), ""]))
    (info / "RECORD").write_text("".join(f"{path},,{size}\n" for path, size in files.items()))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """a needs b, its extra ``fast`` needs c; d is of nobody; the file of ``both`` belongs to a and b."""
    folder = tmp_path / "lib" / "site-packages"
    needs = ("b>=1", "c; extra == 'fast'", "gone; extra == 'slow'", "win; sys_platform == 'win32'")
    distribution(folder, "A_a", {"a/x.py": 100, "both": 7, "../../bin/a": 1000, "lost": 5}, needs, "fast")
    distribution(folder, "b", {"b.py": 20, "both": 7}, ("a-a",))
    distribution(folder, "c", {"c.so": 3000}, ("removed-on-purpose",))
    distribution(folder, "d", {"d": 50000})
    (folder / "lost").unlink()
    return folder


def test_the_size_is_of_what_is_needed_each_file_once(site: Path) -> None:
    assert installed_bytes(["a.a==1"], site) == 100 + 7 + 1000 + 20
    assert installed_bytes(["A-a[fast]"], site) == 100 + 7 + 1000 + 20 + 3000
    assert installed_bytes(["b", "c"], site) == 100 + 7 + 1000 + 20 + 3000
    assert sorted(closure(["a-a[fast]"], site)) == ["a-a", "b", "c"]


def test_the_size_of_what_is_not_there_is_an_error(site: Path) -> None:
    with pytest.raises(BackendError, match=r"nothing is not installed in .*site-packages"):
        installed_bytes(["nothing==1"], site)
