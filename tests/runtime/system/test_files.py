"""Files and folders appear whole or not at all: on errors, full disks, signals, beside other processes."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.runs.folders import listing

from sdrt.runtime.errors import OutputError
from sdrt.runtime.system import files
from sdrt.runtime.system.files import (
    clear_leftovers,
    explain,
    new_folder,
    scratch_folder,
    write_all_atomically,
    write_atomically,
    writing,
)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a few lines in a process of their own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


# --- one file


def test_file_is_written(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.bin", b"one")
    write_atomically(tmp_path / "a.bin", b"two")
    write_atomically(tmp_path / "empty", b"")
    assert listing(tmp_path) == {"a.bin": b"two", "empty": b""}


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_atomically(Path("a"), b"x")
    assert listing(tmp_path) == {"a": b"x"}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_umask_is_respected(tmp_path: Path, mask: int, mode: int) -> None:
    with umask(mask):
        write_atomically(tmp_path / "file", b"x")
        with new_folder(tmp_path / "folder") as folder:
            (folder / "inside").write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "folder" / "inside").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask


def test_longest_file_name(tmp_path: Path) -> None:
    name = "x" * 251 + ".png"
    write_atomically(tmp_path / name, b"x")
    assert listing(tmp_path) == {name: b"x"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/a", "the folder does not exist: make it first"),
        ("file/a", "a part of the path is not a folder"),
        ("folder", "there is a folder of that name"),
        ("x" * 256, "the file name is too long"),
    ],
)
def test_place_that_cannot_be_written(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    before = listing(tmp_path)
    with pytest.raises(OutputError) as caught:
        write_atomically(tmp_path / name, b"new")
    assert str(caught.value) == f"cannot write {tmp_path / name}: {reason}"
    assert listing(tmp_path) == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "no permission to write there"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_failure_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, reason: str
) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    with pytest.raises(OutputError, match=reason):
        write_atomically(tmp_path / "a", b"new")
    assert listing(tmp_path) == {"a": b"old"}


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_interruption_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def interrupt(_: int) -> None:
        raise interruption

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(interruption):
        write_atomically(tmp_path / "a", b"new")
    assert listing(tmp_path) == {"a": b"old"}


def test_full_disk(tmp_path: Path) -> None:
    """A real one as near as can be had without mounting: the kernel refuses to let a file grow."""
    (tmp_path / "a").write_bytes(b"old")
    result = python(
        """
        import resource, sys
        from pathlib import Path
        from sdrt.runtime.errors import OutputError
        from sdrt.runtime.system.files import write_atomically
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_atomically(Path(sys.argv[1]), bytes(100_000))
        except OutputError as error:
            print(error)
        """,
        tmp_path / "a",
    )
    assert result.stdout == f"cannot write {tmp_path / 'a'}: {os.strerror(errno.EFBIG)}\n", result.stderr
    assert listing(tmp_path) == {"a": b"old"}


# --- several files


def test_several_files(tmp_path: Path) -> None:
    write_all_atomically({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    write_all_atomically({})
    assert listing(tmp_path) == {"a": b"1", "b": b"2"}


@pytest.mark.parametrize("bad", ["missing/c", "folder"])
def test_several_files_or_none(tmp_path: Path, bad: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a").write_bytes(b"old")
    before = listing(tmp_path)
    wanted = {tmp_path / "a": b"new", tmp_path / "b": b"new", tmp_path / bad: b"new"}
    with pytest.raises(OutputError, match=bad):
        write_all_atomically(wanted)
    assert listing(tmp_path) == before


# --- folders


def test_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_folder(target) as folder:
        assert folder.parent == tmp_path  # the same file system: a rename suffices
        (folder / "a").write_bytes(b"1")
        assert not target.exists()
    assert listing(tmp_path) == {"out": None, "out/a": b"1"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("replace", [True, False])
def test_error_leaves_what_was_there(tmp_path: Path, error: type[BaseException], replace: bool) -> None:
    target = tmp_path / "out"
    if replace:
        target.mkdir()
        (target / "a").write_bytes(b"old")
    before = listing(tmp_path)

    def write_half() -> None:
        with new_folder(target, replace=replace) as folder:
            (folder / "a").write_bytes(b"new")
            raise error("half way")

    with pytest.raises(error, match="half way"):
        write_half()
    assert listing(tmp_path) == before


def test_full_disk_while_a_folder_is_written(tmp_path: Path) -> None:
    def write_half() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "a").write_bytes(b"new")
            with writing(tmp_path / "out"):
                raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"cannot write .*out: the disk is full"):
        write_half()
    assert listing(tmp_path) == {}


def test_existing_folder_is_refused_without_replace(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(OutputError, match="exists already; give another name, or --force"),
        new_folder(tmp_path / "out"),
    ):
        pytest.fail("the block must not run")
    assert listing(tmp_path) == {"out": None}


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing/out", "the folder does not exist"), ("file/out", "is not a folder"), ("x" * 300, "too long")],
)
def test_folder_that_cannot_be_made(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=reason), new_folder(tmp_path / name):
        pytest.fail("the block must not run")
    assert listing(tmp_path) == {"file": b""}


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_renameat2", lambda *_: errno.ENOSYS)
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_bytes(b"old")
    with new_folder(target, replace=True) as folder:
        (folder / "new").write_bytes(b"new")
        assert (target / "old").read_bytes() == b"old"
    assert listing(tmp_path) == {"out": None, "out/new": b"new"}


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_replace_a_link_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    """The link gives way, what it led to stays, and nothing is left over."""
    if not exchange:
        monkeypatch.setattr(files, "_renameat2", lambda *_: errno.ENOSYS)
    real = tmp_path / "real"
    real.mkdir()
    (real / "kept").write_bytes(b"kept")
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "file").write_bytes(b"old")
    for name in ("link", "file"):
        with new_folder(tmp_path / name, replace=True) as folder:
            (folder / "new").write_bytes(b"new")
    assert not (tmp_path / "link").is_symlink()
    assert listing(tmp_path) == {
        "real": None,
        "real/kept": b"kept",
        "link": None,
        "link/new": b"new",
        "file": None,
        "file/new": b"new",
    }


def test_second_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the exchange is not to be had, the old folder is put back."""
    monkeypatch.setattr(files, "_renameat2", lambda *_: errno.ENOSYS)
    rename, calls = Path.rename, []

    def rename_but_the_second(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_but_the_second)
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_bytes(b"old")
    with pytest.raises(OutputError, match="Input/output error"), new_folder(target, replace=True) as folder:
        (folder / "new").write_bytes(b"new")
    assert listing(tmp_path) == {"out": None, "out/old": b"old"}


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_exchange_swaps_both_names(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    inodes = one.stat().st_ino, other.stat().st_ino
    if files._renameat2(one, other, files._RENAME_EXCHANGE):
        pytest.skip("this file system cannot exchange")
    assert (other.stat().st_ino, one.stat().st_ino) == inodes
    missing = files._renameat2(one, tmp_path / "missing", files._RENAME_EXCHANGE)
    assert missing == errno.ENOENT
    assert one.stat().st_ino == inodes[1]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_name_is_never_away_during_a_replacement(tmp_path: Path) -> None:
    """A second process looks at the name all the time while it is replaced again and again."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    if files._renameat2(one, other, files._RENAME_EXCHANGE):
        pytest.skip("this file system cannot exchange")
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_bytes(b"0")
    watcher = subprocess.Popen(
        [
            sys.executable,
            "-S",
            "-c",
            "import os, sys\n"
            "print('ready', flush=True)\n"
            "seen = set()\n"
            "while os.path.exists(sys.argv[2]):\n"
            "    seen.add(os.stat(sys.argv[1]).st_ino)\n"
            "print(len(seen))",
            str(target),
            str(one),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watcher.stdout is not None
    watcher.stdout.readline()
    for count in range(200):
        with new_folder(target, replace=True) as folder:
            (folder / "a").write_bytes(str(count).encode())
    one.rmdir()
    seen, errors = watcher.communicate(timeout=30)
    assert watcher.returncode == 0, errors  # a moment without the folder is a FileNotFoundError
    assert int(seen) >= 1


def test_kill_in_the_middle_keeps_the_old_folder_and_the_next_run_clears_up(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_bytes(b"old")
    code = """
        import sys, time
        from pathlib import Path
        from sdrt.runtime.system.files import new_folder
        with new_folder(Path(sys.argv[1]), replace=True) as folder:
            (folder / "a").write_bytes(b"new")
            print("writing", flush=True)
            time.sleep(60)
        """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(target)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"

    # A living process's folder is left alone by another run.
    with new_folder(target, replace=True) as folder:
        (folder / "a").write_bytes(b"newer")
    assert len(list(tmp_path.iterdir())) == 2

    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (target / "a").read_bytes() == b"newer"
    assert len(list(tmp_path.iterdir())) == 2  # the killed one could not clear up …
    with new_folder(target, replace=True) as folder:
        (folder / "a").write_bytes(b"newest")
    assert listing(tmp_path) == {"out": None, "out/a": b"newest"}  # … the next did


def test_a_scratch_folder_lies_beside_until_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with scratch_folder(out) as scratch:
        (scratch / "a").write_bytes(b"much")
        with new_folder(out) as folder:  # looks for what was left behind, and this is not
            (folder / "b").write_bytes((scratch / "a").read_bytes())
        assert scratch.parent == tmp_path
    assert listing(tmp_path) == {"out": None, "out/b": b"much"}
    with pytest.raises(KeyboardInterrupt), scratch_folder(out):
        raise KeyboardInterrupt
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_scratch_folder_of_a_killed_process_is_removed_by_the_next(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        from sdrt.runtime.system.files import scratch_folder
        with scratch_folder(Path(sys.argv[1])) as folder:
            (folder / "a").write_bytes(b"much")
            os.kill(os.getpid(), signal.SIGKILL)
        """
    assert python(code, tmp_path / "out").returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with scratch_folder(tmp_path / "out") as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out", "a*b", "[x]", "a**b", "?"])
def test_only_what_was_left_unfinished_is_removed(tmp_path: Path, name: str) -> None:
    """Whatever it was to become; and nothing is followed."""
    end = "part-0123456789abcdef"
    abandoned = [f".sdrt-{name}.{end}", f".sdrt-other.{end}"]
    kept = [
        f".sdrt-{name}.part-mine",
        f".sdrt-{name}.{end}-mine",
        f".{name}.{end}",
        name + ".bak",
        "sdrt.tmp",
    ]
    for folder in (*abandoned, *kept):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_bytes(b"")
    (tmp_path / ".sdrt-0-17-0123abcd.tmp").write_bytes(b"half")
    (tmp_path / f".sdrt-link.{end}").symlink_to(tmp_path / kept[0])
    others = [f".sdrt-file.{end}", f".sdrt-file.{end}-old"]  # files, where only folders have such names
    for file in ("file", *others):
        (tmp_path / file).write_bytes(b"precious")
    with new_folder(tmp_path / name):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*kept, *others, "file", name}
    assert all((tmp_path / folder / "file").exists() for folder in kept)


