"""Files of others: what is no regular file, too large or too deep is an error at once, never a wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints.strange_files import make_device, make_folder, make_pipe

from sdrt.runtime.errors import BundleError, UsageError
from sdrt.runtime.system.untrusted import library_errors, parse_json, read_json, read_limited


def test_a_regular_file_is_read_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b'{"a": [1, 2.5, "x"]}')
    (tmp_path / "link").symlink_to("file")
    assert read_limited(tmp_path / "link", 100) == b'{"a": [1, 2.5, "x"]}'
    assert read_json(tmp_path / "link") == {"a": [1, 2.5, "x"]}


@pytest.mark.parametrize(
    ("make", "words"), [(make_pipe, "a pipe"), (make_device, "a device"), (make_folder, "a folder")]
)
def test_what_is_no_file_is_named(tmp_path: Path, make: Callable[[Path], None], words: str) -> None:
    path = tmp_path / "it"
    make(path)
    with pytest.raises(ValueError, match=words):
        read_limited(path, 10)


def test_the_limits_are_exact(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    assert read_limited(path, 10) == b"0123456789"
    with pytest.raises(ValueError, match="more than 9 bytes"):
        read_limited(path, 9)
    assert parse_json("[[[]]]", depth=3) == [[[]]]
    with pytest.raises(ValueError, match="more than 2 deep"):
        parse_json("[[[]]]", depth=2)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**5, b"\xff\xfe", "[NaN]", "[1e999]", "{", ""])
def test_what_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


PANIC = type("PanicException", (BaseException,), {})  # as pyo3's: no Exception


@pytest.mark.parametrize(
    "raised",
    [ValueError("a\nb"), RecursionError(), MemoryError(), KeyError("x"), PANIC("index out of range")],
    ids=repr,
)
def test_what_a_library_raises_is_an_error_of_ours(raised: BaseException) -> None:
    with (
        pytest.raises(BundleError, match=r"^the file is damaged \(.+\)$"),
        library_errors(BundleError, "the file is damaged"),
    ):
        raise raised


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SystemExit(3), UsageError("ours")], ids=repr)
def test_interruptions_and_our_own_errors_pass(raised: BaseException) -> None:
    with pytest.raises(type(raised)) as caught, library_errors(BundleError, "x"):
        raise raised
    assert caught.value is raised
