"""Pictures from outside: whatever a camera or an editor writes, as RGB or as a mask.

What is read is given by others, so nothing of it is trusted: the size is checked in the header before a pixel
is decoded, only formats that need no other program are opened, and every failure is a `UsageError`.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.errors import UsageError
from sdrt.runtime.system.untrusted import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS: Final = 2**26  # 64 Mi pixels, 192 MiB as RGB: more than any bundle draws
# Not among them: EPS, which runs Ghostscript; ICO, which Pillow decodes before it tells a size; and formats
# that hold no picture.
FORMATS: Final = (
    "PNG",
    "JPEG",
    "WEBP",
    "AVIF",
    "GIF",
    "TIFF",
    "BMP",
    "DIB",
    "JPEG2000",
    "PPM",
    "TGA",
    "QOI",
)
_READ: Final = "PNG, JPEG, WebP, AVIF, GIF, TIFF, BMP, JPEG 2000, PPM, TGA and QOI are read"
_ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|https?:/")  # a Path has one slash
_ORIENTATION: Final = 0x0112  # EXIF's tag
_PROFILE_ROUNDING: Final = 1  # of 255: a profile that moves no colour of a grid further is sRGB's own


def read_image(source: Any, what: str = "image") -> NDArray[np.uint8]:
    """A picture as RGB, upright, in sRGB.

    Transparent parts are laid on white. The EXIF orientation is applied. Colours are converted to sRGB where
    the picture has an ICC profile that can be read; another profile is ignored. 16 bits are scaled to 8; of
    an animation the first frame is taken.

    Args:
        source: A path, the bytes of a file, a Pillow image (its current frame), or a NumPy array: uint8, or
            float from 0 to 1, of shape [H, W], [H, W, 1], [H, W, 3] or (with alpha) [H, W, 4].
        what: The argument's name, for messages.

    Returns:
        uint8 [H, W, 3], a copy.

    Raises:
        UsageError: There is no such file, it is no picture, is damaged, is empty or has more than
            `MAX_PIXELS` pixels; float values outside 0 … 1; a web address.
    """
    colours, alpha = _decoded(source, what, managed=True)
    if alpha is not None:
        from PIL import Image

        colours = Image.composite(colours, Image.new("RGB", colours.size, "white"), alpha)
    return np.array(colours)


@contextmanager
def opened_picture(path: str | Path, what: str, formats: Sequence[str]) -> Iterator[Image]:
    """A picture's file with its header and metadata read, no pixel decoded.

    Raises:
        UsageError: There is no such file, or it is no picture of one of Pillow's ``formats``.
    """
    from PIL import Image

    name = os.fsdecode(path)
    label = f"{what} {name[:300]}"
    with (
        _decoding(label),
        _regular_file(name, label) as stream,
        Image.open(stream, formats=list(formats)) as image,
    ):
        yield image


def read_mask(source: Any, what: str = "mask_image", *, may_be_black: bool = False) -> NDArray[np.float32]:
    """A mask: 1 (white) is drawn, 0 (black) is kept, and between them it is blended.

    The grey of the picture (its luma, ITU-R BT.601). Transparency says more than colours do. A shape of one
    colour on nothing is drawn, whatever its colour is: a black one is as good as a white one. In a picture of
    several colours, and in a dark sheet of one that reaches all edges, the hole is what is drawn, as such
    masks are meant where they are made of the picture itself. Where either could be meant it is refused.

    Args:
        source: As for `read_image`; a float array [H, W] is taken as it is, and bool is allowed too.
        what: The argument's name, for messages.
        may_be_black: Whether it may draw nothing, since something else is drawn.

    Returns:
        float32 [H, W] in [0, 1].

    Raises:
        UsageError: As for `read_image`; or the mask is black all over, so that nothing would be drawn; or it
            has no level above 1 of 255, as an array of 0 and 1 that is uint8; or it has several greys and
            transparency, or both a dark shape and transparency at its edges, and either could be meant.
    """
    if isinstance(source, np.ndarray) and source.dtype == np.bool:
        source = source.astype(np.float32)
    if isinstance(source, np.ndarray) and source.ndim == 2 and source.dtype.kind == "f":
        _check_array(source, what)
        mask = source.astype(np.float32)
    else:
        mask = _shares(*_decoded(source, what, managed=False), what)
        if 0 < mask.max() <= np.float32(1 / 255):
            raise UsageError(
                f"{what} has no level above 1 of 255: white is 255; give 0 and 1 as bool or float"
            )
    if not mask.any() and not may_be_black:
        raise UsageError(f"{what} is black all over: nothing would be drawn; white is what is drawn anew")
    return mask


def read_levels(source: Any, what: str) -> NDArray[np.float32]:
    """The levels of a grey picture, or the greys of a coloured one, as they stand: of 16 bits or floats, too.

    Args:
        source: As for `read_image`; an array [H, W] may hold any real numbers.
        what: The argument's name, for messages.

    Returns:
        float32 [H, W].

    Raises:
        UsageError: As for `read_image`; or an array with NaN or infinity.
    """
    if isinstance(source, np.ndarray) and source.ndim == 2 and source.dtype.kind in "uif":
        _check_size(source.shape[1], source.shape[0], what)
        levels = source.astype(np.float32)
    else:
        with _opened(source, what) as (image, label):
            _check_size(*image.size, label)
            if image.mode != "F" and not image.mode.startswith("I"):
                image = _upright(image, label, managed=False)[0].convert("L")
            levels = np.asarray(image, np.float32)
    if not np.isfinite(levels).all():
        raise UsageError(f"{what} holds NaN or infinity")
    return levels


def _shares(colours: Image, alpha: Image | None, what: str) -> NDArray[np.float32]:
    """What a mask's picture says of each pixel, from 0 to 1."""
    opacity = None if alpha is None else np.asarray(alpha)
    greys = np.asarray(colours.convert("L"), np.float32) / np.float32(255)
    if opacity is None or opacity.min() == 255:
        return greys
    seen = np.asarray(colours)[opacity > 0]
    shape = opacity.astype(np.float32) / np.float32(255)
    if (seen == seen[:1]).all():
        edges = np.concatenate([opacity[0], opacity[-1], opacity[:, 0], opacity[:, -1]])
        dark = greys[opacity > 0].max(initial=0) < 0.5
        if dark and edges.max() > 0 and edges.min() < 255:
            raise UsageError(
                f"{what} is dark and transparent, both up to its edges: either could say what is drawn; save "
                "it without transparency (white is drawn), or make what is to be drawn white on nothing"
            )
        return 1 - shape if dark and edges.min() == 255 else shape
    if (seen == seen[:, :1]).all():
        raise UsageError(
            f"{what} has several greys and is transparent in places: either could say what is drawn; save it "
            "without transparency (white is drawn), or with one colour and transparency (the shape is drawn)"
        )
    return 1 - shape


