"""``sd-run PROMPT``: draw from a bundle."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sdrt.runtime.cli.lora_options import say_loras
from sdrt.runtime.cli.options import REFINE_FROM, check_usage, interpolates, parsed, parser, pipeline_options
from sdrt.runtime.cli.progress import progress_shown
from sdrt.runtime.cli.prompts import has_prompt
from sdrt.runtime.cli.saving import (
    BASE64,
    STDOUT,
    PictureFiles,
    check_frames,
    is_folder,
    save_animation,
    saved_message,
    write_to_stdout,
)
from sdrt.runtime.cli.work import Work, check_target, read_works
from sdrt.runtime.console.run_command import (
    Parser,
    ReaderGoneError,
    put,
    quick_start,
    run_command,
    say,
    tell_of_long_work,
)
from sdrt.runtime.system.interrupts import NOTHING_LEFT, telling

if TYPE_CHECKING:
    from sdrt.runtime.backends.backend import RequestShape
    from sdrt.runtime.bundle.bundle import Bundle
    from sdrt.runtime.pipeline import Pipeline
    from sdrt.runtime.request.output import CallbackOptions, PipelineOutput
    from sdrt.runtime.request.request import Request

DEFAULT_FPS: Final = 8.0
STAGES: Final = (
    *("load", "lora", "vae_encoder", "invert", "text_encoder", "denoise", "vae_decoder", "save"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    commands = parser()
    arguments = parsed(commands, argv)
    if arguments.from_picture is None:
        check_usage(commands, arguments)
    elif arguments.interactive:
        commands.error("--from does not go with --interactive: a recipe is a request there")
    return run_command("sd-run", lambda: _run(commands, arguments), quiet=arguments.quiet)


def _run(commands: Parser, arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    options = pipeline_options(arguments)
    if arguments.from_picture is not None:
        options = _replayed(commands, arguments, options)
    if arguments.refiner is not None:
        options.setdefault("refine_from", REFINE_FROM)
    if not (arguments.interactive and arguments.output == Path(BASE64)):
        check_target(arguments, arguments.output)
    if interpolates(arguments):
        check_frames(arguments.output, _fps(arguments))
    with quick_start():
        works, pipeline = _load_for(arguments, options)
    with pipeline:
        for entry in arguments.embedding:
            pipeline.load_textual_inversion(*_file_and_word(entry))
        loaded = time.perf_counter() - started
        if arguments.interactive:
            from sdrt.runtime.cli.interactive import serve

            serve(pipeline, options, arguments.output, load_seconds=loaded, warm_up=arguments.warm_up)
            return
        if arguments.verbose and not arguments.quiet:
            say_loras(work.request for work in works)
        drawn = Drawn(works)
        with telling(drawn.last_words):
            _draw(arguments, pipeline, works, drawn)
            seconds = {"load": loaded, **drawn.seconds, "command": time.perf_counter() - started}
            _report(arguments, drawn, seconds)


def _replayed(commands: Parser, arguments: argparse.Namespace, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ``--from``, with what the command line says in their place."""
    from sdrt.runtime.cli.replay import with_recipe
    from sdrt.runtime.pictures.metadata import read_recipe

    prompt, options = with_recipe(arguments, read_recipe(arguments.from_picture), given)
    if not has_prompt(arguments):
        arguments.recipe_prompt = prompt
    check_usage(commands, arguments)
    return options


def _load_for(arguments: argparse.Namespace, options: dict[str, Any]) -> tuple[list[Work], Pipeline]:
    """What is asked for, and a pipeline that can draw it."""
    # NumPy and the rest only now: what argparse refuses need not wait for them.
    from sdrt.runtime.bundle.bundle import Bundle

    bundle = Bundle.open(arguments.bundle, verify=False)
    refiner = None if arguments.refiner is None else Bundle.open(arguments.refiner, verify=False)
    works = read_works(arguments, bundle, options, refiner)  # before anything is loaded
    unguided = (work.request for work in works if not work.request.guided)
    if arguments.negative_prompt and not arguments.quiet and (request := next(unguided, None)) is not None:
        say("sd-run", f"warning: {_why_unguided(request)}: the negative prompt is not used")
    return works, _load(arguments, bundle, refiner, works)


