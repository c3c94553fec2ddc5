"""``sd-run PROMPT``: draw from a bundle."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sdrt.runtime.cli_options import parser, pipeline_options
from sdrt.runtime.command import ReaderGoneError, put, quick_start, run_command, say, tell_of_long_work
from sdrt.runtime.entry import enter
from sdrt.runtime.interrupts import telling, undone
from sdrt.runtime.saving import (
    BASE64,
    PictureFiles,
    check_frames,
    check_output,
    is_folder,
    save_animation,
)

if TYPE_CHECKING:
    from rich.console import Console

    from sdrt.runtime.bundle import Bundle
    from sdrt.runtime.pipeline import Pipeline, PipelineOutput
    from sdrt.runtime.request import Request
DEFAULT_FRAMES: Final = 16
DEFAULT_FPS: Final = 8.0
STAGES: Final = ("load", "vae_encoder", "invert", "text_encoder", "denoise", "vae_decoder", "save")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    commands = parser()
    arguments = commands.parse_args(argv)
    if arguments.interactive and arguments.prompt is not None:
        commands.error("--interactive takes its prompts from standard input: leave PROMPT out")
    if not arguments.interactive and arguments.prompt is None and arguments.image is None:
        commands.error("the following arguments are required: PROMPT")
    if arguments.preview and arguments.interactive:
        commands.error("--preview does not go with --interactive")
    if arguments.warm_up and not arguments.interactive:
        commands.error("--warm-up goes with --interactive")
    if _interpolates(arguments) and arguments.interactive:
        commands.error("--to-prompt and --to-seed do not go with --interactive")
    if _interpolates(arguments) and arguments.prompt is None:
        commands.error("--to-prompt and --to-seed need a PROMPT to go from")
    if _interpolates(arguments) and arguments.num_images != 1:
        commands.error("--num-images does not go with --to-prompt and --to-seed: --frames says how many")
    if not _interpolates(arguments) and (arguments.frames is not None or arguments.fps is not None):
        commands.error("--frames and --fps go with --to-prompt or --to-seed")
    return run_command("sd-run", lambda: _run(arguments), quiet=arguments.quiet)


def _interpolates(arguments: argparse.Namespace) -> bool:
    return arguments.to_prompt is not None or arguments.to_seed is not None


def _run(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    if not (arguments.interactive and arguments.output == Path(BASE64)):
        check_output(arguments.output, animated=_interpolates(arguments))
    if _interpolates(arguments):
        check_frames(arguments.output, _fps(arguments))
    options = pipeline_options(arguments)
    with quick_start():
        request, pipeline = _load_for(arguments, options)
    with pipeline:
        for entry in arguments.embedding:
            pipeline.load_textual_inversion(*_file_and_word(entry))
        loaded = time.perf_counter() - started
        if arguments.interactive:
            from sdrt.runtime.interactive import serve

            serve(pipeline, options, arguments.output, load_seconds=loaded, warm_up=arguments.warm_up)
            return
        assert request is not None
        files = PictureFiles(arguments.output, frames=_interpolates(arguments))
        with telling(files.last_words):
            if not _interpolates(arguments) or is_folder(arguments.output):
                options["callback_on_batch_end"] = files
            output = _draw(arguments, pipeline, request, options)
            paths, saving = files.paths, time.perf_counter()
            if not paths:
                paths = [save_animation(output, arguments.output, _fps(arguments))]
            ended = time.perf_counter()
            saved = files.seconds + ended - saving
            seconds = {"load": loaded, **output.timings, "save": saved, "command": ended - started}
            _report(arguments, paths, output, seconds)


def _load_for(arguments: argparse.Namespace, options: dict[str, Any]) -> tuple[Request | None, Pipeline]:
    """What is asked for, and a pipeline that can draw it."""
    # NumPy and the rest only now: what argparse refuses need not wait for them.
    from sdrt.runtime.bundle import Bundle

    bundle = Bundle.open(arguments.bundle, verify=False)
    request = _request(arguments, bundle, options)  # before anything is loaded
    if arguments.negative_prompt and request is not None and not request.guided and not arguments.quiet:
        say("sd-run", f"warning: {_why_unguided(request)}: the negative prompt is not used")
    return request, _load(arguments, bundle, request)


def _file_and_word(entry: str) -> tuple[str, str | None]:
    """``FILE=WORD`` or ``FILE``; a name may have an equals sign, too."""
    file, equals, word = entry.rpartition("=")
    return (file, word or None) if equals and not os.path.isfile(entry) else (entry, None)  # noqa: PTH113


def _request(arguments: argparse.Namespace, bundle: Bundle, options: dict[str, Any]) -> Request | None:
    """What is asked for, checked; the requests of --interactive come later, but for their defaults."""
    from sdrt.runtime.request import build_request
    from sdrt.runtime.request_picture import PICTURE_OPTIONS

    if _interpolates(arguments):
        from sdrt.runtime.interpolation import interpolated_request

        frames, ends = _frames(arguments), (arguments.to_prompt, arguments.to_seed)
        return interpolated_request(bundle.manifest, arguments.prompt, ends[0], frames, ends[1], options)
    if arguments.interactive and (bundle.manifest.family == "image-variations" or bundle.manifest.reads_mask):
        return None  # without a picture there is nothing to check
    if not arguments.interactive:
        return build_request(bundle.manifest, arguments.prompt, options)
    if "image" not in options:  # requests may bring one; until then there is nothing to do with it
        options = {name: value for name, value in options.items() if name not in PICTURE_OPTIONS}
    return build_request(bundle.manifest, "", options)


def _why_unguided(request: Request) -> str:
    if request.sampling.embedded_guidance is not None:
        return "this model is told its guidance and runs one half"
    return "at a guidance scale of 1 or less"


def _frames(arguments: argparse.Namespace) -> int:
    return DEFAULT_FRAMES if arguments.frames is None else int(arguments.frames)


def _fps(arguments: argparse.Namespace) -> float:
    return DEFAULT_FPS if arguments.fps is None else float(arguments.fps)


def _draw(
    arguments: argparse.Namespace, pipeline: Pipeline, request: Request, options: dict[str, Any]
) -> PipelineOutput:
    batches = pipeline.count_batches(request)
    with _progress(arguments, pipeline, len(request.sampling.table) * batches) as (on_step, tensors):
        watched = {
            **options,
            "callback_on_step_end": on_step,
            "callback_on_step_end_tensor_inputs": tensors,
        }
        if not _interpolates(arguments):
            return pipeline(arguments.prompt, **watched)
        del watched["num_images_per_prompt"]
        return pipeline.interpolate(
            arguments.prompt,
            arguments.to_prompt,
            frames=_frames(arguments),
            to_seed=arguments.to_seed,
            **watched,
        )


def _load(arguments: argparse.Namespace, bundle: Bundle, request: Request | None) -> Pipeline:
    """The pipeline on a backend that admits the request; says which one, where that was left to us."""
    from sdrt.runtime.backends import AUTO, RequestShape
    from sdrt.runtime.loading import longest_prompt
    from sdrt.runtime.pipeline import Pipeline

    limits = bundle.manifest.limits
    shape = None
    if request is not None:
        images = max(limits.min_batch, min(len(request.conditions), limits.max_batch))
        chunks = longest_prompt(bundle, request)
        size, picture = (request.height, request.width), request.picture is not None
        shape = RequestShape(images, *size, request.guided, chunks, picture)
    if not arguments.quiet:
        tell_of_long_work("sd-run")
    pipeline = Pipeline.load(
        bundle,
        backend=arguments.backend,
        device=arguments.device,
        threads=arguments.threads,
        verify=not arguments.no_verify,
        request_shape=shape,
    )
    if arguments.backend == AUTO and not arguments.quiet:
        # What is the matter, without what could be done about it: that is in the error of a named backend.
        reasons = [reason.partition("; ")[0] for reason in pipeline.backend_reasons]
        say("sd-run", f"backend {pipeline.backend} ({'; '.join(reasons)})")
    return pipeline


@contextlib.contextmanager
def _progress(
    arguments: argparse.Namespace, pipeline: Pipeline, steps: int
) -> Iterator[tuple[Callable[[Pipeline, int, float, dict[str, Any]], None] | None, tuple[str, ...]]]:
    """A callback that moves a bar with each step, above it a preview if asked for, and what it must be given.

    On a terminal; nothing elsewhere.
    """
    if arguments.quiet or sys.stderr is None or not sys.stderr.isatty():
        if arguments.preview:
            say("sd-run", "warning: no preview: standard error is no terminal, or --quiet was given")
        yield None, ()
        return
    from rich.console import Console
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sdrt.runtime.preview import TerminalPreview

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console)
    task = bar.add_task("drawing", total=steps)
    view = TerminalPreview(bar)
    shows = arguments.preview and _can_preview(console, pipeline)

    def on_step(_pipeline: Pipeline, _step: int, _timestep: float, state: dict[str, Any]) -> None:
        if shows:
            view.update(state["preview"])
        bar.advance(task)

    with Live(view, console=console, transient=True) as live, undone(live.stop):
        yield on_step, (("preview",) if shows else ())


def _can_preview(console: Console, pipeline: Pipeline) -> bool:
    """Whether there is something to show and where; says why not."""
    from sdrt.runtime.preview import TerminalPreview

    if pipeline.bundle.manifest.preview is None:
        say("sd-run", "warning: no preview: this bundle was written without one; export it again")
        return False
    if not TerminalPreview.can_show(console):
        say("sd-run", "warning: no preview: the terminal does not show 256 colours and Unicode")
        return False
    return True


def _report(
    arguments: argparse.Namespace, paths: list[Path], output: PipelineOutput, seconds: dict[str, float]
) -> None:
    """Tell what was drawn: of pictures that are saved, and nobody has to read it."""
    with contextlib.suppress(ReaderGoneError):
        _tell(arguments, paths, output, seconds)


def _tell(
    arguments: argparse.Namespace, paths: list[Path], output: PipelineOutput, seconds: dict[str, float]
) -> None:
    # An animation is one path for all of its frames.
    seeds = [recipe["seed"] for recipe in output.recipes][: len(paths)]
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
        parts = ", ".join(f"{stage} {seconds[stage]:.2f}" for stage in STAGES if stage in seconds)
        put(f"{seconds['command']:.2f} s ({parts})")


if __name__ == "__main__":
    sys.exit(enter("sd-run", lambda: main))
