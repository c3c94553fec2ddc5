"""What a command draws: its calls, each checked before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sdrt.runtime.cli.options import ONE_PROMPT, interpolates
from sdrt.runtime.cli.prompts import Task, read_tasks
from sdrt.runtime.cli.saving import STDOUT, check_output
from sdrt.runtime.errors import UsageError

if TYPE_CHECKING:
    from sdrt.runtime.bundle.bundle import Bundle
    from sdrt.runtime.lora.library import LoraLibrary
    from sdrt.runtime.request.request import Request

DEFAULT_FRAMES: Final = 16
MAX_WAITING_BYTES: Final = 1 << 30  # of pictures that calls start from: a file may ask for thousands


class Work(NamedTuple):
    """One call of the pipeline.

    Attributes:
        request: What is drawn; without its picture, if that is not kept.
        target: Where its pictures go.
        read_again: Gives the request with its picture, if that is not kept.
    """

    request: Request
    target: Path | None
    read_again: Callable[[], Request] | None = None

    @property
    def images(self) -> int:
        """How many pictures it draws."""
        return len(self.request.seeds)

    @property
    def starts_from_picture(self) -> bool:
        """Whether it reads one."""
        return self.request.picture is not None or self.read_again is not None

    def whole_request(self) -> Request:
        """The request as it was checked."""
        return self.request if self.read_again is None else self.read_again()


class _Models(NamedTuple):
    """What a command draws with."""

    bundle: Bundle
    library: LoraLibrary
    refiner: Bundle | None

    def request(self, prompt: Any, options: dict[str, Any]) -> Request:
        """A call's request, checked."""
        from sdrt.runtime.request.build import build_request

        refiner = None if self.refiner is None else self.refiner.manifest
        return build_request(self.bundle.manifest, prompt, options, self.library, refiner)


def read_works(
    arguments: argparse.Namespace, bundle: Bundle, options: dict[str, Any], refiner: Bundle | None = None
) -> list[Work]:
    """What is asked for; the seeds of calls that have none of their own count on.

    Requests of ``--interactive`` come later: here are their defaults, if there is anything to check.

    Raises:
        UsageError: A call cannot be drawn.
        OutputError: Its pictures cannot be written.
    """
    from sdrt.runtime.lora.library import LoraLibrary

    models = _Models(bundle, LoraLibrary(bundle, arguments.lora_dir), refiner)
    if arguments.interactive:
        defaults = _request_of_defaults(models, options)
        return [] if defaults is None else [Work(defaults, arguments.output)]
    works = list(_works(arguments, models, options))
    count = sum(work.images for work in works)
    if count > 1 and any(work.target == STDOUT for work in works):
        raise UsageError(f"--output is -, and {count} pictures are asked for: one goes to standard output")
    return works


def check_target(arguments: argparse.Namespace, output: Path | None) -> None:
    """Refuse a place that a command's pictures cannot go to; errors as `check_output`."""
    animated, to_stdout = interpolates(arguments), not arguments.interactive
    check_output(output, animated=animated, to_stdout=to_stdout, quality=arguments.quality)


def _works(arguments: argparse.Namespace, models: _Models, options: dict[str, Any]) -> Iterator[Work]:
    from dataclasses import replace  # what argparse refuses need not wait for these

    from sdrt.runtime.request.texts import RANDOM_SEED

    seed, waiting = options.get("seed", RANDOM_SEED), 0
    for task in _tasks(arguments):
        own = {**options, "seed": seed, **task.options}
        target = arguments.output
        if task.output is not None:
            target = task.output
            check_target(arguments, target)
        request = _request(arguments, models, task, own)
        if "seed" not in task.options and isinstance(seed, int) and seed != RANDOM_SEED:
            seed = (seed + len(request.seeds)) % 2**64
        held = 0 if request.picture is None else request.picture.canvas.nbytes
        if waiting and waiting + held > MAX_WAITING_BYTES:
            again = partial(_request, arguments, models, task, {**own, "seed": request.seeds})
            yield Work(replace(request, picture=None), target, again)
            continue
        waiting += held
        yield Work(request, target)


def _tasks(arguments: argparse.Namespace) -> Sequence[Task]:
    if arguments.recipe_prompt is not None:
        return [Task(arguments.recipe_prompt, {})]
    tasks = read_tasks(arguments)
    if interpolates(arguments) and len(tasks) != 1:
        raise UsageError(ONE_PROMPT)
    return tasks


def _request(arguments: argparse.Namespace, models: _Models, task: Task, options: dict[str, Any]) -> Request:
    from sdrt.runtime.request.build import build_interpolation

    try:
        if not interpolates(arguments):
            return models.request(task.prompt, options)
        if not isinstance(task.prompt, str):
            raise UsageError(ONE_PROMPT)
        frames = DEFAULT_FRAMES if arguments.frames is None else arguments.frames
        ends = (arguments.to_prompt, arguments.to_seed)
        return build_interpolation(
            models.bundle.manifest, task.prompt, ends[0], frames, ends[1], options, models.library
        )
    except UsageError as error:
        raise UsageError(f"{task.name}: {error}") if task.name else error from error


def _request_of_defaults(models: _Models, options: dict[str, Any]) -> Request | None:
    from sdrt.runtime.request.picture import PICTURE_OPTIONS

    if models.bundle.manifest.needs_picture or models.bundle.manifest.reads_depth:
        return None  # without a picture there is nothing to check
    if "image" not in options:  # requests may bring one; until then there is nothing to do with it
        options = {name: value for name, value in options.items() if name not in PICTURE_OPTIONS}
    return models.request("", options)
