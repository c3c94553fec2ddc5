"""``sd-run PROMPT``: draw from a bundle."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import sdrt
from sdrt.runtime.command import Parser, put, run_command, say
from sdrt.runtime.errors import OutputError, UsageError

if TYPE_CHECKING:
    from sdrt.runtime.pipeline import Pipeline, PipelineOutput

EPILOG: Final = """exit status: 0 done; 2 usage; 3 the bundle cannot be used; 6 NaN or infinity;
7 the backend is missing or fails; 8 the picture cannot be written; 130 interrupted; 1 anything else.
No file is left half written."""


def parser() -> argparse.ArgumentParser:
    """The command line of ``sd-run``."""
    result = Parser(
        prog="sd-run",
        description="Draw pictures from a prompt.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add("prompt", metavar="PROMPT", help="what to draw")
    add("--negative-prompt", default="", metavar="TEXT", help="what to move away from")
    add("--bundle", metavar="DIR", help="a folder that sd-export made (default: the embedded emoji model)")
    add(
        "--steps",
        "--num-inference-steps",
        type=int,
        metavar="N",
        help="sampling steps (default: the bundle's)",
    )
    add(
        "--guidance-scale",
        type=float,
        metavar="W",
        help="how far to follow the prompt; 1 or less: no guidance (default: the bundle's)",
    )
    add("--seed", type=int, metavar="N", help="of the first picture; the others count up (default: random)")
    add(
        "--num-images",
        "--num-images-per-prompt",
        type=int,
        default=1,
        metavar="N",
        help="how many pictures (default: 1)",
    )
    add("--height", type=int, metavar="PIXELS", help="default: the bundle's")
    add("--width", type=int, metavar="PIXELS", help="default: the bundle's")
    add("--sampler", metavar="NAME", help="ddim, dpmpp_2m or euler (default: the bundle's)")
    add("--karras", action="store_true", help="noise levels of Karras et al. 2022 (dpmpp_2m and euler)")
    add(
        "--eta",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="fresh noise per step, 0 to 1 (ddim; default: 0)",
    )
    add(
        "--rng",
        default="philox",
        metavar="NAME",
        help="philox or cpu: the noise of PyTorch's CUDA or CPU generator (default: philox)",
    )
    add("--output", "-o", type=Path, metavar="PATH", help="a .png, or a folder (default: ./PROMPT-SEED.png)")
    add("--json", action="store_true", help="print one JSON object: paths, seeds, seconds per stage")
    add("--quiet", "-q", action="store_true", help="print errors only")
    add("--backend", default="onnxruntime-cpu", metavar="NAME", help="onnxruntime-cpu, the only one so far")
    add("--threads", type=int, metavar="N", help="threads inside one operator (default: one per core)")
    add("--no-verify", action="store_true", help="compare sizes but not hashes of the bundle's files")
    add("--version", action="version", version=f"sdrt {sdrt.__version__}")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = parser().parse_args(argv)
    return run_command("sd-run", lambda: _run(arguments), quiet=arguments.quiet)


def _run(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    _check_output(arguments.output)
    # NumPy and the rest only now: what argparse refuses need not wait for them.
    from sdrt.runtime.bundle import Bundle
    from sdrt.runtime.pipeline import Pipeline
    from sdrt.runtime.request import build_request

    bundle = Bundle.open(arguments.bundle, verify=False)
    options = _options(arguments)
    request = build_request(bundle.manifest, arguments.prompt, **options)  # refused before anything is loaded
    if arguments.negative_prompt and not request.guided and not arguments.quiet:
        say("sd-run", "warning: at a guidance scale of 1 or less the negative prompt is not used")
    pipeline = Pipeline.load(
        bundle, backend=arguments.backend, threads=arguments.threads, verify=not arguments.no_verify
    )
    loaded = time.perf_counter() - started
    batches = -(-arguments.num_images // bundle.manifest.limits.max_batch)
    with _progress(arguments, len(request.table.timesteps) * batches) as on_step:
        output = pipeline(
            arguments.prompt,
            **options,
            callback_on_step_end=on_step,
            callback_on_step_end_tensor_inputs=(),
        )
    saving = time.perf_counter()
    paths = _save(arguments, output)
    ended = time.perf_counter()
    seconds = {"load": loaded, **output.timings, "save": ended - saving, "command": ended - started}
    _report(arguments, paths, output, seconds)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments that the command shares with `Pipeline.__call__`, by its names."""
    return {
        "negative_prompt": arguments.negative_prompt,
        "height": arguments.height,
        "width": arguments.width,
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "num_images_per_prompt": arguments.num_images,
        "seed": arguments.seed,
        "rng": arguments.rng,
        "sampler": arguments.sampler,
        "karras": arguments.karras,
        "eta": arguments.eta,
    }


