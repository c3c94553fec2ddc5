"""``sd-bench``: measure sdrt beside its peers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdrt.benchmarks.options import parser
from sdrt.runtime.console.run_command import Parser, put, run_command
from sdrt.runtime.errors import EXIT_INTERRUPTED, SdrtError
from sdrt.runtime.system.interrupts import unwinding

if TYPE_CHECKING:
    from sdrt.benchmarks.document.document import Document


class InterruptedRunError(SdrtError):
    """Ctrl-C; the message says what is left of the run."""

    exit_status = EXIT_INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    others = {"compare": _compare, "peers": _peers, "render": _render}
    if words and words[0] in others:
        return others[words[0]](words[1:])
    arguments = parser().parse_args(words)
    return run_command("sd-bench", lambda: _measure(arguments, words), quiet=arguments.quiet)


def _measure(arguments: argparse.Namespace, words: list[str]) -> None:
    # NumPy, onnx and the rest only now: `--help` and what argparse refuses need not wait for them.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        from sdrt.benchmarks.harness.measure import measure
    except ImportError as error:
        raise SdrtError(f"{error}: pip install 'sdrt[bench]'") from error
    from sdrt.benchmarks.report.summary import summary

    def write(document: Document, last: bool) -> None:
        if arguments.report is not None:
            from sdrt.benchmarks.report.writing import write_report

            write_report(document, arguments.report, with_page=last)  # drawing it takes a second

    with unwinding():  # what was measured is kept, and programs that were started are ended
        recorder = measure(arguments, ["sd-bench", *words], write, InterruptedRunError)
    document = recorder.document(complete=True)
    if not document.measurements and document.failures:
        first = document.failures[0]
        raise SdrtError(f"nothing could be measured: {first.subject}: {first.stage}: {first.error}")
    for line in summary(document).splitlines():
        put(line)


def _compare(words: list[str]) -> int:
    from sdrt.benchmarks.report import compare

    commands = Parser(
        prog="sd-bench compare",
        description="Show what became slower, larger or less faithful from one report to another.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    compare.add_arguments(commands)
    arguments = commands.parse_args(words)
    status = 0

    def run() -> None:
        nonlocal status
        status = compare.run(arguments)

    failed = run_command("sd-bench", run)
    return failed or status


def _peers(words: list[str]) -> int:
    from sdrt.benchmarks.peers import registry as peers

    commands = Parser(
        prog="sd-bench peers",
        description="The peers that sdrt is measured beside, each in an environment of its own.",
        epilog="exit status: 0 done; 2 usage; 7 a peer cannot be installed here; 130 interrupted; 1 anything "
        "else",
        allow_abbrev=False,
    )
    peers.add_arguments(commands)
    arguments = commands.parse_args(words)

    def act() -> None:
        with unwinding():  # what is half installed is removed
            peers.run(arguments)

    return run_command("sd-bench", act)


def _render(words: list[str]) -> int:
    commands = Parser(
        prog="sd-bench render",
        description="Write the page and the summary of a report's JSON anew.",
        epilog="exit status: 0 done; 2 no such report; 8 it cannot be written",
        allow_abbrev=False,
    )
    commands.add_argument("json", metavar="REPORT.json", type=Path, help="of sd-bench")
    commands.add_argument("--report", metavar="DIR", type=Path, required=True, help="the folder to write")
    arguments = commands.parse_args(words)

    def run() -> None:
        from sdrt.benchmarks.document.document import read
        from sdrt.benchmarks.report.writing import write_report

        write_report(read(arguments.json), arguments.report)
        put(str(arguments.report))

    return run_command("sd-bench", run)
