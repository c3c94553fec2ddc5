"""The cache: for this user alone, nothing that others put there counts, and only what we made is removed."""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints.strange_files import make_device, make_folder, make_nested, make_pipe

from sdrt.kernels.cache import (
    KEY_NAME,
    UNUSED_SECONDS,
    CacheWarning,
    mark_used,
    private_folder,
    read_kept,
    remove_unused,
    write_kept,
)

KIND, NAME, CONTENT = "some/kind", "name", b"what was computed"
LIMIT = 1000
AT_ONCE = 0.1  # seconds


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def kept(root: Path) -> Path:
    """The file of what was kept."""
    assert write_kept(KIND, NAME, CONTENT)
    assert read_kept(KIND, NAME, LIMIT) == CONTENT
    return root / KIND / NAME


@pytest.mark.parametrize("umask", [0, 0o022, 0o277])
def test_folders_and_files_are_for_this_user_alone(root: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        assert write_kept(KIND, NAME, CONTENT)
    finally:
        os.umask(before)
    assert read_kept(KIND, NAME, LIMIT) == CONTENT
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (root, *root.rglob("*"))}
    assert {path.name for path, mode in modes.items() if mode == 0o700} == {"cache", "some", "kind"}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}


# --- where others can write


def _link(level: Path) -> str:
    level.rename(level.with_name("elsewhere"))
    level.symlink_to("elsewhere")
    return "it is a link; set SDRT_CACHE to a folder of your own"


def _writable(mode: int) -> Callable[[Path], str]:
    def change(level: Path) -> str:
        level.chmod(mode)
        return f"others can write there; `chmod go-w {level}`"

    return change


@pytest.mark.parametrize("level", [".", "some", KIND])
@pytest.mark.parametrize("change", [_link, _writable(0o770), _writable(0o702)])
def test_a_folder_where_others_can_write_is_not_used(
    root: Path, kept: Path, level: str, change: Callable[[Path], str]
) -> None:
    path = root / level
    words = change(path)
    with pytest.warns(CacheWarning, match=re.escape(f"{path} is not used as a cache: {words}")) as told:
        assert read_kept(KIND, NAME, LIMIT) is None
    assert len(told) == 1
    assert not write_kept(KIND, "other", CONTENT)  # told once: a second warning would be an error here
    assert "other" not in [file.name for file in root.resolve().rglob("*")]


def test_another_users_folder_is_not_used(root: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: stranger)
    with pytest.warns(
        CacheWarning, match=f"{root} is not used as a cache: it belongs to another user; set S"
    ):
        assert read_kept(KIND, NAME, LIMIT) is None
    assert not write_kept(KIND, "other", CONTENT)


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_can_write_does_not_count(kept: Path, mode: int) -> None:
    kept.chmod(mode)
    assert read_kept(KIND, NAME, LIMIT) is None


# --- where there is none


def _file_in_the_way(root: Path, _patch: pytest.MonkeyPatch) -> None:
    root.write_text("")


def _no_home(_root: Path, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("SDRT_CACHE")
    patch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))


def _nothing_can_be_made(_root: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("SDRT_CACHE", "/proc/none")


def _no_space(error: int) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def trouble(_root: Path, patch: pytest.MonkeyPatch) -> None:
        def fail(_descriptor: int) -> None:
            raise OSError(error, os.strerror(error))

        patch.setattr(os, "fsync", fail)

    return trouble


@pytest.mark.parametrize(
    "trouble",
    [
        *(_file_in_the_way, _no_home, _nothing_can_be_made),
        *(_no_space(errno.ENOSPC), _no_space(errno.EDQUOT), _no_space(errno.EROFS)),
    ],
)
def test_a_cache_that_cannot_be_is_done_without_in_silence(
    root: Path, monkeypatch: pytest.MonkeyPatch, trouble: Callable[[Path, pytest.MonkeyPatch], None]
) -> None:
    """Warnings are errors in these tests."""
    trouble(root, monkeypatch)
    assert not write_kept(KIND, NAME, CONTENT)
    assert read_kept(KIND, NAME, LIMIT) is None
    assert not (root.is_dir() and list((root / KIND).iterdir()))


# --- what was not kept here


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)


def _longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def _short(file: Path) -> None:
    file.write_bytes(b"x")


def _own_checksum(file: Path) -> None:
    file.write_bytes(CONTENT + hashlib.sha256(CONTENT).digest())


def _own_key(file: Path) -> None:
    file.write_bytes(CONTENT + hmac.digest(bytes(32), f"{KIND}/{NAME}\0".encode() + CONTENT, "sha256"))


