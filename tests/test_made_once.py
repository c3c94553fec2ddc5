"""What tests share is made anew whenever anything that it was made from is another."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import made_once as module
from support.made_once import made_once


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one to keep things in."""
    monkeypatch.setattr(module, "PLACE", tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def make(tmp_path: Path, place: Path) -> Callable[..., int]:
    """Asks for a folder and returns how many were made so far."""
    made: list[Path] = []
    numbers = itertools.count()

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "file").write_text("content")
        made.append(folder)

    def ask(*parts: str | Path) -> int:
        target = made_once("thing", tmp_path / f"target {next(numbers)}", write, *parts)
        assert (target / "file").read_text() == "content"
        (target / "file").write_text("damaged by its owner")
        return len(made)

    return ask


def test_what_is_the_same_is_made_once(make: Callable[..., int], tmp_path: Path) -> None:
    read = tmp_path / "read"
    read.mkdir()
    (read / "a").write_text("1")
    assert [make("x", read), make("x", read), make("y", read), make("x", read)] == [1, 1, 2, 2]
    (read / "a").write_text("2")
    assert make("x", read) == 3
    (read / "a").rename(read / "b")
    assert make("x", read) == 4


def test_other_sources_make_another(
    make: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "writer.py").write_text("pass")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "SOURCES", ("export",))
    counts = []
    for text in ("pass", "pass", "pass  # another"):
        (tmp_path / "export" / "writer.py").write_text(text)
        module._sources_and_versions.cache_clear()
        counts.append(make())
    module._sources_and_versions.cache_clear()
    assert counts == [1, 1, 2]


def test_only_the_last_ones_are_kept(make: Callable[..., int], place: Path) -> None:
    assert [make(part) for part in "abc"] == [1, 2, 3]
    assert len([path for path in place.iterdir() if path.is_dir()]) == module.KEPT
    assert [make(part) for part in "cba"] == [3, 3, 4]


def test_what_failed_is_made_again(tmp_path: Path, place: Path) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        made_once("thing", tmp_path / "first", fail)
    target = made_once("thing", tmp_path / "second", lambda folder: folder.mkdir())
    assert list(target.iterdir()) == []


def test_two_that_want_the_same_wait_for_each_other(tmp_path: Path, place: Path) -> None:
    made: list[Path] = []

    def write(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.1)  # the other comes meanwhile
        folder.mkdir()

    targets = [tmp_path / "one", tmp_path / "two"]
    threads = [threading.Thread(target=made_once, args=("thing", target, write)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert all(target.is_dir() for target in targets)
