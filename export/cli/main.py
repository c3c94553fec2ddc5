"""``sd-export``: a checkpoint becomes a bundle, a bundle gets engines."""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import io
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sdrt.export.cli.options import DEFAULT_BATCH, DEFAULT_CHUNKS, PARTS, parse
from sdrt.export.engines.flavours import check_flavour
from sdrt.export.engines.options import parse_extent
from sdrt.export.options import AxisRange, ExportOptions
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.manifest import MANIFEST_NAME
from sdrt.runtime.console.run_command import ReaderGoneError, put, run_command, say
from sdrt.runtime.errors import OutputError, SdrtError, UsageError
from sdrt.runtime.system.files import explain, writing
from sdrt.runtime.system.interrupts import is_watched

if TYPE_CHECKING:
    from sdrt.export.checkpoint.assembly import Assembly
    from sdrt.export.checkpoint.checkpoint import Checkpoint
    from sdrt.export.parity.components import ParityReport

MAX_SIDE: Final = 4096
# Of the embedded model (CPU time of three exports each in turns: 24 and 33 s; an evaluation: within 2 %).
FIXED_COST: Final = "take 0.7 of a small model's export time, and draw no faster on the CPU"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        arguments = parse(argv)
    except UsageError as error:
        say("sd-export", str(error))
        return error.exit_status
    return run_command("sd-export", lambda: _run(arguments), quiet=arguments.quiet)


def _run(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    show = _Lines(quiet=arguments.quiet)
    bundle = Path(arguments.model) if arguments.mode == "engines" else arguments.out
    for options in arguments.engines:
        check_flavour(options)  # before the minutes of an export
    if arguments.mode == "export":
        _export(arguments, show, started)
    _build_engines(arguments, bundle, show, started)


def _export(arguments: argparse.Namespace, show: _Lines, started: float) -> None:
    # What can be said without the seconds that torch takes to import is said first.
    out = _place(arguments.out, force=arguments.force)
    # One line of an error is for the user; the libraries' own chatter is not.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    try:
        opened = _opened(arguments, out, show)
        with opened as checkpoint:
            _write(arguments, checkpoint, out, show, started)
    except ImportError as error:
        raise SdrtError(f"{error}: pip install 'sdrt[export]'") from error


def _write(
    arguments: argparse.Namespace, checkpoint: Checkpoint, out: Path, show: _Lines, started: float
) -> None:
    from sdrt.export.writer import write_bundle

    if is_watched():  # in a process of its own what the libraries have made stays to the end
        gc.freeze()  # so that no look for garbage, of which an export takes many, goes through it
    if not arguments.quiet:
        for remark in checkpoint.remarks:
            say("sd-export", f"warning: {remark}")
    if checkpoint.few_steps is not None:
        show(checkpoint.few_steps.line)
    batch = arguments.sizes.get("batch") or parse_extent("--batch", DEFAULT_BATCH)
    options = ExportOptions(
        precision=arguments.dtype,
        fp16_weights=arguments.fp16_weights,
        batch=AxisRange(batch.minimum, batch.maximum),
        height=_side(checkpoint, "height", arguments),
        width=_side(checkpoint, "width", arguments),
        chunks=arguments.sizes["chunks"].maximum if "chunks" in arguments.sizes else DEFAULT_CHUNKS,
        opset=arguments.opset,
        full_parity=arguments.full_parity,
        vae_precision=arguments.vae_dtype,
        steps=arguments.default_steps,
        guidance=arguments.default_guidance,
    )
    report = write_bundle(
        checkpoint,
        out,
        options,
        overwrite=arguments.force,
        progress=lambda stage: show(f"[{time.perf_counter() - started:6.1f} s] {stage}"),
    )
    for line in _report_lines(report, arguments.out, time.perf_counter() - started):
        show(line)


def _opened(
    arguments: argparse.Namespace, out: Path, show: _Lines
) -> contextlib.AbstractContextManager[Checkpoint]:
    """The checkpoint that was asked for, for as long as it is exported."""
    if arguments.architecture is not None:
        from sdrt.export.checkpoint.architectures import open_architecture

        return contextlib.nullcontext(open_architecture(arguments.architecture, seed=arguments.weights_seed))
    from sdrt.export.checkpoint.assembly import Parts, assembly_of
    from sdrt.export.checkpoint.overrides import Overrides

    config = arguments.config
    overrides = Overrides(
        family=arguments.family or "",
        prediction_type=arguments.prediction_type or "",
        zero_snr=arguments.zero_snr,
        config=None if config is None else Path(config),
    )
    others = {name: Path(text) for name in PARTS if (text := getattr(arguments, name)) is not None}
    assembly = assembly_of(Parts(arguments.model, arguments.revision, others, overrides))
    if assembly.line:
        show(assembly.line)
    return _with_loras(arguments, assembly, out, show) if arguments.lora else assembly.opened(out)


@contextlib.contextmanager
def _with_loras(
    arguments: argparse.Namespace, assembly: Assembly, out: Path, show: _Lines
) -> Iterator[Checkpoint]:
    from sdrt.export.checkpoint.loras import read_loras

    loras = read_loras(assembly, arguments.lora, partial=arguments.lora_partial)
    for line in loras.lines:
        show(line)
    with assembly.opened(out, loras.edits()) as checkpoint:
        yield replace(checkpoint, loras=tuple(loras.provenance))


def _build_engines(arguments: argparse.Namespace, bundle: Path, show: _Lines, started: float) -> None:
    """Add the engines of every flavour that was asked for to a bundle that is there."""
    if not arguments.engines:
        return
    try:
        from sdrt.export.engines.report import build_bar, report_lines
        from sdrt.export.engines.writer import Listener, add_engines
    except ImportError as error:
        raise SdrtError(f"{error}: pip install 'sdrt[export]'") from error

    for options in arguments.engines:
        with build_bar(show=not arguments.quiet and sys.stdout.isatty()) as bar:
            listener = Listener(
                stage=lambda stage: show(f"[{time.perf_counter() - started:6.1f} s] {stage}"), phase=bar
            )
            reports = add_engines(bundle, options, replace=arguments.force, listener=listener)
        for line in report_lines(reports):
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
        except ReaderGoneError:
            self._silent = True
        except OutputError as error:
            self._silent = True
            say("sd-export", f"warning: {error}; the export goes on")


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
    # --force deletes what is there: `--force .` or a mistyped name must not cost anybody's work.
    if out.exists() and not (out.is_dir() and ((out / MANIFEST_NAME).is_file() or not any(out.iterdir()))):
        raise UsageError(
            f"{out} exists already and is not a bundle: --force replaces bundles and empty folders only; "
            "give another name"
        )
    if out.exists() and not force:
        raise UsageError(f"{out} exists already; give another name, or --force to replace it")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"cannot write {out}: {explain(FileNotFoundError(errno.ENOENT, ''))}")


