"""What a command does to its process while it starts, and that it is undone."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from sdrt.runtime.command import quick_start


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
