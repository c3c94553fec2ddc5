"""The command line of ``sd-bench`` itself; the subcommands have theirs in their own modules."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Final

from sdrt.runtime.console.run_command import Parser
from sdrt.runtime.errors import UsageError

AUTO, NONE = "auto", "none"
ONLY: Final = ("cold", "warm", "growth", "limits", "fidelity", "profile")
GPU_ONLY: Final = ONLY[1:]  # of ``--gpu``
EMBEDDED_NAME: Final = "emoji"

EPILOG: Final = """MODEL is a bundle, a checkpoint in diffusers' format (folder or hub id), an architecture
with random weights (sd15, sd21, sdxl), or emoji, the embedded model (default). A checkpoint is exported
first, once, into ~/.cache/sdrt.

other commands:
  sd-bench compare A.json B.json     what became slower; exit status 1 beyond a threshold
  sd-bench peers list|install|remove the peers' environments
  sd-bench render REPORT.json --report DIR   the page and the summary of an older report

examples:
  sd-bench                                       the embedded model beside the peers that are installed
  sd-bench emoji --quick --peers none            a smoke run of half a minute
  sd-bench sd15 --sizes 256,512 --steps 4 --report out/sd15
  sd-bench sd15 --only cold --peers diffusers,openvino
  sd-bench sd15 --gpu --seconds 240 --report out/gpu
  sd-bench my-bundle --checkpoint my-checkpoint --seconds 600 --report out/mine

A subject that fails is a row with its error, and the others go on. With --report what was measured is written
after each block, so that an interrupted run leaves a valid report.

exit status: 0 done; 2 usage; 3 the bundle cannot be used; 4 the checkpoint cannot be used; 5 and 6 the export
failed; 7 a backend or a peer that was named cannot run here; 8 the report cannot be written; 130 interrupted;
1 anything else, such as that nothing at all could be measured."""


def parser() -> argparse.ArgumentParser:
    """The options of a measuring run."""
    result = Parser(
        prog="sd-bench",
        usage="sd-bench [MODEL …] [options]\n"
        "       sd-bench compare|peers|render … (each has its own --help)",
        description="Measure sdrt beside its peers: cold start, warm drawings, growth, the share of the "
        "machine's limits, and fidelity. Progress goes to standard error, a summary in Markdown to standard "
        "output.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("models", metavar="MODEL", nargs="*", help="what to draw with (default: emoji)")
    result.add_argument("--report", type=Path, metavar="DIR", help="write report.json, report.md, index.html")
    _add_subjects(result.add_argument_group("subjects"))
    _add_measuring(result.add_argument_group("measuring"))
    result.add_argument("--quiet", action="store_true", help="no progress")
    return result


def _add_subjects(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--backends",
        default=AUTO,
        metavar="auto|none|NAMES",
        help="of sdrt, separated by commas (default: auto, all that can run here)",
    )
    group.add_argument(
        "--peers",
        default=AUTO,
        metavar="auto|none|NAMES",
        help="separated by commas (default: auto, all that are installed)",
    )
    group.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="what a bundle was exported from, for the peers"
    )
    group.add_argument("--threads", type=_positive, metavar="N", help="of each subject (default: all cores)")
    group.add_argument(
        "--gpu",
        action="store_true",
        help="on the GPU alone, exported in fp16: every backend that needs one, with engines for what is "
        "measured, beside diffusers of this Python",
    )


def _add_measuring(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--sizes",
        type=_sizes,
        metavar="N[xN],…",
        help="pixels, height x width, the main one first (default: the model's)",
    )
    group.add_argument("--steps", type=_positive, metavar="N", help="of a picture (default: the model's)")
    group.add_argument("--guidance-scale", type=_guidance, metavar="X", help="default: the model's")
    group.add_argument("--rounds", type=_positive, metavar="N", help="of warm drawings (default: 10)")
    group.add_argument("--cold-rounds", type=_positive, metavar="N", help="of fresh processes (default: 5)")
    group.add_argument(
        "--batches", type=_batches, metavar="N,…", help="pictures drawn together (default: 1,2,4,8)"
    )
    group.add_argument(
        "--only",
        type=_only,
        metavar="NAMES",
        help=f"of {', '.join(ONLY)} (default: all, with --gpu but cold)",
    )
    group.add_argument(
        "--seconds",
        type=_positive,
        metavar="N",
        help="about how long it may take: rounds are left out, at least one of each remains",
    )
    group.add_argument("--quick", action="store_true", help="a smoke run: few rounds, steps and sizes")


def names(text: str) -> tuple[str, ...]:
    """``a,b`` → the names, each once.

    Raises:
        UsageError: There are none.
    """
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not found:
        raise UsageError("a list of names is empty: give names separated by commas, auto, or none")
    return found


def _positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,6}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def _guidance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 1 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 1 and up to 100: every step is guided")
    return value


def _batches(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(part) for part in text.split(",")}))


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    found = []
    for part in text.split(","):
        height, separator, width = part.partition("x")
        found.append((_positive(height), _positive(width if separator else height)))
    return tuple(dict.fromkeys(found))


def _only(text: str) -> tuple[str, ...]:
    wanted = names(text)
    if unknown := [name for name in wanted if name not in ONLY]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(ONLY)}")
    return tuple(name for name in ONLY if name in wanted)
