"""Pictures and masks from outside: the table of everything odd that a user may give."""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from sdrt.runtime.errors import UsageError
from sdrt.runtime.pictures.reading import FORMATS, MAX_PIXELS, read_image, read_mask
from tolerances import JPEG_FLAT

ORIENTATION = 0x0112
RED, GREY, WHITE, BLACK = [255, 0, 0], [128, 128, 128], [255, 255, 255], [0, 0, 0]
RED_LUMA = 76  # 0.299 * 255
SRGB = ImageCms.createProfile("sRGB")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def colours() -> NDArray[np.uint8]:
    """7 by 5 pixels, no two alike."""
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def flat(mode: str, colour: Any) -> Image.Image:
    return Image.new(mode, (6, 4), colour)


def palette(**info: Any) -> Image.Image:
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.info.update(info)
    return image


def grey_16(value: int, dtype: str = "<u2") -> Image.Image:
    return Image.fromarray(np.full((4, 6), value, dtype))


def animated() -> list[Image.Image]:
    return [flat("RGB", "red"), flat("RGB", "blue")]


# What it is → the file, and the colour that every pixel of it has.
ODD: dict[str, tuple[Callable[[], bytes], list[int]]] = {
    "grey": (lambda: encoded(flat("L", 128)), GREY),
    "one bit, white": (lambda: encoded(flat("1", 1)), WHITE),
    "one bit, black": (lambda: encoded(flat("1", 0)), BLACK),
    "alpha 0 is white": (lambda: encoded(flat("RGBA", (255, 0, 0, 0))), WHITE),
    "alpha 255 changes nothing": (lambda: encoded(flat("RGBA", (255, 0, 0, 255))), RED),
    "alpha is laid on white": (lambda: encoded(flat("RGBA", (255, 0, 0, 102))), [255, 153, 153]),
    "grey with alpha": (lambda: encoded(flat("LA", (0, 102))), [153, 153, 153]),
    "one colour that is transparent": (lambda: encoded(flat("RGB", "red"), transparency=(255, 0, 0)), WHITE),
    "one grey that is transparent": (lambda: encoded(flat("L", 7), transparency=7), WHITE),
    "palette": (lambda: encoded(palette()), RED),
    "palette with a transparent entry": (lambda: encoded(palette(), transparency=1), WHITE),
    "palette with shares of alpha": (lambda: encoded(palette(), transparency=b"\0\x66"), [255, 153, 153]),
    "GIF with transparency": (lambda: encoded(palette(), "GIF", transparency=1), WHITE),
    "WebP with alpha": (lambda: encoded(flat("RGBA", (255, 0, 0, 0)), "WEBP", lossless=True), WHITE),
    "16 bits, white": (lambda: encoded(grey_16(65535)), WHITE),
    "16 bits, scaled": (lambda: encoded(grey_16(128 * 257)), GREY),
    "16 bits, rounded": (lambda: encoded(grey_16(128 * 257 + 128)), GREY),
    "16 bits, rounded up": (lambda: encoded(grey_16(127 * 257 + 129)), GREY),
    "16 bits, dark": (lambda: encoded(grey_16(255)), [1, 1, 1]),
    "16 bits, TIFF of the other order": (lambda: encoded(grey_16(128 * 257, ">u2"), "TIFF"), GREY),
    "16 bits, PGM": (lambda: b"P5 6 4 65535\n" + np.full(24, 128 * 257, ">u2").tobytes(), GREY),
    "16 bits, PPM": (lambda: b"P6 6 4 65535\n" + np.tile(np.array([65535, 0, 0], ">u2"), 24).tobytes(), RED),
    "16 bits, a transparent grey": (lambda: with_transparent_grey(grey_16(300), 300), WHITE),
    "floats": (lambda: encoded(flat("F", 0.5), "TIFF"), GREY),
    "CMYK": (lambda: encoded(flat("CMYK", (0, 255, 255, 0)), "TIFF"), RED),
    "CMYK JPEG": (lambda: encoded(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), RED),
    "YCbCr TIFF": (lambda: encoded(flat("RGB", (128, 128, 128)).convert("YCbCr"), "TIFF"), GREY),
    "animated PNG": (lambda: encoded(animated()[0], save_all=True, append_images=animated()[1:]), RED),
    "animated GIF": (lambda: encoded(animated()[0], "GIF", save_all=True, append_images=animated()[1:]), RED),
    "animated WebP": (
        lambda: encoded(animated()[0], "WEBP", save_all=True, append_images=animated()[1:], lossless=True),
        RED,
    ),
    "damaged EXIF": (lambda: encoded(flat("RGB", "red"), exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), RED),
    "damaged ICC profile": (lambda: encoded(flat("RGB", "red"), icc_profile=b"no profile"), RED),
    "ICC profile of other channels": (
        lambda: encoded(flat("L", 128), icc_profile=ImageCms.ImageCmsProfile(SRGB).tobytes()),
        GREY,
    ),
}


