"""The preview: colours of latents, and what a terminal is sent."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from rich.live import Live
from rich.progress import Progress
from rich.text import Text

from sdrt.runtime.bundle.manifest import Preview
from sdrt.runtime.pictures.preview import HALF_BLOCK, TerminalPreview, rgb_from_latents
from tolerances import PREVIEW_LEVEL

Colour = tuple[int, ...]
CELLS = re.compile(rf"\x1b\[([\d;]+)m({HALF_BLOCK}+)")


def console(width: int = 80, height: int = 24, **options: Any) -> Console:
    settings: dict[str, Any] = {
        "force_terminal": True,
        "color_system": "truecolor",
        "_environ": {},
        **options,
    }
    return Console(file=io.StringIO(), width=width, height=height, legacy_windows=False, **settings)


def picture(height: int, width: int, count: int = 1) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def printed(preview: TerminalPreview, terminal: Console) -> list[str]:
    """The lines that the terminal is sent."""
    terminal.print(preview, end="")
    assert isinstance(terminal.file, io.StringIO)
    return terminal.file.getvalue().splitlines()


def cells(line: str) -> list[tuple[Colour, Colour]]:
    """Upper and lower colour of each cell of a line of blocks in 24-bit colours; gaps are left out."""
    found: list[tuple[Colour, Colour]] = []
    for codes, blocks in CELLS.findall(line):
        numbers = [int(code) for code in codes.split(";")]
        assert numbers[:2] == [38, 2]
        assert numbers[5:7] in ([], [48, 2])
        found += [(tuple(numbers[2:5]), tuple(numbers[7:]))] * len(blocks)
    return found


def shown(lines: list[str]) -> NDArray[np.uint8]:
    """The pixels that lines of blocks show: [2 lines, columns, 3]."""
    pairs = [cells(line) for line in lines]
    return np.array([[cell[half] for cell in line] for line in pairs for half in (0, 1)], np.uint8)


def of(pictures: NDArray[np.uint8], below: str = "bar") -> TerminalPreview:
    preview = TerminalPreview(Text(below))
    preview.update(pictures)
    return preview


# --- colours ----------------------------------------------------------------------------------------------


def test_rgb_from_latents_is_the_affine_map() -> None:
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 4, 5, 6), np.float32)
    weights = rng.standard_normal((4, 3)) * 0.3
    preview = Preview(tuple(map(tuple, weights.tolist())), (0.1, -0.2, 0.3))
    rgb = np.moveaxis(latents.astype(np.float64), 1, -1) @ weights + (0.1, -0.2, 0.3)
    want = (np.clip(rgb, -1, 1) + 1) * 127.5
    result = rgb_from_latents(latents, preview)
    assert result.dtype == np.uint8
    assert result.shape == (2, 5, 6, 3)
    near_tie = np.abs(want % 1 - 0.5) < PREVIEW_LEVEL  # where float32 may round the other way
    assert near_tie.mean() < 0.01
    assert np.array_equal(result[~near_tie], np.rint(want)[~near_tie])
    assert len(np.unique(result)) > 50


def test_ends_and_what_is_no_number() -> None:
    latents = np.array([-1, 1, -1e30, 1e30, np.nan, np.inf, -np.inf], np.float32).reshape(1, 1, 1, 7)
    result = rgb_from_latents(latents, Preview(((1.0, 0.0, 1.0),), (0.0, -1.0, 0.0)))
    assert result[0, 0, :, 0].tolist() == [0, 255, 0, 255, 0, 255, 0]
    assert result[0, 0, :4, 1].tolist() == [0, 0, 0, 0]


# --- which terminal ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "can"),
    [
        ({}, True),
        ({"color_system": "256"}, True),
        ({"color_system": "standard"}, False),
        ({"color_system": None}, False),
        ({"no_color": True}, False),
        ({"force_terminal": False}, False),
        ({"_environ": {"TERM": "dumb"}}, False),
    ],
)
def test_can_show(options: dict[str, Any], can: bool) -> None:
    assert TerminalPreview.can_show(console(**options)) is can


def test_rich_finds_out_what_the_terminal_has() -> None:
    for environment, can in (
        ({"TERM": "xterm-256color"}, True),
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, True),
        ({"TERM": "xterm"}, False),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, False),
    ):
        assert TerminalPreview.can_show(console(color_system="auto", _environ=environment)) is can, (
            environment
        )


def test_terminal_that_does_not_know_the_character() -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    terminal = Console(file=ascii_only, force_terminal=True, color_system="truecolor", legacy_windows=False)
    assert not TerminalPreview.can_show(terminal)


# --- what it is sent --------------------------------------------------------------------------------------


def test_pixels_have_their_colours() -> None:
    pixels = picture(32, 32)
    lines = printed(of(pixels), console())
    assert len(lines) == 17
    assert lines[-1] == "bar"
    assert np.array_equal(shown(lines[:16]), pixels[0])


def test_256_colours() -> None:
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    pixels[:, ::2] = (255, 0, 0)
    pixels[:, 1::2] = (0, 0, 255)
    line = printed(of(pixels), console(color_system="256"))[0]
    assert set(re.findall(r"\x1b\[([\d;]+)m▀", line)) == {"38;5;196;48;5;21"}


def test_odd_height_ends_with_upper_halves() -> None:
    pixels = picture(33, 40)
    lines = printed(of(pixels), console())
    assert len(lines) == 17 + 1
    last = cells(lines[16])
    assert [upper for upper, _ in last] == [tuple(pixel) for pixel in pixels[0, 32].tolist()]
    assert {lower for _, lower in last} == {()}


def test_small_picture_is_enlarged_by_a_whole_factor() -> None:
    pixels = picture(16, 12)
    large = shown(printed(of(pixels), console())[:16])
    assert np.array_equal(large, pixels[0].repeat(2, axis=0).repeat(2, axis=1))


def test_large_picture_is_made_to_fit() -> None:
    for width, height in ((40, 24), (200, 10)):
        lines = printed(of(picture(64, 96)), console(width, height))
        assert len(lines) <= height - 1
        pixels = shown(lines[:-1])
        assert pixels.shape[1] <= width
        assert abs(pixels.shape[1] / pixels.shape[0] - 96 / 64) < 0.1


def test_smaller_pixels_are_means() -> None:
    pixels = np.zeros((1, 64, 64, 3), np.uint8)
    pixels[:, ::2] = 200
    assert (shown(printed(of(pixels), console(32, 40))[:-1]) == 100).all()


@pytest.mark.parametrize(("width", "count"), [(32, 1), (65, 1), (66, 2), (200, 4)])
def test_as_many_as_fit_side_by_side(width: int, count: int) -> None:
    pixels = picture(32, 32, 4)
    lines = printed(of(pixels), console(width))
    line = shown(lines[:16])
    assert line.shape[1] == 32 * count
    assert np.array_equal(line, np.concatenate(list(pixels[:count]), axis=1))
    assert lines[0].count("  ") == count - 1


def test_terminal_without_room_shows_the_bar_alone() -> None:
    assert printed(of(picture(32, 32)), console(80, 2)) == ["bar"]


def test_no_picture_yet() -> None:
    assert printed(TerminalPreview(Text("bar")), console()) == ["bar"]


def test_terminal_that_changes_its_size() -> None:
    preview = of(picture(64, 64))
    assert shown(printed(preview, console(80, 40))[:-1]).shape == (64, 64, 3)
    assert shown(printed(preview, console(20, 40))[:-1]).shape == (20, 20, 3)


def test_live_above_a_progress_bar() -> None:
    terminal = console(60, 24)
    bar = Progress(console=terminal)
    task = bar.add_task("drawing", total=4)
    preview = TerminalPreview(bar)
    with Live(preview, console=terminal, transient=True, auto_refresh=False) as live:
        for step in range(2):
            preview.update(np.full((1, 32, 32, 3), 50 + step, np.uint8))
            bar.advance(task)
            live.refresh()
    assert isinstance(terminal.file, io.StringIO)
    text = terminal.file.getvalue()
    assert "50%" in text
    assert text.count(HALF_BLOCK) == 2 * 32 * 16 + 32 * 16  # two updates, and rich's last refresh
    assert "38;2;50;50;50;48;2;50;50;50" in text
    assert "38;2;51;51;51;48;2;51;51;51" in text
    assert "\x1b[1A" in text  # in place: the cursor goes back up
