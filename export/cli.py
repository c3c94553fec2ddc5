"""``sd-export MODEL OUT``: a checkpoint becomes a bundle."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sdrt.runtime.command import Parser, put, run_command, say
from sdrt.runtime.components import PRECISIONS
from sdrt.runtime.errors import OutputError, SdrtError, UsageError
from sdrt.runtime.files import explain, writing
from sdrt.runtime.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from sdrt.export.checkpoint import Checkpoint
    from sdrt.export.graph import AxisRange
    from sdrt.export.parity import ParityReport

RANGE: Final = re.compile(r"(\d+)(?:\.\.(\d+))?")
MAX_BATCH: Final = 64
MAX_SIDE: Final = 4096
MIN_OPSET: Final = 18
MAX_OPSET: Final = 23

EPILOG: Final = """exit status: 0 done; 2 usage; 4 the checkpoint cannot be used; 5 over the parity tolerance;
6 NaN or infinity; 7 a backend is missing; 8 OUT cannot be written; 130 interrupted; 1 anything else.
Unless the status is 0 nothing is written, and an older bundle at OUT is kept."""


def parser() -> argparse.ArgumentParser:
    """The command line of ``sd-export``."""
    result = Parser(
        prog="sd-export",
        description="Export a Stable Diffusion checkpoint to a bundle of ONNX graphs, each compared "
        "with PyTorch before it ships.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("model", metavar="MODEL", help="a diffusers folder, or a hub id owner/name")
    result.add_argument("out", metavar="OUT", type=_path, help="the bundle's folder, made by this")
    precision = result.add_mutually_exclusive_group()
    precision.add_argument(
        "--dtype", choices=PRECISIONS, default="fp32", help="of weights and arithmetic (default: fp32)"
    )
    precision.add_argument(
        "--fp16", action="store_const", const="fp16", dest="dtype", help="the same as --dtype fp16"
    )
    result.add_argument(
        "--fp16-weights",
        action="store_true",
        help="with fp32 arithmetic: store weights that fp16 holds exactly as fp16, half the file",
    )
    result.add_argument("--batch", default="1..4", metavar="MIN..MAX", help="images per call (default: 1..4)")
    for side in ("height", "width"):
        result.add_argument(
            f"--{side}",
            metavar="N|MIN..MAX",
            help="pixels, fixed or a range (default: the model's own, fixed)",
        )
    result.add_argument("--opset", type=int, default=23, help="ONNX opset, 18 to 23 (default: 23)")
    result.add_argument("--revision", help="branch, tag or commit on the hub")
    result.add_argument("--force", action="store_true", help="replace an older bundle at OUT")
    result.add_argument("--quiet", action="store_true", help="print errors only")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = parser().parse_args(argv)
    return run_command("sd-export", lambda: _export(arguments), quiet=arguments.quiet)


def _export(arguments: argparse.Namespace) -> None:
    # What can be said without the seconds that torch takes to import is said first.
    batch = parse_range("--batch", arguments.batch)
    _check_options(arguments, batch)
    out = _place(arguments.out, force=arguments.force)
    # One line of an error is for the user; the libraries' own chatter is not.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    try:
        from sdrt.export.bundle_writer import ExportOptions, write_bundle
        from sdrt.export.checkpoint import open_checkpoint
        from sdrt.export.graph import AxisRange
    except ImportError as error:
        raise SdrtError(f"{error}: pip install 'sdrt[export]'") from error

    started = time.perf_counter()
    checkpoint = open_checkpoint(arguments.model, revision=arguments.revision)
    options = ExportOptions(
        precision=arguments.dtype,
        fp16_weights=arguments.fp16_weights,
        batch=AxisRange(*batch),
        height=_side(checkpoint, "--height", arguments.height),
        width=_side(checkpoint, "--width", arguments.width),
        opset=arguments.opset,
    )

    show = _Lines(quiet=arguments.quiet)
    report = write_bundle(
        checkpoint,
        out,
        options,
        overwrite=arguments.force,
        progress=lambda stage: show(f"[{time.perf_counter() - started:6.1f} s] {stage}"),
    )
    for line in _report_lines(report, arguments.out, time.perf_counter() - started):
        show(line)


class _Lines:
    """Lines on stdout for as long as somebody reads them: an export does not end because `| head` did."""

    def __init__(self, *, quiet: bool) -> None:
        self._silent = quiet

    def __call__(self, line: str) -> None:
        if self._silent:
            return
        try:
            put(line)
        except BrokenPipeError:
            self._silent = True
        except OutputError as error:
            self._silent = True
            say("sd-export", f"warning: {error}; the export goes on")


def _path(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: give the folder to make")
    return Path(text)


def parse_range(option: str, text: str) -> tuple[int, int]:
    """``N`` or ``MIN..MAX`` as two numbers.

    Raises:
        UsageError: Not of that form, zero, or MIN above MAX.
    """
    match = RANGE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{option} is {text!r}: a number or MIN..MAX, such as 512 or 256..768")
    low = int(match[1])
    high = int(match[2]) if match[2] else low
    if not 1 <= low <= high:
        raise UsageError(f"{option} is {text!r}: MIN must be at least 1 and at most MAX")
    return low, high


def _check_options(arguments: argparse.Namespace, batch: tuple[int, int]) -> None:
    if batch[1] > MAX_BATCH:
        raise UsageError(f"--batch is {arguments.batch!r}: at most {MAX_BATCH}")
    if not MIN_OPSET <= arguments.opset <= MAX_OPSET:
        raise UsageError(f"--opset is {arguments.opset}: {MIN_OPSET} to {MAX_OPSET}")
    if arguments.fp16_weights and arguments.dtype != "fp32":
        raise UsageError(f"--fp16-weights goes with --dtype fp32, not with {arguments.dtype}")


def _place(out: Path, *, force: bool) -> Path:
    """The folder to make. Through a symbolic link: the link stays, what it names is replaced."""
    with writing(out):
        try:
            place = out.resolve()
        except RuntimeError as error:
            raise OutputError(f"cannot write {out}: its symbolic links go round in a loop") from error
        _check_out(out, force=force)
    return place


def _check_out(out: Path, *, force: bool) -> None:
    if out.exists() and not force:
        raise UsageError(f"{out} exists already; give another name, or --force to replace it")
    # --force deletes what is there: `--force .` or a mistyped name must not cost anybody's work.
    if out.exists() and not (out.is_dir() and ((out / MANIFEST_NAME).is_file() or not any(out.iterdir()))):
        raise UsageError(f"{out} is not a bundle: --force replaces bundles and empty folders only")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"cannot write {out}: {explain(FileNotFoundError(errno.ENOENT, ''))}")


def _side(checkpoint: Checkpoint, option: str, text: str | None) -> AxisRange:
    """One side's range in pixels; without the option the size that the model was trained at."""
    from sdrt.export.graph import AxisRange

    native = checkpoint.native_size
    low, high = (native, native) if text is None else parse_range(option, text)
    # A fixed size only has to be whole latents; a range must halve at every level of the U-Net.
    multiple = checkpoint.factor if low == high else checkpoint.size_multiple
    if low % multiple or high % multiple or high > MAX_SIDE:
        raise UsageError(
            f"{option} is {native if text is None else text}: multiples of {multiple} up to {MAX_SIDE} "
            f"({'a size' if low == high else 'a range'} of this checkpoint)"
        )
    return AxisRange(low, high, multiple)


def _report_lines(report: ParityReport, out: Path, seconds: float) -> list[str]:
    from rich.console import Console
    from rich.table import Table

    ran = ", ".join(sorted({figure.arithmetic for figure in report.figures}))
    title = f"ONNX Runtime ({ran}) against PyTorch (fp32), relative errors"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("output", "inputs"):
        table.add_column(heading, overflow="fold")
    for heading in ("L2", "largest", "allowed"):
        # In the 80 columns that a pipe gets names wrap; a figure without its exponent would say nothing.
        table.add_column(heading, justify="right", min_width=len("1.0e-05"))
    for figure in report.figures:
        table.add_row(
            f"{figure.component}.{figure.output}",
            figure.inputs,
            f"{figure.relative_l2:.1e}",
            f"{figure.relative_max:.1e}",
            f"{figure.tolerance:.1e}",
        )
    text = io.StringIO()
    Console(file=text, width=shutil.get_terminal_size().columns).print(table)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return [*lines, f"{out}: {size / 1e6:.1f} MB in {seconds:.1f} s"]


if __name__ == "__main__":
    sys.exit(main())