def with_transparent_grey(image: Image.Image, grey: int) -> bytes:
    """A PNG of 16 bits with a tRNS chunk, which Pillow does not write for them."""
    png = encoded(image)
    stream = io.BytesIO()
    PngImagePlugin.putchunk(stream, b"tRNS", grey.to_bytes(2, "big"))
    end_of_header = 8 + 25
    return png[:end_of_header] + stream.getvalue() + png[end_of_header:]


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures(name: str, tmp_path: Path) -> None:
    make, colour = ODD[name]
    (tmp_path / "picture").write_bytes(make())
    for source in (make(), tmp_path / "picture", str(tmp_path / "picture")):
        pixels = read_image(source)
        assert pixels.shape == (4, 6, 3)
        assert pixels.dtype == np.uint8
        assert (pixels == colour).all(), pixels[0, 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM", "TGA", "QOI", "WEBP", "GIF", "JPEG2000"])
def test_formats_without_loss(kind: str) -> None:
    image = Image.radial_gradient("L").convert("RGB")
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(read_image(encoded(image, kind, **options)), np.asarray(image))


def test_lab_as_pillow_converts_it() -> None:
    image = flat("LAB", (160, 200, 90))
    want = np.asarray(image.convert("RGB"))
    assert np.ptp(want) > 50  # a colour, not a grey
    assert np.array_equal(read_image(encoded(image, "TIFF")), want)


def test_formats_that_run_other_programs_are_not_opened() -> None:
    assert "EPS" not in FORMATS
    eps = encoded(flat("RGB", "red"), "EPS")
    assert refusal(eps).startswith("image is no picture")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind: str, orientation: int) -> None:
    """Stored so that the orientation brings back the picture: what a camera does."""
    picture = colours()
    stored = {
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: np.rot90(picture),
        7: picture[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(picture, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    if kind == "JPEG":
        options = {"quality": 100, "subsampling": 0}
    large = np.repeat(np.repeat(stored, 16, axis=0), 16, axis=1)
    data = encoded(Image.fromarray(large), kind, exif=exif.tobytes(), **options)
    read = read_image(data)[8::16, 8::16]
    assert read.shape == picture.shape
    assert np.abs(read.astype(int) - picture).max() <= (JPEG_FLAT if kind == "JPEG" else 0)
    mask = read_mask(data)[8::16, 8::16]
    assert np.array_equal(np.rint(mask * 255), np.asarray(Image.fromarray(read).convert("L")))


def test_orientation_beside_an_entry_that_cannot_be_written() -> None:
    """Width as text, as a careless program has it: Pillow reads it, and cannot write it again."""
    entries = struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x0100, 2, 4, b"abc")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    turned = read_image(encoded(Image.fromarray(colours()), exif=exif))
    assert np.array_equal(turned, np.rot90(colours(), -1))


def test_orientation_of_a_pillow_image_and_an_unknown_one() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    opened = Image.open(io.BytesIO(encoded(Image.fromarray(colours()), exif=exif.tobytes())))
    assert np.array_equal(read_image(opened), np.rot90(colours(), -1))
    exif[ORIENTATION] = 99
    assert np.array_equal(read_image(encoded(Image.fromarray(colours()), exif=exif.tobytes())), colours())


def exchanged_profile() -> bytes:
    """sRGB's profile with red and green exchanged: no viewer could take it for sRGB."""
    profile = ImageCms.ImageCmsProfile(SRGB).tobytes()
    return profile.replace(b"rXYZ", b"tXYZ").replace(b"gXYZ", b"rXYZ").replace(b"tXYZ", b"gXYZ")


def test_profile_is_applied() -> None:
    data = encoded(flat("RGB", "red"), icc_profile=exchanged_profile())
    assert (read_image(data) == [0, 255, 0]).all()
    translucent = encoded(flat("RGBA", (255, 0, 0, 0)), icc_profile=exchanged_profile())
    assert (read_image(translucent) == WHITE).all()


def nearly_srgb() -> bytes:
    """sRGB's profile as another maker may round it: the red primary's X is 0.0005 larger."""
    profile = bytearray(ImageCms.ImageCmsProfile(SRGB).tobytes())
    at = int.from_bytes(profile[(entry := profile.index(b"rXYZ")) + 4 : entry + 8], "big") + 8
    x = int.from_bytes(profile[at : at + 4], "big") + round(0.0005 * 2**16)
    profile[at : at + 4] = x.to_bytes(4, "big")
    return bytes(profile)


def test_profile_of_srgb_changes_no_pixel() -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    changed = ImageCms.profileToProfile(picture, io.BytesIO(nearly_srgb()), SRGB)
    assert not np.array_equal(np.asarray(changed), np.asarray(picture))
    for profile in (ImageCms.ImageCmsProfile(SRGB).tobytes(), nearly_srgb()):
        assert np.array_equal(read_image(encoded(picture, icc_profile=profile)), np.asarray(picture))


@pytest.mark.parametrize(
    "array",
    [
        colours(),
        colours() / 255,
        (colours() / 255).astype(np.float32),
        np.dstack([colours(), np.full((5, 7), 255, np.uint8)]),
        colours()[::-1][::-1],
    ],
    ids=["uint8", "float64", "float32", "alpha", "strides"],
)
def test_arrays(array: NDArray[Any]) -> None:
    before = array.copy()
    pixels = read_image(array)
    assert np.array_equal(pixels, colours())
    pixels[:] = 0
    assert np.array_equal(array, before)


def test_floats_are_rounded() -> None:
    assert read_image(np.array([[0.001, 0.5, 0.997, 0.999]]))[0, :, 0].tolist() == [0, 128, 254, 255]


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1)])
def test_grey_arrays(shape: tuple[int, ...]) -> None:
    grey = colours()[..., 0]
    assert np.array_equal(read_image(grey.reshape(shape)), np.repeat(grey[..., np.newaxis], 3, axis=2))
    assert np.array_equal(np.rint(read_mask(grey.reshape(shape)) * 255), grey)


