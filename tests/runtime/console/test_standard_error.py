"""Standard error may be closed, full, slow, or read by nobody: the work is done, and told of."""

from __future__ import annotations

import fcntl
import os
import pty
import subprocess
import sys
import tty
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from support.runs.sd_run_terminal import SD_RUN


@contextmanager
def closed_reader() -> Iterator[int]:
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@contextmanager
def full_disk() -> Iterator[int]:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


@contextmanager
def full_pipe() -> Iterator[int]:
    """Somebody holds its other end and never reads."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write, bytes(4096))
    yield write
    os.close(read)
    os.close(write)


@contextmanager
def stopped_terminal() -> Iterator[int]:
    """As after Ctrl-S: nothing is taken from it any more."""
    own, theirs = pty.openpty()
    tty.setraw(theirs)
    os.set_blocking(theirs, False)
    try:
        while True:
            os.write(theirs, bytes(1000))
    except BlockingIOError:
        os.set_blocking(theirs, True)
    yield theirs
    os.close(own)
    os.close(theirs)


Stream = Callable[[], AbstractContextManager[int]]
STREAMS: tuple[Stream, ...] = (closed_reader, full_disk, full_pipe, stopped_terminal)


@pytest.mark.parametrize("stream", STREAMS)
def test_the_picture_is_drawn_and_told_of(stream: Stream, tiny_bundle: Path, tmp_path: Path) -> None:
    """With a backend that is news, a warning, and on the terminal a bar of 64 × 8 steps."""
    words = ["x", "--bundle", str(tiny_bundle), "--num-images", "16", "--steps", "8", "--preview"]
    words += ["--negative-prompt", "y", "--guidance-scale", "1", "--output", "a.png"]
    with stream() as descriptor:
        process = subprocess.run(
            [SD_RUN, *words],
            stdout=subprocess.PIPE,
            stderr=descriptor,
            cwd=tmp_path,
            check=False,
            timeout=100,
        )
    assert process.returncode == 0
    assert len(process.stdout.splitlines()) == 17
    assert len(list(tmp_path.iterdir())) == 16


@pytest.mark.parametrize("stream", STREAMS)
def test_an_error_keeps_its_status(stream: Stream) -> None:
    for words, status in ((["x", "--bundle", "gone"], 3), (["--nonsense"], 2)):
        with stream() as descriptor:
            process = subprocess.run([SD_RUN, *words], stderr=descriptor, timeout=60, check=False)
        assert process.returncode == status


def test_a_closed_one_is_not_the_next_file(tmp_path: Path) -> None:
    """What a library prints must not end up in it."""
    code = """if True:
        import os, sys
        from sdrt.runtime.console.enter import enter
        def body():
            with open(sys.argv[1], "wb") as file:
                os.write(2, b"printed by a library")
                file.write(b"whole")
            return 0
        sys.exit(enter("command", lambda: body))
    """
    words = ["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, "-c", code, str(tmp_path / "file")]
    assert subprocess.run(words, check=False).returncode == 0
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_slow_reader_gets_everything() -> None:
    """What is dropped is dropped for want of a reader, not of speed."""
    code = """if True:
        import sys
        from sdrt.runtime.console.standard_error import guard_standard_error
        guard_standard_error()
        for number in range(3000):
            print(f"line {number}", file=sys.stderr)
    """
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    assert process.stderr is not None
    read = b""
    while part := os.read(process.stderr.fileno(), 4096):
        read += part
    process.wait()
    assert read.decode().splitlines() == [f"line {number}" for number in range(3000)]