def _side(checkpoint: Checkpoint, name: str, arguments: argparse.Namespace) -> AxisRange:
    """One side's range in pixels; see `usual_side` for what it is without the option."""
    native, given = checkpoint.native_size, arguments.sizes.get(name)
    if given is None:
        low, high = usual_side(native, checkpoint.size_multiple, fixed=bool(arguments.engines))
    else:
        low, high = given.minimum, given.maximum
    # A fixed size only has to be whole latents; a range must halve at every level of the U-Net.
    multiple = checkpoint.factor if low == high else checkpoint.size_multiple
    if low % multiple or high % multiple or high > MAX_SIDE:
        raise UsageError(
            f"--{name} is {native if given is None else getattr(arguments, name)}: multiples of {multiple} "
            f"up to {MAX_SIDE} ({'a size' if low == high else 'a range'} of this checkpoint)"
        )
    return AxisRange(low, high, multiple)


def usual_side(native: int, multiple: int, *, fixed: bool) -> tuple[int, int]:
    """The smallest and largest side in pixels of graphs for which the user names none.

    From half to twice the size that the model was trained at, in whole multiples; that size alone where
    engines are built for it, or where it is no multiple.

    Args:
        native: What the model was trained at.
        multiple: What sides must be multiples of, so that all levels of the networks can halve them.
        fixed: Whether it shall be that size alone.
    """
    if fixed or native % multiple:
        return native, native
    low = -(-native // (2 * multiple)) * multiple
    # Of one multiple alone the tracer takes the size of the lowest level, 1, for a constant.
    return min(native, max(low, 2 * multiple)), max(native, min(2 * native, MAX_SIDE // multiple * multiple))


def _sizes_line(bundle: Path) -> str:
    """What sizes the bundle draws, and what a range costs."""
    limits = Bundle.open(bundle, verify=False).manifest.limits
    sides = [limits.height, limits.width]
    text = "draws " + " x ".join(str(side) for side in sides) + " pixels"
    if all(side.minimum == side.maximum for side in sides):
        return text
    return f"{text}; fixed sizes (--height N --width N) {FIXED_COST}"


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
    return [*lines, _sizes_line(out), f"{out}: {size / 1e6:.1f} MB in {seconds:.1f} s"]