def test_one_pixel() -> None:
    assert read_image(Image.new("RGB", (1, 1), "red")).tolist() == [[RED]]


def refusal(source: Any, read: Callable[..., Any] = read_image) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own must not get out
        with pytest.raises(UsageError) as error:
            read(source)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 800
    return str(error.value)


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is that large, in fewer than 100 bytes."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    stream = io.BytesIO()
    stream.write(b"\x89PNG\r\n\x1a\n")
    for kind, data in ((b"IHDR", header), (b"IDAT", b"x"), (b"IEND", b"")):
        PngImagePlugin.putchunk(stream, kind, data)
    return stream.getvalue()


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "empty": (lambda: b"", "is no picture"),
    "text": (lambda: b"hello world, this is no picture", "is no picture"),
    "cut in the header": (lambda: encoded(flat("RGB", "red"))[:20], "is damaged or cut off"),
    "bomb": (lambda: bomb(8193, 8192), "has 8193x8192 pixels: at most 67108864"),
    "bomb that Pillow warns of": (lambda: bomb(10000, 10000), "has 10000x10000 pixels: at most"),
    "bomb that Pillow refuses": (lambda: bomb(60000, 60000), "too many pixels: at most 67108864"),
    "no width": (lambda: bomb(0, 8), "is no picture|is empty"),
    "address": (lambda: "https://example.org/a.png", "is an address: download the picture first"),
    "address as a path": (lambda: Path("http://example.org/a.png"), "is an address"),
    "address of another kind": (lambda: "s3://bucket/a.png", "is an address"),
    "no such file": (lambda: "no/such/file.png", "image no/such/file.png does not exist"),
    "a name that is too long": (lambda: "x" * 5000, "cannot read image xxx"),
    "a name with a NUL": (lambda: "a\0b", "no file's name"),
    "no name": (lambda: "", "is a folder"),
    "device": (lambda: "/dev/zero", "is a device"),
    "number": (lambda: 7, "image is int: a path, bytes, a Pillow image or a NumPy array is wanted"),
    "nothing": (lambda: None, "image is NoneType"),
    "list": (lambda: [[0, 1]], "image is list"),
    "array of 16 bits": (lambda: np.zeros((4, 6), np.uint16), r"image is uint16\[4, 6\]: uint8, or float"),
    "array of two channels": (lambda: np.zeros((4, 6, 2), np.uint8), r"image is uint8\[4, 6, 2\]"),
    "array of several pictures": (lambda: np.zeros((2, 4, 6, 3), np.uint8), r"\[2, 4, 6, 3\]"),
    "array without pixels": (lambda: np.zeros((0, 6, 3), np.uint8), "is 6x0 pixels: it is empty"),
    "array of too many pixels": (
        lambda: np.broadcast_to(np.uint8(0), (8193, 8192, 3)),
        "has 8192x8193 pixels: at most",
    ),
    "array of floats to 255": (lambda: np.full((4, 6), 255.0), "float values from 255 to 255: 0 is black"),
    "array with NaN": (lambda: np.full((4, 6), np.nan), "float values from nan"),
    "array of objects": (lambda: np.full((4, 6), None), "image is object"),
    "floats beyond 1": (lambda: encoded(flat("F", 1.5), "TIFF"), "float values from 1.5 to 1.5"),
    "floats with NaN": (lambda: encoded(flat("F", float("nan")), "TIFF"), "float values from nan"),
    "integers of 32 bits": (lambda: encoded(flat("I", 70000), "TIFF"), "from 70000 to 70000: 0 to 65535"),
    "Pillow image without pixels": (lambda: Image.new("RGB", (0, 4)), "is 0x4 pixels: it is empty"),
    "Pillow image that is closed": (lambda: closed(), "is damaged or cut off"),
    "Pillow image that is cut off": (
        lambda: Image.open(io.BytesIO(encoded(noise())[:3000])),
        "is damaged or cut off",
    ),
}


