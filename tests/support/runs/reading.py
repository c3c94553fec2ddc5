"""The parity gate's comparison with diffusers' own pipeline, without an export around it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.graphs.networks import wrapped
from sdrt.export.manifest import draft_manifest, tokenizer_files
from sdrt.export.options import AxisRange, ExportOptions
from sdrt.export.parity.components import ParityReport
from sdrt.export.parity.pipeline import check_reading
from sdrt.export.writer import reading_options
from sdrt.runtime.bundle.bundle import sha256
from sdrt.runtime.bundle.manifest import FileEntry, TokenizerFacts

_ONE = AxisRange(1, 1)
ANY = ExportOptions("fp32", False, _ONE, _ONE, _ONE, chunks=1, opset=23)


def compare_reading(
    folder: Path, change: Callable[[Checkpoint], Checkpoint] = lambda checkpoint: checkpoint
) -> ParityReport:
    """The report of `check_reading` on a checkpoint, read and then changed by ``change``."""
    checkpoint, report = change(open_checkpoint(str(folder))), ParityReport()
    with tempfile.TemporaryDirectory() as temporary:
        facts = []
        for name, tokenizer in zip(tokenizer_files(checkpoint), checkpoint.tokenizers, strict=True):
            file = Path(temporary, name)
            file.write_bytes(tokenizer.to_json())
            entry = FileEntry(name, file.stat().st_size, sha256(file))
            facts.append(TokenizerFacts(file=entry, **tokenizer.ids))
        manifest = draft_manifest(checkpoint, reading_options(checkpoint, ANY), facts)
        check_reading(checkpoint, Path(temporary), manifest, wrapped(checkpoint, "unet"), report)
    return report


def is_equal(report: ParityReport) -> bool:
    """Whether latents and picture were compared, and are the same."""
    outputs = [figure.output for figure in report.figures if figure.passed]
    return outputs == ["latents", "image"]
