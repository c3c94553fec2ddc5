"""Where the command's pictures go: checked before anything is drawn, each written whole, and soon."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sdrt.runtime.console.printable import printable
from sdrt.runtime.errors import OutputError, UsageError
from sdrt.runtime.system.interrupts import NOTHING_LEFT, finishing

if TYPE_CHECKING:
    from sdrt.runtime.request.output import FinishedBatch, PipelineOutput


DEFAULT_ANIMATION: Final = ".webp"
BASE64: Final = "base64"  # for `--interactive`, as output: pictures come in the result, nothing is written
STDOUT: Final = Path("-")  # as output: the picture's bytes on standard output


def check_output(
    output: Path | None, *, animated: bool = False, to_stdout: bool = False, quality: int | None = None
) -> None:
    """Refuse a place that cannot be written.

    Args:
        output: A name that ends in .png, .jpg, .jpeg or .webp (of frames .png or .webp), or a folder; by
            default the current one.
        animated: Whether frames are to be written.
        to_stdout: Whether ``-`` may stand for standard output.
        quality: See `sdrt.runtime.pictures.writing.picture_bytes`.

    Raises:
        UsageError: Another kind of file, a quality out of its range or of a PNG, or standard output where it
            cannot be taken.
        OutputError: The folder does not exist, is none, or may not be written; or the file is read-only.
    """
    from sdrt.runtime.pictures.writing import FORMATS, checked_format
    from sdrt.runtime.system.files import place_of

    target = Path() if output is None else output
    checked_format(target.suffix if not animated and target.suffix.lower() in FORMATS else ".png", quality)
    if target == STDOUT:
        _check_stdout(allowed=to_stdout and not animated)
        return
    if "\0" in str(target):
        raise OutputError(f"cannot write {str(target)!r}: no file name has a NUL in it")
    suffixes = (DEFAULT_ANIMATION, ".png") if animated else tuple(FORMATS)
    named = target.suffix.lower() in suffixes
    folder = target.parent if named else target
    if target.suffix and not named and not is_folder(target):
        *most, last = suffixes
        raise UsageError(
            f"--output is {target}: a name that ends in {', '.join(most)} or {last}, or a folder"
        )
    if not is_folder(folder):
        exists = os.path.lexists(folder)
        reason = (
            f"{folder} is not a folder" if exists else f"the folder {folder} does not exist; make it first"
        )
        raise OutputError(f"cannot write {target}: {reason}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {target}: no permission to write in {folder}")
    if named:
        place_of(target)


def _check_stdout(*, allowed: bool) -> None:
    if not allowed:
        raise UsageError("--output is -: only one picture, no frames and no answers, goes to standard output")
    if sys.stdout is None or sys.stdout.isatty():
        raise UsageError("--output is -, and standard output is a terminal or closed: redirect it to a file")


class PictureFiles:
    """The files of a call's pictures, each with its recipe: its ``callback_on_batch_end``.

    What was finished is saved before the next batch is begun, each picture whole, whatever happens later.

    Attributes:
        seconds: What that has taken.
    """

    def __init__(
        self,
        target: Path | None,
        *,
        frames: bool = False,
        quality: int | None = None,
        total: int | None = None,
    ) -> None:
        """Nothing is written yet.

        Args:
            target: See `check_output`; where it gives no name, each picture's prompt and seed do, and it is a
                PNG.
            frames: Whether the pictures are frames of an animation, and ``target`` a folder for them.
            quality: See `sdrt.runtime.pictures.writing.picture_bytes`.
            total: How many pictures there are, where those of several calls share the target.
        """
        self._target, self._frames, self._quality = target, frames, quality
        self._saved: dict[int, Path] = {}
        self._first = 0  # number of the call's first picture
        self._given_total, self._total = total, 0
        self._stem = ""
        self.seconds = 0.0

    @property
    def paths(self) -> list[Path]:
        """One per picture that is saved, in their order."""
        return [self._saved[number] for number in sorted(self._saved)]

    def next_call(self) -> None:
        """Count on: the pictures that follow are another call's."""
        self._first = len(self._saved)

    def __call__(self, _pipeline: object, batch: FinishedBatch) -> None:
        """Write the pictures of a batch; an interrupt waits for it.

        Raises:
            OutputError: A file cannot be written; the message says how many are saved.
        """
        from sdrt.runtime.system.files import clear_leftovers, place_of, write_atomically

        started = time.perf_counter()
        if not self._total:
            with contextlib.suppress(OSError):
                clear_leftovers(self._folder())
            self._stem = _free_stem(self._folder()) if self._frames else ""
        with finishing():
            self._total = batch.total if self._given_total is None else self._given_total
            files = encoded(batch, self._suffix(), self._quality)
            for own, recipe, data in zip(batch.numbers, batch.recipes, files, strict=True):
                number = self._first + own
                path = self._path(number, recipe)
                try:
                    write_atomically(place_of(path), data)
                except OutputError as error:
                    raise OutputError(
                        f"{error}{'; ' if self._saved else ''}{self._saved_message()}"
                    ) from error
                self._saved[number] = path
        self.seconds += time.perf_counter() - started

    def last_words(self) -> str:
        """What is said of an interrupt: how many pictures are saved, and where."""
        return f"interrupted; {self._saved_message()}" if self._saved else NOTHING_LEFT

    def _saved_message(self) -> str:
        if not self._saved:
            return ""
        return saved_message(self.paths, self._total)

    def _folder(self) -> Path:
        target = Path() if self._target is None else self._target
        return target.parent if _is_name(target) else target

    def _suffix(self) -> str:
        return self._target.suffix if self._target is not None and _is_name(self._target) else ".png"

    def _path(self, number: int, recipe: Mapping[str, Any]) -> Path:
        """Several pictures for one name get ``-1``, ``-2`` … before the suffix."""
        from sdrt.runtime.pictures.writing import slug

        if self._frames:
            return self._folder() / f"{self._stem}-{number:0{max(4, len(str(self._total - 1)))}}.png"
        if self._target is None or not _is_name(self._target):
            name = f"{slug(recipe['prompt'])}-{recipe['seed']}.png"
            return _free_name(self._folder() / name, self._saved.values())
        if self._total == 1:
            return self._target
        return self._target.with_stem(f"{self._target.stem}-{number + 1}")


