"""A sheet of small pictures with their captions below."""

from __future__ import annotations

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TILE, GAP, TEXT_HEIGHT = 96, 12, 26
LETTERS_PER_LINE = 20


def contact_sheet(pictures: Tensor, captions: list[str], columns: int) -> Image.Image:
    """Lay out pictures [N, 3, H, W] in 0…1 row by row."""
    rows = -(-len(captions) // columns)
    width, height = TILE + GAP, TILE + TEXT_HEIGHT + GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for place, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = GAP + place % columns * width, GAP + place // columns * height
        sheet.paste(to_image(picture).resize((TILE, TILE), Image.Resampling.LANCZOS), (left, top))
        lines = textwrap.wrap(caption, LETTERS_PER_LINE)[:2]
        middle = left + TILE // 2
        pen.multiline_text((middle, top + TILE + 2), "\n".join(lines), "black", font, "ma", 1, "center")
    return sheet


def to_image(picture: Tensor) -> Image.Image:
    """[3, H, W] in 0…1 → 8-bit picture."""
    pixels = (picture.clamp(0, 1) * 255.0).round().byte().permute(1, 2, 0)
    return Image.fromarray(np.asarray(pixels))
