"""Where the command's pictures go: checked before anything is drawn, written whole or not at all."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sdrt.runtime.errors import OutputError, UsageError

if TYPE_CHECKING:
    from sdrt.runtime.output import PipelineOutput


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
        quality: See `sdrt.runtime.images.picture_bytes`.

    Raises:
        UsageError: Another kind of file, a quality out of its range or of a PNG, or standard output where it
            cannot be taken.
        OutputError: The folder does not exist, is none, or may not be written; or the file is read-only.
    """
    from sdrt.runtime.files import place_of
    from sdrt.runtime.images import FORMATS, checked_format

    target = Path() if output is None else output
    checked_format(".png", quality)
    if target == STDOUT:
        _check_stdout(allowed=to_stdout and not animated)
        return
    if "\0" in str(target):
        raise OutputError(f"cannot write {str(target)!r}: no file name has a NUL in it")
    suffixes = (DEFAULT_ANIMATION, ".png") if animated else tuple(FORMATS)
    named = target.suffix.lower() in suffixes
    folder = target.parent if named else target
    if target.suffix and not named and not _is_folder(target):
        *most, last = suffixes
        raise UsageError(
            f"--output is {target}: a name that ends in {', '.join(most)} or {last}, or a folder"
        )
    if not _is_folder(folder):
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


def save(
    output: PipelineOutput,
    target: Path | None,
    quality: int | None = None,
    *,
    first: int = 0,
    total: int | None = None,
) -> list[Path]:
    """Write every picture of a call with its recipe, all or none.

    Args:
        output: Of a pipeline, with Pillow images.
        target: See `check_output`; where it gives no name, each picture's prompt and seed do, and it is a
            PNG.
        quality: See `sdrt.runtime.images.picture_bytes`.
        first: How many pictures of other calls come before these under the same name.
        total: How many pictures share the name; by default those of this call.

    Returns:
        One path per picture.

    Raises:
        OutputError: A file cannot be written.
    """
    from sdrt.runtime.files import place_of, write_all_atomically

    paths = _paths(target, output.recipes, first, len(output.recipes) if total is None else total)
    places = map(place_of, paths)
    files = encoded(output, paths[0].suffix, quality)
    write_all_atomically(dict(zip(places, files, strict=True)))
    return paths


def write_to_stdout(output: PipelineOutput) -> None:
    """Write the one picture of a call to standard output, as PNG.

    Raises:
        OutputError: It cannot be written there, or nobody reads it.
    """
    from sdrt.runtime.files import explain

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
    from sdrt.runtime.animation import check_animation

    named = target is not None and not _is_folder(target)
    check_animation(target.suffix.lower() if target is not None and named else DEFAULT_ANIMATION, fps)


def save_frames(output: PipelineOutput, target: Path | None, fps: float) -> list[Path]:
    """Write the frames of an interpolation, all or none.

    Args:
        output: Of `Pipeline.interpolate`, with Pillow images.
        target: An animated file, or a folder for one numbered PNG per frame; by default an animated WebP
            named after prompt and seed.
        fps: Frames per second of an animated file.

    Returns:
        The animated file, or one path per frame.

    Raises:
        UsageError: ``fps`` is out of range.
        OutputError: A file cannot be written.
    """
    import numpy as np

    from sdrt.runtime.animation import animation_bytes
    from sdrt.runtime.files import place_of, write_all_atomically
    from sdrt.runtime.images import slug

    if target is not None and _is_folder(target):
        digits = max(4, len(str(len(output.recipes) - 1)))
        stem = _free_stem(target)
        paths = [target / f"{stem}-{number:0{digits}}.png" for number in range(len(output.recipes))]
        write_all_atomically(dict(zip(paths, encoded(output), strict=True)))
        return paths
    recipe = {name: value for name, value in output.recipes[0].items() if name != "frame"} | {"fps": fps}
    if target is None:
        target = _free_name(Path(f"{slug(recipe['prompt'])}-{recipe['seed']}{DEFAULT_ANIMATION}"), ())
    frames = np.stack([np.asarray(image) for image in output.images])
    write_all_atomically({place_of(target): animation_bytes(frames, target.suffix.lower(), fps, recipe)})
    return [target]


def encoded(output: PipelineOutput, suffix: str = ".png", quality: int | None = None) -> list[bytes]:
    """Every picture of a call with its recipe; see `sdrt.runtime.images.picture_bytes`."""
    from sdrt.runtime.images import picture_bytes

    pictures = zip(output.images, output.recipes, strict=True)
    return [picture_bytes(image, suffix, recipe, quality=quality) for image, recipe in pictures]


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for a name that is too long


def _paths(target: Path | None, recipes: Sequence[Mapping[str, Any]], first: int, total: int) -> list[Path]:
    """One file per picture; several pictures for one name get ``-1``, ``-2`` … before the suffix."""
    from sdrt.runtime.images import FORMATS, slug

    if target is None or target.suffix.lower() not in FORMATS or _is_folder(target):
        folder = Path() if target is None else target
        paths: dict[Path, None] = {}
        for recipe in recipes:
            paths[_free_name(folder / f"{slug(recipe['prompt'])}-{recipe['seed']}.png", paths)] = None
        return list(paths)
    if total == 1:
        return [target]
    numbers = range(first + 1, first + len(recipes) + 1)
    return [target.with_stem(f"{target.stem}-{number}") for number in numbers]


def _free_stem(folder: Path) -> str:
    """``frame``, or ``frame2``, ``frame3`` … where frames of another run are there."""
    stems = itertools.chain(["frame"], (f"frame{count}" for count in itertools.count(2)))
    return next(stem for stem in stems if not any(folder.glob(f"{stem}-*.png")))


def _free_name(path: Path, taken: Container[Path]) -> Path:
    """A name that we chose ourselves never replaces another picture: ``-2``, ``-3`` … is added."""
    candidates = (path.with_stem(f"{path.stem}-{count}") for count in itertools.count(2))
    names = itertools.chain([path], candidates)
    return next(name for name in names if name not in taken and not os.path.lexists(name))