def saved_message(paths: Sequence[Path], total: int) -> str:
    """What is said of pictures that are saved where more were asked for."""
    where = f"{paths[0]}" if len(paths) == 1 else f"{paths[0]} to {paths[-1]}"
    # Escaped here: an interrupt's last words go to the terminal as they are.
    return f"of {total} pictures {len(paths)} were finished and saved, each whole: {printable(where)}"


def write_to_stdout(output: PipelineOutput) -> None:
    """Write the one picture of a call to standard output, as PNG.

    Raises:
        OutputError: It cannot be written there, or nobody reads it.
    """
    from sdrt.runtime.system.files import explain

    (picture,) = encoded(output)
    try:
        sys.stdout.flush()
        with open(sys.stdout.fileno(), "wb", closefd=False) as stream:
            stream.write(picture)
    except BrokenPipeError as error:
        raise OutputError("cannot write to standard output: its reader has gone away") from error
    except OSError as error:
        raise OutputError(f"cannot write to standard output: {explain(error)}") from error


def check_frames(target: Path | None, fps: float) -> None:
    """Refuse an animation that cannot be written there, before anything is drawn.

    Raises:
        UsageError: The file's kind, or ``fps``, is not allowed.
    """
    from sdrt.runtime.pictures.animation import check_animation

    named = not is_folder(target)
    check_animation(target.suffix.lower() if target is not None and named else DEFAULT_ANIMATION, fps)


def save_animation(output: PipelineOutput, target: Path | None, fps: float) -> Path:
    """Write the frames of an interpolation into one animated file, whole or not at all.

    Args:
        output: What `Pipeline.interpolate` gave, with Pillow images.
        target: Its name; by default an animated WebP named after prompt and seed.
        fps: Frames per second.

    Returns:
        The file.

    Raises:
        UsageError: ``fps`` is out of range.
        OutputError: It cannot be written.
    """
    import numpy as np

    from sdrt.runtime.pictures.animation import animation_bytes, animation_recipe
    from sdrt.runtime.pictures.writing import slug
    from sdrt.runtime.system.files import place_of, write_atomically

    recipe = animation_recipe(output.recipes[0], fps)
    if target is None:
        target = _free_name(Path(f"{slug(recipe['prompt'])}-{recipe['seed']}{DEFAULT_ANIMATION}"), ())
    frames = np.stack([np.asarray(image) for image in output.images])
    write_atomically(place_of(target), animation_bytes(frames, target.suffix.lower(), fps, recipe))
    return target


def encoded(
    output: PipelineOutput | FinishedBatch, suffix: str = ".png", quality: int | None = None
) -> list[bytes]:
    """Every picture of a call, or of a batch, with its recipe: see `picture_bytes` in `pictures.writing`."""
    from sdrt.runtime.pictures.writing import picture_bytes

    pictures = zip(output.images, output.recipes, strict=True)
    return [picture_bytes(image, suffix, recipe, quality=quality) for image, recipe in pictures]


def is_folder(path: Path | None) -> bool:
    """Whether a folder was named."""
    return path is not None and os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for too long a name


def _is_name(path: Path) -> bool:
    """Whether it is one picture's."""
    from sdrt.runtime.pictures.writing import FORMATS

    return path.suffix.lower() in FORMATS and not is_folder(path)


def _free_stem(folder: Path) -> str:
    """``frame``, or ``frame2``, ``frame3`` … where frames of another run are there."""
    stems = itertools.chain(["frame"], (f"frame{count}" for count in itertools.count(2)))
    return next(stem for stem in stems if not any(folder.glob(f"{stem}-*.png")))


def _free_name(path: Path, taken: Container[Path]) -> Path:
    """A name that we chose ourselves never replaces another picture: ``-2``, ``-3`` … is added."""
    candidates = (path.with_stem(f"{path.stem}-{count}") for count in itertools.count(2))
    names = itertools.chain([path], candidates)
    return next(name for name in names if name not in taken and not os.path.lexists(name))