def _of_another_name(file: Path) -> None:
    assert write_kept(KIND, "other", CONTENT)
    file.with_name("other").replace(file)


def _larger_than_memory(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(1 << 40)


def _linked(file: Path) -> None:
    file.rename(file.with_name("moved"))
    file.symlink_to("moved")


MESSES = (
    *(_cut, _flipped, _longer, _short, _own_checksum, _own_key, _of_another_name),
    *(make_nested, _larger_than_memory, make_pipe, make_device, _linked, make_folder),
)


@pytest.mark.parametrize("mess", MESSES)
def test_what_was_not_kept_here_is_as_nothing(kept: Path, mess: Callable[[Path], None]) -> None:
    mess(kept)
    began = time.perf_counter()
    assert read_kept(KIND, NAME, LIMIT) is None
    assert time.perf_counter() - began < AT_ONCE
    if mess is not make_folder:
        assert write_kept(KIND, NAME, CONTENT)
        assert read_kept(KIND, NAME, LIMIT) == CONTENT


@pytest.mark.parametrize(
    "mess", [*(_cut, _longer, _short, make_pipe, make_device, _linked), lambda file: file.chmod(0o640)]
)
def test_a_key_that_others_may_know_is_made_anew(
    root: Path, kept: Path, mess: Callable[[Path], None]
) -> None:
    mess(root / KEY_NAME)
    assert read_kept(KIND, NAME, LIMIT) is None
    assert write_kept(KIND, NAME, CONTENT)
    assert read_kept(KIND, NAME, LIMIT) == CONTENT
    assert stat.S_IMODE((root / KEY_NAME).lstat().st_mode) == 0o600


def test_the_seal_is_hmac_sha256(root: Path, kept: Path) -> None:
    tag = hmac.digest((root / KEY_NAME).read_bytes(), f"{KIND}/{NAME}\0".encode() + CONTENT, "sha256")
    assert kept.read_bytes() == CONTENT + tag


def test_a_key_is_random(root: Path) -> None:
    keys = set()
    for _ in range(2):
        assert write_kept(KIND, NAME, CONTENT)
        keys.add((root / KEY_NAME).read_bytes())
        shutil.rmtree(root)
    assert len(keys) == 2


def test_many_at_once(root: Path) -> None:
    start = threading.Barrier(8)

    def keep() -> None:
        start.wait()
        for _ in range(20):
            write_kept(KIND, NAME, CONTENT)
            assert read_kept(KIND, NAME, LIMIT) in (CONTENT, None)

    threads = [threading.Thread(target=keep) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert write_kept(KIND, NAME, CONTENT)
    assert read_kept(KIND, NAME, LIMIT) == CONTENT
    assert sorted(file.name for file in (root / KIND).iterdir()) == [NAME]


# --- cleaning

MARKER, OLD = ".marker", time.time() - UNUSED_SECONDS - 60


def entry(folder: Path, marked: float | None) -> Path:
    folder.mkdir()
    (folder / "content").write_text("")
    if marked is not None:
        (folder / MARKER).touch()
        os.utime(folder / MARKER, (marked, marked))
    os.utime(folder, (OLD, OLD))
    return folder


def test_only_what_we_made_and_nobody_used_is_removed(root: Path, tmp_path: Path) -> None:
    parent = private_folder("kind")
    removed = entry(parent / "0123abcd", OLD)
    elsewhere = entry(tmp_path / "0123abcd", OLD)
    stay = [
        entry(parent / "0123abce", time.time()),
        entry(parent / "0123abcf", None),
        entry(parent / "photographs", OLD),
        entry(parent / "0123abcd-mine", OLD),
        elsewhere,
        parent / "11111111",
        parent / "22222222",
        entry(parent / "33333333", None),
    ]
    (parent / "11111111").symlink_to(elsewhere)
    (parent / "22222222").write_text("")
    os.utime(parent / "22222222", (OLD, OLD))
    (parent / "33333333" / MARKER).symlink_to(elsewhere / MARKER)
    used = entry(parent / "44444444", OLD)
    mark_used(used / MARKER)
    remove_unused(parent, re.compile("[0-9a-f]{8}"), MARKER)
    assert not removed.exists()
    assert all(os.path.lexists(path) for path in (*stay, used))
    assert (elsewhere / "content").exists()


def test_a_use_is_not_noted_through_a_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("")
    os.utime(target, (OLD, OLD))
    (tmp_path / "marker").symlink_to(target)
    mark_used(tmp_path / "marker")
    assert target.stat().st_mtime == pytest.approx(OLD)
