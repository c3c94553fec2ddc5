"""Progress: a bar on a terminal, few lines elsewhere; and programs that are watched while they run."""

from __future__ import annotations

import io
import sys
import time

import pytest

from sdrt.benchmarks.harness.progress import Progress
from sdrt.benchmarks.harness.told_process import run_told


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


def test_a_programs_output_last_words_and_status_are_kept() -> None:
    say = "print('out' * 100_000); print('a' * 100_000 + ' b', file=sys.stderr)"
    program = f"import sys; {say}; sys.exit('last  one')"
    told: list[str] = []
    ended = run_told([sys.executable, "-c", program], lambda line, _: told.append(line))
    assert (ended.status, ended.output, ended.reason) == (1, "out" * 100_000 + "\n", "last one")
    assert told[-1] == "last one"


def test_a_program_is_ended_when_who_is_told_has_had_enough() -> None:
    def enough(_line: str, _seconds: float) -> None:
        raise KeyboardInterrupt

    began = time.monotonic()
    program = "import sys, time; print('x', file=sys.stderr, flush=True); time.sleep(100)"
    with pytest.raises(KeyboardInterrupt):
        run_told([sys.executable, "-c", program], enough)
    assert time.monotonic() - began < 20


def test_a_last_line_without_an_end_is_told_too() -> None:
    ended = run_told([sys.executable, "-c", "import sys; sys.stderr.write('one\\ntwo')"], lambda *_: None)
    assert ended.reason == "two"


def test_a_program_has_ended_though_one_that_it_started_lives_on() -> None:
    """It holds standard error, whose end would not come for a minute."""
    program = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    began = time.monotonic()
    assert run_told([sys.executable, "-c", program], lambda *_: None).status == 0
    assert time.monotonic() - began < 30
