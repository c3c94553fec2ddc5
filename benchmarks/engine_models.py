"""A bundle with engines of one flavour, made once and kept, for backends that need engines.

    python -m sdrt.benchmarks.engine_models BUNDLE --engine FLAVOUR [options of sd-export]

A copy of the bundle lies under ``bench/engines`` in `sdrt.kernels.cache.cache_folder`; the bundle
itself, which may be a user's or the installed one, stays as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sdrt.benchmarks.export_model import NAMES, exporter_key
from sdrt.benchmarks.told_process import Tell, run_told
from sdrt.kernels.cache import cache_folder, mark_used, private_folder, remove_unused
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.manifest import MANIFEST_NAME
from sdrt.runtime.devices.gpu.discovery import Gpu
from sdrt.runtime.system.files import new_folder, writing

KIND: Final = "bench/engines"  # of cache
COMPLETE: Final = "sdrt-bench-engines.json"  # written last: what the engines were built for


def main(argv: Sequence[str] | None = None) -> int:
    """``sd-export`` with its progress on standard error; the exit status is its own."""
    from sdrt.export.cli import main as cli

    with contextlib.redirect_stdout(sys.stderr):
        return cli.main(argv)


def with_engines(
    bundle: Bundle,
    flavour: str,
    gpu: Gpu,
    sizes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    tell: Tell = lambda _line, _seconds: None,
) -> Bundle:
    """The bundle with engines for what is measured, built by ``sd-export`` if they are not there.

    Args:
        bundle: What they are built from.
        flavour: A key of `sdrt.runtime.bundle.engines.FLAVOURS`.
        gpu: That they are to run on.
        sizes: Height and width in pixels, the main one first.
        batches: Pictures drawn together.
        tell: Told what goes on, see `run_told`.

    Raises:
        SdrtError: They cannot be built; with the exit status of ``sd-export`` and its last line.
        OutputError: The cache folder cannot be written.
    """
    from sdrt.export.engines.flavours import flavour_version

    words = ["--engine", flavour, *engine_words(sizes, batches), "--no-engine-parity"]
    facts = {
        "bundle": hashlib.sha256((bundle.path / MANIFEST_NAME).read_bytes()).hexdigest(),
        "words": words,
        "library": flavour_version(flavour),
        "gpu": [gpu.name, *gpu.capability],
        "exporter": exporter_key(),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    with writing(cache_folder(KIND)):
        parent = private_folder(KIND)
    target = parent / f"{bundle.path.resolve().name}-{flavour}-{key}"
    if not (target / COMPLETE).is_file():
        remove_unused(parent, NAMES, COMPLETE)
        with new_folder(target, replace=True) as folder, writing(target):
            _copy(bundle, folder)
            _build(folder, words, tell)
            (folder / COMPLETE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    mark_used(target / COMPLETE)
    return Bundle.open(target)


def engine_words(sizes: Sequence[tuple[int, int]], batches: Sequence[int]) -> list[str]:
    """Options of ``sd-export`` that give the profiles.

    One is for one picture of the main size alone, which is the fastest; another one for all that is measured,
    if that is more.
    """
    (height, width), most = sizes[0], max(batches, default=1)
    main = f"batch=1,height={height},width={width}"
    heights, widths = zip(*sizes, strict=True)
    every = (
        f"batch=1..{most},height={min(heights)}..{height}..{max(heights)},"
        f"width={min(widths)}..{width}..{max(widths)}"
    )
    return ["--profile", main, *(["--profile", every] if most > 1 or len(set(sizes)) > 1 else [])]


def _copy(bundle: Bundle, folder: Path) -> None:
    """The bundle's files without its engines; no links: onnx refuses weights that have a second name."""
    for name in (MANIFEST_NAME, *(entry.path for entry in bundle.manifest.files())):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / name, target)


def _build(folder: Path, words: Sequence[str], tell: Tell) -> None:
    done = run_told([sys.executable, "-m", "sdrt.benchmarks.engine_models", str(folder), *words], tell)
    done.check("engines were not built", "sd-export")


if __name__ == "__main__":
    sys.exit(main())
