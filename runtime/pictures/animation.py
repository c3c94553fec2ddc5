"""Moving pictures without loss: animated PNG and WebP, with the recipe inside.

The two containers are written here around frames that Pillow encodes: its own writers join neighbouring
frames that are equal into one, and count the time in whole milliseconds.
"""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.checks import number
from sdrt.runtime.errors import UsageError
from sdrt.runtime.pictures.metadata import exif, xmp
from sdrt.runtime.pictures.writing import png_bytes

ANIMATION_SUFFIXES: Final = (".png", ".webp")
MIN_FPS: Final = 0.1
MAX_FPS: Final = 60.0  # browsers show what is faster at ten frames a second
_MAX_WEBP_SIDE: Final = 16_383

_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
# Flags of a VP8X chunk and of an ANMF chunk: WebP container specification, "Extended File Format".
_HAS_EXIF, _HAS_XMP, _IS_ANIMATED = 0x08, 0x04, 0x02
_NO_BLENDING: Final = 0x02


def check_animation(suffix: str, fps: object) -> None:
    """Refuse what `animation_bytes` cannot write, before anything is drawn.

    Raises:
        UsageError: Another suffix than those of `ANIMATION_SUFFIXES`, or ``fps`` out of its range.
    """
    if suffix.lower() == ".gif":
        raise UsageError(
            "a GIF has 256 colours, which spoils the frames: give a name that ends in .png or .webp"
        )
    if suffix.lower() not in ANIMATION_SUFFIXES:
        raise UsageError(f"an animation cannot be written as {suffix!r}: a name that ends in .png or .webp")
    if not MIN_FPS <= number("fps", fps) <= MAX_FPS:
        raise UsageError(f"fps is {fps!r}: frames per second from {MIN_FPS:g} to {MAX_FPS:g}")


def animation_recipe(recipe: Mapping[str, Any], fps: float) -> dict[str, Any]:
    """What draws an animation, from the recipe of any of its frames."""
    return {name: value for name, value in recipe.items() if name != "frame"} | {"fps": fps}


def animation_bytes(frames: NDArray[np.uint8], suffix: str, fps: float, recipe: Mapping[str, Any]) -> bytes:
    """Encode frames as an animation that runs for ever.

    Args:
        frames: uint8 [N, H, W, 3].
        suffix: ``.png`` (APNG; its text chunks are those of `png_bytes`) or ``.webp`` (lossless; the EXIF
            user comment has the text for A1111's web UI, the XMP property ``recipe`` the recipe as JSON).
        fps: Frames per second; a WebP has them rounded to milliseconds, without drift.
        recipe: What draws the frames, as plain data.

    Raises:
        UsageError: See `check_animation`; or a side too long for a WebP.
    """
    check_animation(suffix, fps)
    if suffix.lower() == ".png":
        return _apng(frames, fps, recipe)
    if max(frames.shape[1:3]) > _MAX_WEBP_SIDE:
        raise UsageError(f"a WebP has at most {_MAX_WEBP_SIDE} pixels a side: give a name that ends in .png")
    return _webp(frames, fps, recipe)


def _apng(frames: NDArray[np.uint8], fps: float, recipe: Mapping[str, Any]) -> bytes:
    """Each frame's own PNG, its data moved into the first one's (PNG specification, third edition)."""
    from PIL import Image

    numbers = itertools.count()  # of fcTL and fdAT chunks together
    delay = Fraction(1 / fps).limit_denominator(1000)
    rows, columns = frames.shape[1:3]

    def control() -> bytes:
        where = struct.pack(">5I", next(numbers), columns, rows, 0, 0)
        return _png_chunk(b"fcTL", where + struct.pack(">HHBB", delay.numerator, delay.denominator, 0, 0))

    out = [_PNG_SIGNATURE]
    first = list(_png_chunks(png_bytes(Image.fromarray(frames[0]), recipe)))
    out += [_png_chunk(*chunk) for chunk in first if chunk[0] not in (b"IDAT", b"IEND")]
    out += [_png_chunk(b"acTL", struct.pack(">II", len(frames), 0)), control()]
    out += [_png_chunk(*chunk) for chunk in first if chunk[0] == b"IDAT"]
    for frame in frames[1:]:
        out.append(control())
        for kind, data in _png_chunks(_encoded(frame, "PNG")):
            if kind == b"IDAT":
                out.append(_png_chunk(b"fdAT", struct.pack(">I", next(numbers)) + data))
    return b"".join([*out, _png_chunk(b"IEND", b"")])


def _png_chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and data of each chunk."""
    at = len(_PNG_SIGNATURE)
    while at < len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        yield kind, png[at + 8 : at + 8 + length]
        at += length + 12


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _webp(frames: NDArray[np.uint8], fps: float, recipe: Mapping[str, Any]) -> bytes:
    """Each frame's own lossless WebP, in one container (its specification: RFC 9649)."""
    rows, columns = frames.shape[1:3]
    size = _three_bytes(columns - 1) + _three_bytes(rows - 1)
    flags = struct.pack("<I", _IS_ANIMATED | _HAS_EXIF | _HAS_XMP)
    background, for_ever = b"\xff\xff\xff\xff", struct.pack("<H", 0)
    chunks = [_riff_chunk(b"VP8X", flags + size), _riff_chunk(b"ANIM", background + for_ever)]
    for index, frame in enumerate(frames):
        milliseconds = round((index + 1) * 1000 / fps) - round(index * 1000 / fps)
        head = bytes(6) + size + _three_bytes(milliseconds) + bytes([_NO_BLENDING])
        chunks.append(_riff_chunk(b"ANMF", head + _vp8l_chunk(_encoded(frame, "WEBP", lossless=True))))
    chunks += [_riff_chunk(b"EXIF", exif(recipe)), _riff_chunk(b"XMP ", xmp(recipe))]
    return _riff_chunk(b"RIFF", b"WEBP" + b"".join(chunks))


def _vp8l_chunk(webp: bytes) -> bytes:
    """The picture itself, of a file that holds nothing else."""
    at = 12
    while webp[at : at + 4] != b"VP8L":
        at += 8 + _even(struct.unpack_from("<I", webp, at + 4)[0])
    return webp[at : at + 8 + _even(struct.unpack_from("<I", webp, at + 4)[0])]


def _riff_chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def _even(length: int) -> int:
    return length + length % 2


def _three_bytes(number: int) -> bytes:
    return number.to_bytes(3, "little")


def _encoded(frame: NDArray[np.uint8], kind: str, **options: Any) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, format=kind, **options)
    return stream.getvalue()