def test_a_folder_that_was_away_when_its_process_was_killed_is_put_back(tmp_path: Path) -> None:
    away = tmp_path / ".sdrt-out.part-0123456789abcdef-old"
    away.mkdir()
    (away / "a").write_bytes(b"the only copy")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", replace=True):
        raise RuntimeError
    assert listing(tmp_path) == {"out": None, "out/a": b"the only copy"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_another_user_left_unfinished_is_theirs(tmp_path: Path) -> None:
    left = [tmp_path / ".sdrt-out.part-0123456789abcdef", tmp_path / ".sdrt-0-17-0123abcd.tmp"]
    left[0].mkdir()
    left[1].write_bytes(b"half")
    for path in left:
        os.chown(path, 65534, 65534)
    clear_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == set(left)


@pytest.mark.parametrize("system_call", [True, False], ids=["renameat2", "rename"])
def test_what_came_into_being_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system_call: bool
) -> None:
    if not system_call:
        monkeypatch.setattr(files, "_renameat2", lambda *_: errno.ENOSYS)

    def appear_while_writing() -> None:
        with new_folder(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "a").write_bytes(b"precious")

    with pytest.raises(OutputError, match="exists already"):
        appear_while_writing()
    assert listing(tmp_path) == {"out": None, "out/a": b"precious"}


def test_errors_of_the_block_are_not_blamed_on_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out"):
        (tmp_path / "weights").read_bytes()
    assert listing(tmp_path) == {}


def test_every_reason_has_words() -> None:
    for number in errno.errorcode:
        text = explain(OSError(number, os.strerror(number)))
        assert text
        assert "Errno" not in text
    assert explain(OSError("odd")) == "odd"
