"""What a command does to its process while it starts, and that it is undone."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator

import pytest

from sdrt.runtime.console.run_command import Parser, put, quick_start, run_command, say
from sdrt.runtime.errors import BundleError


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """As it was, whatever a test leaves behind."""
    collects = gc.isenabled()
    yield
    gc.unfreeze()
    gc.enable() if collects else gc.disable()


@pytest.mark.parametrize("collects", [True, False])
def test_nothing_is_collected_while_starting(collects: bool) -> None:
    gc.enable() if collects else gc.disable()
    with quick_start():
        assert not gc.isenabled()
    assert gc.isenabled() == collects
    assert gc.get_freeze_count()


def test_collections_go_on_after_an_error() -> None:
    with pytest.raises(KeyError), quick_start():
        raise KeyError
    assert gc.isenabled()


@pytest.mark.parametrize("chosen", [None, "7"])
def test_blas_makes_no_threads_unless_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", chosen)
    with quick_start():
        assert os.environ["OPENBLAS_NUM_THREADS"] == (chosen or "1")
    assert os.environ.get("OPENBLAS_NUM_THREADS") == chosen


# Words of others on the terminal.

NASTY = "\x1b]0;title\x07\x1b[2J\x9b31m\u202egnp\u2066\x7f"
SHOWN = "\\u001b]0;title\\u0007\\u001b[2J\\u009b31m\\u202egnp\\u2066\\u007f"


def test_control_characters_are_shown_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise BundleError(f"the dtype {NASTY} is unknown")

    say("sd-run", f"a\n{NASTY}")
    put(f"{NASTY}.png  seed 1")
    assert run_command("sd-run", fail) == 3
    with pytest.raises(SystemExit):
        Parser("sd-run").error(f"unrecognized arguments: {NASTY}")
    out, err = capsys.readouterr()
    assert out == f"{SHOWN}.png  seed 1\n"
    assert err.splitlines() == [
        f"sd-run: a {SHOWN}",
        f"sd-run: the dtype {SHOWN} is unknown",
        f"sd-run: unrecognized arguments: {SHOWN} (see sd-run --help)",
    ]


def test_people_may_write_as_they_like(capsys: pytest.CaptureFixture[str]) -> None:
    """Emoji of several characters, and languages from right to left."""
    put("ein Bild — 👩‍👩‍👧.png, שלום")
    assert capsys.readouterr().out == "ein Bild — 👩‍👩‍👧.png, שלום\n"


def test_json_stays_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    put(json.dumps({"path": NASTY}, ensure_ascii=False))
    assert json.loads(capsys.readouterr().out) == {"path": NASTY}
