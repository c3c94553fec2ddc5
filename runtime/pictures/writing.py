"""Pictures on disk: PNG, JPEG and WebP with the whole recipe inside."""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sdrt.runtime.checks import is_number
from sdrt.runtime.errors import UsageError
from sdrt.runtime.pictures.metadata import exif, png_text, xmp
from sdrt.runtime.system.files import place_of, write_atomically
from sdrt.runtime.text.syntax import EXTRA_NETWORK

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS: Final = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
DEFAULT_QUALITY: Final = 95  # of a JPEG: above it files grow and nothing is seen
_MAX_SIDE: Final = {"WEBP": 16_383, "JPEG": 65_535}
_MAX_SEGMENT: Final = 65_500  # bytes of a JPEG's EXIF or XMP, whose length is a word of 16 bits


class RecipeLeftOutWarning(UserWarning):
    """A picture was written without its recipe, which is too long for the file's format."""


def picture_bytes(
    image: Image, suffix: str, recipe: Mapping[str, Any], *, quality: int | None = None
) -> bytes:
    """Encode a picture with its recipe inside (`sdrt.runtime.pictures.metadata` says where).

    Args:
        image: RGB.
        suffix: A key of `FORMATS`, in any case.
        recipe: What drew it, as plain data.
        quality: 1 to 100, of what loses something: a JPEG, by default 95, or a WebP, which by default loses
            nothing. A PNG has none.

    Raises:
        UsageError: Another suffix or quality, or a side too long for the format.
    """
    kind = checked_format(suffix, quality)
    if max(image.size) > _MAX_SIDE.get(kind, max(image.size)):
        raise UsageError(
            f"a {kind} has at most {_MAX_SIDE[kind]} pixels a side: give a name that ends in .png"
        )
    options: dict[str, Any] = {"pnginfo": png_text(recipe)}
    if kind != "PNG":
        options = {"exif": exif(recipe), "xmp": xmp(recipe)}
    if kind == "JPEG":
        options |= {"exif": b"Exif\0\0" + options["exif"]}
        if max(map(len, options.values())) > _MAX_SEGMENT:
            warnings.warn(
                "the recipe is too long for a JPEG and was left out: a PNG or WebP holds it",
                RecipeLeftOutWarning,
                stacklevel=2,
            )
            options = {}
        # Chroma at full size: halved, thin red on blue is smeared whatever the quality.
        options |= {"quality": DEFAULT_QUALITY if quality is None else quality, "subsampling": 0}
    if kind == "WEBP":
        options |= {"lossless": True} if quality is None else {"quality": quality}
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def checked_format(suffix: str, quality: int | None = None) -> str:
    """Pillow's name of the format that a file's ending stands for.

    Raises:
        UsageError: There is none, or ``quality`` is out of its range or of a PNG, which has none.
    """
    if suffix.lower() not in FORMATS:
        raise UsageError(f"a picture cannot be written as {suffix!r}: one of {', '.join(FORMATS)}")
    if quality is not None and not (is_number(quality) and quality in range(1, 101)):
        raise UsageError(f"quality is {quality!r}: a whole number from 1 to 100")
    if quality is not None and suffix.lower() == ".png":
        raise UsageError(f"quality is {quality}: a .png has none; it is of a .jpg or .webp that is named")
    return FORMATS[suffix.lower()]


def png_bytes(image: Image, recipe: Mapping[str, Any]) -> bytes:
    """Encode a picture as PNG with its recipe in two text chunks."""
    return picture_bytes(image, ".png", recipe)


def save_image(
    image: Image, path: str | Path, recipe: Mapping[str, Any], *, quality: int | None = None
) -> None:
    """Write a picture and its recipe as what the file's name ends in; whole or not at all.

    Args:
        image: RGB.
        path: Ends in .png, .jpg, .jpeg or .webp. A symbolic link is followed.
        recipe: Of `sdrt.runtime.request.output.PipelineOutput.recipes`.
        quality: See `picture_bytes`.

    Raises:
        UsageError: Another ending or quality.
        OutputError: The file cannot be written, or is read-only.
    """
    place = place_of(Path(path))
    write_atomically(place, picture_bytes(image, Path(path).suffix, recipe, quality=quality))


def save_png(image: Image, path: str | Path, recipe: Mapping[str, Any]) -> None:
    """Write a picture and its recipe as PNG; see `save_image`.

    Raises:
        UsageError: The name ends in something else than .png.
        OutputError: The file cannot be written, or is read-only.
    """
    if Path(path).suffix.lower() != ".png":
        raise UsageError(f"save_png writes PNG, and {path} does not end in .png: save_image writes others")
    save_image(image, path, recipe)


def slug(prompt: str, limit: int = 40) -> str:
    """A file name from a prompt: its letters and digits of any script, joined by dashes, without LoRAs.

    At most ``limit`` characters; a file name may have 255 bytes, and a character takes up to four.
    """
    text = EXTRA_NETWORK.sub(" ", prompt)
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", text).lower())
    return words.strip("-")[:limit].strip("-") or "picture"