def closed() -> Image.Image:
    image = flat("RGB", "red")
    image.close()
    return image


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    make, words = BAD[name]
    given = make()
    message = refusal(given)
    assert re.search(words, message), message
    assert UsageError.exit_status == 2
    refusal(given, read_mask)


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "PPM", "TGA", "QOI", "AVIF"]
)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.8])
def test_cut_files(kind: str, share: float) -> None:
    data = encoded(noise(), kind)
    words = refusal(data[: int(len(data) * share)])
    assert "is damaged or cut off" in words or "is no picture" in words


def test_damaged_bytes_are_refused_or_read_and_nothing_else() -> None:
    """Whatever a decoder raises on nonsense comes out as the one error."""
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "JPEG2000", "AVIF"):
        whole = np.frombuffer(encoded(noise(), kind), np.uint8)
        for _ in range(12):
            data = whole.copy()
            at = rng.integers(0, min(len(data), 600), 6)
            data[at] = rng.integers(0, 256, 6)
            try:
                assert read_image(data.tobytes()).ndim == 3
            except UsageError as error:
                assert str(error).startswith("image ")  # noqa: PT017


def test_bomb_is_refused_before_its_pixels_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(*_arguments: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decoded)
    assert "8193x8192" in refusal(bomb(8193, 8192))
    assert MAX_PIXELS == 8192 * 8192


