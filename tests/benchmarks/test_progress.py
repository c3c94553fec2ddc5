"""Progress: a bar on a terminal, few lines elsewhere."""

from __future__ import annotations

import io
import sys
import time

import pytest

from sdrt.benchmarks.harness.progress import Progress


class Terminal(io.StringIO):
    """Where a bar is drawn."""

    def isatty(self) -> bool:
        return True


def test_what_takes_minutes_is_a_line_now_and_then_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Progress() as shown:
        shown.block("openvino: bringing the model into its form", 1)
        for second in range(100):
            now = 1000.0 + second
            shown.ongoing(f"exporting [layer {second}]", float(second))
    lines = capsys.readouterr().err.splitlines()
    title = "sd-bench: openvino: bringing the model into its form"
    assert lines == [
        title,
        f"{title}, 30 s: exporting [layer 30]",
        f"{title}, 60 s: exporting [layer 60]",
        f"{title}, 2 min: exporting [layer 90]",
    ]


def test_on_a_terminal_the_bar_says_it_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    with Progress() as shown:
        shown.block("openvino", 1)
        shown.ongoing("[/b] " + "long " * 30, 12.0)  # no markup
        shown.ongoing("", 13.0)
    text = terminal.getvalue()
    assert "openvino, 12 s: [/b] long long" in text
    assert "…" in text
    assert "openvino, 13 s" in text


def test_quiet_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(quiet=True) as shown:
        shown.block("openvino", 1)
        monkeypatch.setattr(time, "monotonic", lambda: 1e9)
        shown.ongoing("exporting", 100.0)
    assert capsys.readouterr().err == ""
