"""A look at the picture while it is drawn: from latents to a few coloured blocks in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.bundle.manifest import Preview

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

HALF_BLOCK: Final = "▀"  # two pixels in a cell: the upper in the colour of the text, the lower of its ground
_COLUMNS: Final = 32  # smaller pictures are enlarged up to this width
_GAP: Final = 2  # columns between two pictures


def rgb_from_latents(latents: NDArray[np.float32], preview: Preview) -> NDArray[np.uint8]:
    """Small pictures by the bundle's affine map, without the decoder.

    Args:
        latents: float32 [N, C, h, w], best the guess at the end of the run (x0); NaN gives black.
        preview: The map, of the bundle's manifest.

    Returns:
        uint8 [N, h, w, 3].
    """
    weights = np.asarray(preview.weights, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        rgb = np.einsum("nchw,ck->nhwk", latents, weights) + np.asarray(preview.bias, np.float32)
    shares = np.nan_to_num(rgb, nan=-1.0, posinf=1.0, neginf=-1.0)
    pixels: NDArray[np.uint8] = np.rint((np.clip(shares, -1, 1) + 1) * 127.5).astype(np.uint8)
    return pixels


class TerminalPreview:
    """Pictures side by side above something else, such as a progress bar, for a ``rich.live.Live``.

    Each cell shows two pixels. Pictures are made smaller until one fits, very small ones are enlarged by a
    whole factor, and of several as many are shown as fit side by side::

        bar = Progress(...)
        preview = TerminalPreview(bar)
        with Live(preview, console=console, transient=True):
            ...
            preview.update(rgb_from_latents(latents, manifest.preview))
            bar.advance(task)
    """

    def __init__(self, below: RenderableType) -> None:
        """``below`` is what is shown under the pictures, and alone before there are any."""
        self._below = below
        self._pictures: NDArray[np.uint8] | None = None
        # Of which pictures and for what room, and the lines: the terminal is refreshed more often than they
        # change, and by another thread.
        self._drawn: tuple[NDArray[np.uint8], tuple[int, int], list[list[Segment]]] | None = None

    @staticmethod
    def can_show(console: Console) -> bool:
        """Whether that is a terminal with 256 colours or more that knows the character."""
        if not console.is_terminal or console.is_dumb_terminal or console.no_color or console.legacy_windows:
            return False
        return console.color_system in ("256", "truecolor") and not console.options.ascii_only

    def update(self, pictures: NDArray[np.uint8]) -> None:
        """Show other pictures, uint8 [N, h, w, 3], the next time that the terminal is refreshed."""
        self._pictures = pictures

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        """The pictures' lines, then what is below; never more lines than the terminal has."""
        from rich.segment import Segment

        below = console.render_lines(self._below, options, pad=False)
        pictures = self._pictures
        if pictures is not None:
            # A last line stays free for the cursor.
            room = (options.max_width, max(console.height - len(below) - 1, 0))
            drawn = self._drawn
            if drawn is None or drawn[0] is not pictures or drawn[1] != room:
                drawn = self._drawn = pictures, room, _lines(_side_by_side(pictures, *room))
            below = drawn[2] + below
        for line in below:
            yield from line
            yield Segment.line()


def _side_by_side(pictures: NDArray[np.uint8], columns: int, lines: int) -> list[NDArray[np.uint8]]:
    """As many pictures as fit into the room, each uint8 [h', w', 3] at the size for it."""
    height, width = _shown_size(pictures.shape[1], pictures.shape[2], columns, lines)
    if not height:
        return []
    count = (columns + _GAP) // (width + _GAP)
    return [_scaled(picture, height, width) for picture in pictures[:count]]


def _shown_size(height: int, width: int, columns: int, lines: int) -> tuple[int, int]:
    """Height and width in pixels, a cell wide and half of one high; zeros where there is no room."""
    largest = min(columns / width, 2 * lines / height)
    if largest <= 0:
        return 0, 0
    scale = max(min(int(largest), _COLUMNS // width), 1) if largest >= 1 else largest
    return max(int(height * scale), 1), max(int(width * scale), 1)


def _scaled(picture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Larger by repeating pixels, smaller by their mean."""
    from PIL import Image

    larger = height >= picture.shape[0]
    kind = Image.Resampling.NEAREST if larger else Image.Resampling.BOX
    return np.asarray(Image.fromarray(picture).resize((width, height), kind))


def _lines(pictures: list[NDArray[np.uint8]]) -> list[list[Segment]]:
    """The cells of pictures of one size, line by line."""
    from rich.segment import Segment

    if not pictures:
        return []
    lines = []
    for row in range(0, pictures[0].shape[0], 2):
        line: list[Segment] = []
        for index, picture in enumerate(pictures):
            if index:
                line.append(Segment(" " * _GAP))
            line += _cells(picture[row : row + 2])
        lines.append(line)
    return lines


def _cells(rows: NDArray[np.uint8]) -> list[Segment]:
    """A line of cells of two rows of pixels, or of one, the last of an odd number."""
    from rich.color import Color
    from rich.segment import Segment
    from rich.style import Style

    colours = [[Color.from_rgb(*pixel) for pixel in row] for row in rows.tolist()]
    if len(colours) == 1:
        return [Segment(HALF_BLOCK, Style(color=upper)) for upper in colours[0]]
    pairs = zip(*colours, strict=True)
    return [Segment(HALF_BLOCK, Style(color=upper, bgcolor=lower)) for upper, lower in pairs]