def test_folder_and_pipe(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe" in refusal(tmp_path / "pipe")  # and does not wait for a writer


def test_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.png").write_bytes(encoded(flat("RGB", "red")))
    monkeypatch.setattr("sdrt.runtime.pictures.reading.open_regular", refused)
    assert refusal(tmp_path / "a.png") == f"cannot read image {tmp_path / 'a.png'}: Permission denied"


def test_messages_name_the_argument() -> None:
    with pytest.raises(UsageError, match=r"^mask_image nope does not exist"):
        read_mask("nope")
    with pytest.raises(UsageError, match=r"^the style nope does not exist"):
        read_image("nope", "the style")


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", fails)
    assert "does not fit into memory" in refusal(encoded(flat("RGB", "red"), "TIFF"))


def shape_in(mode: str, inside: Any, outside: Any) -> Image.Image:
    """6 by 4 pixels whose left half is ``inside``."""
    image = Image.new(mode, (6, 4), outside)
    image.paste(inside, (0, 0, 3, 4))
    return image


def with_hole(first: Any, second: Any, opacity: int = 0) -> Image.Image:
    """A picture of two colours whose left half is transparent."""
    image = shape_in("RGBA", (*first[:3], opacity), second)
    image.putpixel((5, 0), first)
    return image


def dark_spot(opacity: int) -> Image.Image:
    """A black pixel on nothing."""
    image = Image.new("RGBA", (6, 4), (0, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 0, opacity))
    return image


def holed_sheet(colour: Any) -> Image.Image:
    """One colour, but for a pixel that is transparent."""
    image = Image.new("RGBA", (6, 4), colour)
    image.putpixel((1, 1), (*colour[:3], 0))
    return image


HALF = np.repeat([[1.0, 1, 1, 0, 0, 0]], 4, axis=0)
SPOT = np.zeros((4, 6))
SPOT[1, 1] = 1
MASKS: dict[str, tuple[Any, NDArray[Any]]] = {
    "white is drawn": (shape_in("L", 255, 0), HALF),
    "one bit": (shape_in("1", 1, 0), HALF),
    "grey is blended": (shape_in("L", 51, 0), HALF * np.float32(0.2)),
    "16 bits": (Image.fromarray((HALF * 65535).astype(np.uint16)), HALF),
    "colours by their luma": (shape_in("RGB", (255, 0, 0), (0, 0, 0)), HALF * (RED_LUMA / 255)),
    "all white": (Image.new("L", (6, 4), 255), np.ones((4, 6))),
    "opaque alpha": (shape_in("RGBA", (255, 255, 255, 255), (0, 0, 0, 255)), HALF),
    "white on nothing": (shape_in("RGBA", (255, 255, 255, 255), (0, 0, 0, 0)), HALF),
    "white on transparent white": (shape_in("RGBA", (255, 255, 255, 255), (255, 255, 255, 0)), HALF),
    "black on nothing": (dark_spot(255), SPOT),
    "black, half transparent, on nothing": (dark_spot(51), SPOT * np.float32(0.2)),
    "yellow, half opaque": (shape_in("RGBA", (255, 255, 0, 51), (0, 0, 0, 0)), HALF * np.float32(0.2)),
    "palette with a transparent entry": (palette(transparency=0), np.ones((4, 6)) * (RED_LUMA / 255)),
    "a hole in a picture": (with_hole((255, 0, 0, 255), (0, 0, 255, 255)), HALF),
    "a hole in a picture, half transparent": (with_hole((9, 0, 0, 255), (0, 0, 255, 255), 204), HALF / 5),
    "a hole in a black sheet": (holed_sheet((0, 0, 0, 255)), SPOT),
    "a hole in a white sheet": (holed_sheet((255, 255, 255, 255)), 1 - SPOT),
    "bool array": (HALF.astype(bool), HALF),
    "float array": (HALF / 3, HALF / 3),
    "uint8 array": ((HALF * 255).astype(np.uint8), HALF),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    source, want = MASKS[name]
    mask = read_mask(source)
    assert mask.dtype == np.float32
    assert np.array_equal(mask, want.astype(np.float32)) or np.abs(mask - want).max() < 2.0**-24


def test_a_dark_shape_or_a_hole_in_the_dark() -> None:
    image = shape_in("RGBA", (0, 0, 0, 255), (0, 0, 0, 0))
    assert "either could say what is drawn; save it without transparency" in refusal(image, read_mask)


def test_mask_of_several_greys_and_transparency() -> None:
    """What is grey and what is transparent could each be meant: said, not guessed."""
    image = shape_in("LA", (255, 255), (255, 0))
    image.putpixel((0, 0), (0, 255))
    assert "either could say what is drawn; save it without transparency" in refusal(image, read_mask)


def test_profile_does_not_change_a_mask() -> None:
    image = flat("RGB", (0, 200, 0))
    data = encoded(image, icc_profile=exchanged_profile())
    assert np.array_equal(np.rint(read_mask(data) * 255), np.asarray(image.convert("L")))


@pytest.mark.parametrize(
    "source",
    [
        Image.new("L", (6, 4)),
        Image.new("RGBA", (6, 4), (255, 255, 255, 0)),
        np.zeros((4, 6), bool),
        np.zeros((4, 6)),
    ],
    ids=["black", "transparent", "false", "zeros"],
)
def test_mask_that_draws_nothing(source: Any) -> None:
    assert refusal(source, read_mask).startswith("mask_image is black all over: nothing would be drawn")


def test_mask_of_zeros_and_ones_that_is_uint8() -> None:
    assert "white is 255; give 0 and 1 as bool or float" in refusal(HALF.astype(np.uint8), read_mask)
    assert np.array_equal(read_mask(HALF.astype(np.uint8) * 2), np.float32(2 / 255) * HALF.astype(np.float32))


def test_pair_of_pictures_from_a_phone() -> None:
    """An MPO file, which is a JPEG and more: the first picture."""
    data = encoded(flat("RGB", "red"), "MPO", save_all=True, append_images=[flat("RGB", "blue")], quality=100)
    assert np.abs(read_image(data).astype(int) - RED).max() <= JPEG_FLAT


def test_float_mask_out_of_range() -> None:
    assert "from 0 to 2" in refusal(HALF * 2, read_mask)