def _file_and_word(entry: str) -> tuple[str, str | None]:
    """``FILE=WORD`` or ``FILE``; a name may have an equals sign, too."""
    file, equals, word = entry.rpartition("=")
    return (file, word or None) if equals and not os.path.isfile(entry) else (entry, None)  # noqa: PTH113


def _why_unguided(request: Request) -> str:
    if request.sampling.embedded_guidance is not None:
        return "this model is told its guidance and runs one half"
    return "at a guidance scale of 1 or less"


def _fps(arguments: argparse.Namespace) -> Any:
    return DEFAULT_FPS if arguments.fps is None else arguments.fps


class Drawn:
    """What a command has drawn and saved so far.

    Attributes:
        paths: Where the pictures are, in their order; `STDOUT` for standard output.
        seeds: Seeds of the pictures, in their order.
        seconds: What each stage took, for all calls together.
    """

    def __init__(self, works: Sequence[Work]) -> None:
        """Nothing yet of these calls."""
        self.paths: list[Path] = []
        self.seeds: list[int] = []
        self.seconds: dict[str, float] = {}
        self._wanted = sum(work.images for work in works)
        self._totals: dict[Path | None, int] = {}
        for work in works:
            self._totals[work.target] = self._totals.get(work.target, 0) + work.images
        self._files: dict[Path | None, PictureFiles] = {}

    def files_of(self, work: Work, *, frames: bool, quality: int | None) -> PictureFiles:
        """Where a call's pictures go; a name that several calls have is numbered over all of theirs."""
        target = work.target
        if target not in self._files:
            total = self._totals[target]
            self._files[target] = PictureFiles(target, frames=frames, quality=quality, total=total)
        self._files[target].next_call()
        return self._files[target]

    def add(self, paths: Sequence[Path], output: PipelineOutput, saving: float) -> None:
        """Note a call that is finished, and how long saving its pictures took."""
        self.paths.extend(paths)
        # An animation is one path for all of its frames.
        self.seeds.extend([recipe["seed"] for recipe in output.recipes][: len(paths)])
        for stage, value in {**output.timings, "save": saving}.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value

    def last_words(self) -> str:
        """What is said of an interrupt: how many pictures are saved, and where."""
        paths = [path for files in self._files.values() for path in files.paths]
        return f"interrupted; {saved_message(paths, self._wanted)}" if paths else NOTHING_LEFT


def _draw(arguments: argparse.Namespace, pipeline: Pipeline, works: Sequence[Work], drawn: Drawn) -> None:
    """Draw call by call; pictures are saved as soon as their batch is finished."""
    rows = sum(pipeline.count_rows(work.request) for work in works)
    with progress_shown(arguments, rows) as (on_step, tensors):
        watched: CallbackOptions = {
            "callback_on_step_end": on_step,
            "callback_on_step_end_tensor_inputs": tensors,
        }
        for work in works:
            _draw_and_save(arguments, pipeline, work, watched, drawn)
    drawn.seconds["step"] = drawn.seconds["denoise"] / rows