def _check_output(output: Path | None) -> None:
    """Refuse a place that cannot be written before anything is drawn."""
    target = Path() if output is None else output
    folder = target.parent if target.suffix.lower() == ".png" else target
    if target.suffix and target.suffix.lower() != ".png" and not _is_folder(target):
        raise UsageError(f"--output is {target}: a name that ends in .png, or a folder")
    if not _is_folder(folder):
        exists = os.path.lexists(folder)
        reason = (
            f"{folder} is not a folder" if exists else f"the folder {folder} does not exist; make it first"
        )
        raise OutputError(f"cannot write {target}: {reason}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {target}: no permission to write in {folder}")


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for a name that is too long


def _save(arguments: argparse.Namespace, output: PipelineOutput) -> list[Path]:
    from sdrt.runtime.files import write_all_atomically
    from sdrt.runtime.images import png_bytes

    paths = _paths(arguments, [recipe["seed"] for recipe in output.recipes])
    pictures = zip(paths, output.images, output.recipes, strict=True)
    write_all_atomically({path: png_bytes(image, recipe) for path, image, recipe in pictures})
    return paths


def _paths(arguments: argparse.Namespace, seeds: Sequence[int]) -> list[Path]:
    """One file per picture; several pictures for one name get ``-1``, ``-2`` … before the suffix."""
    from sdrt.runtime.images import slug

    output: Path | None = arguments.output
    if output is None or output.suffix.lower() != ".png" or _is_folder(output):
        folder = Path() if output is None else output
        return [_free_name(folder / f"{slug(arguments.prompt)}-{seed}.png") for seed in seeds]
    if len(seeds) == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{index}") for index in range(1, len(seeds) + 1)]


def _free_name(path: Path) -> Path:
    """A name that we chose ourselves never replaces an older picture: ``-2``, ``-3`` … is added."""
    candidates = (path.with_stem(f"{path.stem}-{count}") for count in itertools.count(2))
    return next(name for name in itertools.chain([path], candidates) if not os.path.lexists(name))


@contextmanager
def _progress(
    arguments: argparse.Namespace, steps: int
) -> Iterator[Callable[[Pipeline, int, float, dict[str, Any]], None] | None]:
    """A bar that moves with each step, on a terminal; nothing elsewhere."""
    if arguments.quiet or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("drawing", total=steps)

        def on_step(_pipeline: Pipeline, _step: int, _timestep: float, _state: dict[str, Any]) -> None:
            bar.advance(task)

        yield on_step


def _report(
    arguments: argparse.Namespace, paths: list[Path], output: PipelineOutput, seconds: dict[str, float]
) -> None:
    seeds = [recipe["seed"] for recipe in output.recipes]
    if arguments.json:
        document = {
            "images": [{"path": str(path), "seed": seed} for path, seed in zip(paths, seeds, strict=True)],
            "seed": seeds[0],
            "seconds": {stage: round(value, 4) for stage, value in seconds.items()},
        }
        put(json.dumps(document))
    elif not arguments.quiet:
        for path, seed in zip(paths, seeds, strict=True):
            put(f"{path}  seed {seed}")
        stages = ("load", "text_encoder", "denoise", "vae_decoder", "save")
        parts = ", ".join(f"{stage} {seconds[stage]:.2f}" for stage in stages)
        put(f"{seconds['command']:.2f} s ({parts})")


if __name__ == "__main__":
    sys.exit(main())