def _decoded(source: Any, what: str, *, managed: bool) -> tuple[Image, Image | None]:
    """RGB, and the alpha where there is one (L), both upright.

    With ``managed`` the ICC profile is applied: to colours, not to the shares of a mask.
    """
    if isinstance(source, np.ndarray):
        return _separated(_from_array(source, what), b"")
    with _opened(source, what) as (image, label):
        return _upright(image, label, managed=managed)


@contextmanager
def _opened(source: Any, what: str) -> Iterator[tuple[Image, str]]:
    """A picture that is no plain array with its header read, and what messages call it."""
    from PIL import Image

    name = os.fsdecode(source) if isinstance(source, str | os.PathLike) else None
    label = what if name is None else f"{what} {name[:300]}"
    with _decoding(label):
        if isinstance(source, np.ndarray):
            source = _from_array(source, what)
        if isinstance(source, Image.Image):
            yield source, label
            return
        if name is not None:
            stream = _regular_file(name, label)
        elif isinstance(source, bytes | bytearray | memoryview):
            stream = io.BytesIO(source)
        else:
            raise UsageError(
                f"{what} is {type(source).__name__}: a path, bytes, a Pillow image or a NumPy array is wanted"
            )
        Image.init()  # some formats are not there in every build of Pillow
        with stream, Image.open(stream, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            yield image, label


def _regular_file(name: str, label: str) -> IO[bytes]:
    """The file, open for reading; a pipe or a device, which could block or never end, is refused."""
    if _ADDRESS.match(name):
        raise UsageError(f"{label} is an address: download the picture first and give the file's name")
    try:
        return open_regular(Path(name))
    except FileNotFoundError:
        raise UsageError(f"{label} does not exist; check the name") from None
    except OSError as error:
        raise UsageError(f"cannot read {label}: {error.strerror}") from error
    except ValueError as error:  # something else than a file, or a NUL in the name
        reason = "that can be no file's name" if "\0" in name else str(error)
        raise UsageError(f"cannot read {label!r}: {reason}") from None


@contextmanager
def _decoding(label: str) -> Iterator[None]:
    """Inside, whatever Pillow raises about a picture is a UsageError.

    Its decoders raise nearly anything on damaged data, so no shorter list of exceptions would do.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UsageError:
        raise
    except Image.DecompressionBombError:
        raise UsageError(_too_large(label, "too many")) from None
    except UnidentifiedImageError:
        raise UsageError(f"{label} is no picture, or its beginning is damaged: {_READ}") from None
    except MemoryError:
        raise UsageError(f"{label} does not fit into memory: make it smaller first") from None
    except Exception as error:
        raise UsageError(f"{label} is damaged or cut off ({error}): save it anew") from error


def _too_large(label: str, pixels: str) -> str:
    return f"{label} has {pixels} pixels: at most {MAX_PIXELS} are read; make it smaller first"


def _check_size(width: int, height: int, label: str) -> None:
    if not width or not height:
        raise UsageError(f"{label} is {width}x{height} pixels: it is empty")
    if width * height > MAX_PIXELS:
        raise UsageError(_too_large(label, f"{width}x{height}"))


def _check_array(array: NDArray[Any], what: str) -> None:
    """Refuse what is no picture; float values must lie in [0, 1]."""
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if not fits or (array.dtype != np.uint8 and array.dtype.kind != "f"):
        raise UsageError(
            f"{what} is {array.dtype}{list(array.shape)}: uint8, or float from 0 to 1, of shape [H, W], "
            "[H, W, 3] or [H, W, 4] is wanted"
        )
    _check_size(array.shape[1], array.shape[0], what)
    if array.dtype.kind == "f":
        _check_unit(array, what)


def _check_unit(values: NDArray[Any], label: str) -> None:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # NaN is refused too
        raise UsageError(
            f"{label} has float values from {low:g} to {high:g}: 0 is black and 1 white; scale it first"
        )


def _from_array(array: NDArray[Any], what: str) -> Image:
    from PIL import Image

    _check_array(array, what)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype.kind == "f":
        array = np.rint(array * 255)
    return Image.fromarray(np.ascontiguousarray(array, np.uint8))


def _upright(image: Image, label: str, *, managed: bool) -> tuple[Image, Image | None]:
    """RGB and alpha of an opened image, turned as its EXIF data say."""
    from PIL.Image import Transpose

    _check_size(*image.size, label)
    image.load()
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    # Not Pillow's ImageOps.exif_transpose: it writes the EXIF data anew, and fails where an entry of them
    # cannot be written.
    turn = None
    with suppress(Exception):  # damaged EXIF data are no reason to refuse the picture
        turn = turns.get(image.getexif().get(_ORIENTATION, 1))
    profile = image.info.get("icc_profile") if managed else None
    colours, alpha = _separated(_in_8_bits(image, label), profile)
    if turn is None:
        return colours, alpha
    return colours.transpose(turn), None if alpha is None else alpha.transpose(turn)


def _in_8_bits(image: Image, label: str) -> Image:
    """Grey of 16 bits or of floats as 8 bits (which Pillow would clip); other images as they are.

    Pillow has colour of 16 bits as 8 when it opens it.
    """
    from PIL import Image

    if image.mode == "F":
        values = np.asarray(image)
        _check_unit(values, label)
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise UsageError(
            f"{label} has grey values from {values.min()} to {values.max()}: 0 to 65535 are read"
        )
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return Image.fromarray(grey)
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))


def _separated(image: Image, profile: bytes | None) -> tuple[Image, Image | None]:
    """Colours as RGB, in sRGB where the profile can be applied, and the alpha where there is one."""
    if image.mode in ("La", "RGBa"):  # colours that are multiplied by alpha
        image = image.convert(image.mode.upper())
    alpha = None
    if image.mode == "LA":
        image, alpha = image.split()
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image, alpha = image.convert("RGB"), image.getchannel("A")
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("RGB")
    return (_in_srgb(image, profile) if profile else image.convert("RGB")), alpha


def _in_srgb(image: Image, profile: bytes) -> Image:
    """Colours of an ICC profile in sRGB; as they stand where the profile is damaged or of other channels."""
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, "RGB")
    except (ImageCms.PyCMSError, ImportError, OSError, TypeError, ValueError):
        return image.convert("RGB")
    if image.mode == "RGB" and _keeps_colours(transform):
        return image
    return transform.apply(image)


def _keeps_colours(transform: Any) -> bool:
    """Whether a transform of RGB is the identity but for roundings, which no pixel should suffer."""
    from PIL import Image

    levels = np.linspace(0, 255, 17).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(17, -1, 3)
    changed = np.asarray(transform.apply(Image.fromarray(grid)))
    return int(np.abs(changed.astype(int) - grid).max()) <= _PROFILE_ROUNDING