def _draw_and_save(
    arguments: argparse.Namespace,
    pipeline: Pipeline,
    work: Work,
    watched: CallbackOptions,
    drawn: Drawn,
) -> None:
    """One call: its pictures one batch after the other, or all of its frames, or the picture for a pipe."""
    target, animated, request = work.target, interpolates(arguments), work.whole_request()
    if target == STDOUT or (animated and not is_folder(target)):
        output = pipeline.draw(request.with_callbacks(**watched))
        started = time.perf_counter()
        if target == STDOUT:
            write_to_stdout(output)
        paths = [STDOUT if target == STDOUT else save_animation(output, target, _fps(arguments))]
        drawn.add(paths, output, time.perf_counter() - started)
        return
    files = drawn.files_of(work, frames=animated, quality=arguments.quality)
    before, seconds = len(files.paths), files.seconds
    callbacks: CallbackOptions = {**watched, "callback_on_batch_end": files}
    output = pipeline.draw(request.with_callbacks(**callbacks))
    drawn.add(files.paths[before:], output, files.seconds - seconds)


def _load(
    arguments: argparse.Namespace, bundle: Bundle, refiner: Bundle | None, works: Sequence[Work]
) -> Pipeline:
    """The pipeline on a backend that admits the requests; says which one, where that was left to us."""
    from sdrt.runtime.backends.registry import AUTO
    from sdrt.runtime.pipeline import Pipeline

    if not arguments.quiet:
        tell_of_long_work("sd-run")
    pipeline = Pipeline.load(
        bundle,
        refiner=refiner,
        backend=arguments.backend,
        device=arguments.device,
        threads=arguments.threads,
        verify=arguments.verify,
        request_shape=_shape(bundle, works),
        lora_dir=arguments.lora_dir,
    )
    if arguments.backend == AUTO and not arguments.quiet:
        _say_backend(pipeline, verbose=arguments.verbose)
    return pipeline


def _shape(bundle: Bundle, works: Sequence[Work]) -> RequestShape | None:
    """The most that any request asks for; of sizes the first one's."""
    from sdrt.runtime.backends.backend import RequestShape
    from sdrt.runtime.drawing.loading import longest_prompt

    if not works:
        return None
    requests, limits = [work.request for work in works], bundle.manifest.limits
    images = max(len(request.conditions) for request in requests)
    return RequestShape(
        max(limits.min_batch, min(images, limits.max_batch)),
        requests[0].height,
        requests[0].width,
        any(request.guided for request in requests),
        longest_prompt(bundle, requests),
        any(work.starts_from_picture for work in works),
        bundle.manifest.record.guided_rows,
    )


def _say_backend(pipeline: Pipeline, *, verbose: bool) -> None:
    """Which backend was taken; why no other before it, if asked for or if a GPU is there."""
    from sdrt.runtime.devices.gpu.discovery import NO_DRIVER

    reasons = pipeline.backend_reasons
    why = ""
    if verbose or not any(NO_DRIVER in reason for reason in reasons):
        # What is the matter, without what could be done about it: that is in the error of a named backend.
        why = f" ({'; '.join(reason.partition('; ')[0] for reason in reasons)})"
    say("sd-run", f"backend {pipeline.backend}{why}")


def _report(arguments: argparse.Namespace, drawn: Drawn, seconds: Mapping[str, float]) -> None:
    """Tell what was drawn: of pictures that are saved, and nobody has to read it."""
    with contextlib.suppress(ReaderGoneError):
        _print_report(arguments, drawn, seconds)


def _print_report(arguments: argparse.Namespace, drawn: Drawn, seconds: Mapping[str, float]) -> None:
    named = list(zip(drawn.paths, drawn.seeds, strict=True))
    if arguments.json:
        document = {
            "images": [{"path": str(path), "seed": seed} for path, seed in named],
            "seed": drawn.seeds[0],
            "seconds": {stage: round(value, 4) for stage, value in seconds.items()},
        }
        put(json.dumps(document))
    elif not arguments.quiet:
        parts = ", ".join(f"{stage} {seconds[stage]:.2f}" for stage in STAGES if stage in seconds)
        lines = [f"{path}  seed {seed}" for path, seed in named]
        for line in (*lines, f"{seconds['command']:.2f} s ({parts})"):
            # What holds the picture itself has no room for words about it.
            say("sd-run", line) if STDOUT in drawn.paths else put(line)
