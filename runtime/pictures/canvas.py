"""From the picture as given to what the model draws, and back.

A model draws only sizes that its graphs admit. Without a mask the picture is brought to the nearest of them.
With a mask, or on a larger canvas, the given pixels have to survive, so the picture is padded to such a size
and the result cut back.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.bundle.manifest import ImageProcessorFacts, Limits, SizeLimit
from sdrt.runtime.errors import UsageError
from sdrt.runtime.pictures.reading import MAX_PIXELS

_FADE: Final = 16  # pixels over which replicated edges become their blurred selves
_SIDES: Final = ("left", "top", "right", "bottom")


@dataclass(frozen=True, slots=True, eq=False)
class Canvas:
    """A picture of a size that the model draws.

    Attributes:
        image: uint8 [H, W, 3], H and W admitted by the bundle.
        mask: float32 [H, W] in [0, 1], 1 where the model draws and 0 where the picture is kept; None: it
            draws everything.
        crop: Height and width, from the top left corner, of what is handed back; the rest is padding.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.float32] | None
    crop: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.image.nbytes + (0 if self.mask is None else self.mask.nbytes)


def fit(
    image: NDArray[np.uint8],
    limits: Limits,
    *,
    mask: NDArray[np.float32] | None = None,
    expand: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Canvas:
    """Bring a picture, and its mask, to a size that the bundle draws.

    Without ``mask`` and ``expand`` the picture is resized to cover the size and its middle is cut out. The
    size is ``height`` and ``width``; one that is not given follows from the picture's proportions; without
    either, the size is the admitted one nearest to the picture's, made smaller as a whole if it is too large
    and larger if it is too small.

    With them the picture is not resized (unless ``height`` or ``width`` say so, and then before anything
    else, its mask with it): its edges are continued to the right and below, up to the next admitted size, and
    so are the mask's, since what lies beside a drawn area should not hold on to what was there.

    Args:
        image: uint8 [H, W, 3].
        limits: Of the bundle.
        mask: float32 [h, w] in [0, 1]; of another size than the picture only in the same proportions.
        expand: Pixels that the canvas grows by at the left, top, right and bottom. All of the new area is
            drawn; what stands there before, and is encoded, continues the picture's edges, blurred.
        height: In pixels, of the picture before it is expanded.
        width: In pixels.

    Raises:
        UsageError: A size that the bundle does not draw, a picture or a canvas beyond its largest where the
            picture has to survive, a mask of other proportions, or an expansion by nothing or by negative
            numbers.
    """
    if mask is None and expand is None:
        image = _resized(image, *drawn_size(image.shape, limits, height, width))
        return Canvas(image, None, (image.shape[0], image.shape[1]))
    if mask is not None:
        mask = _mask_of_size(mask, image.shape[0], image.shape[1])
    if height is not None or width is not None:
        size = drawn_size(image.shape, limits, height, width)
        image = _resized(image, *size)
        mask = None if mask is None else _resized_mask(mask, *size)
    _check_room(image, limits)
    if expand is not None:
        image, mask = _expanded(image, mask, _checked_expansion(expand, image, limits))
    assert mask is not None  # given, or of the expansion
    if not mask.any():
        raise UsageError("what the mask draws lies outside of what is cut out: nothing would be drawn")
    rows, columns = image.shape[:2]
    below = _next_size(rows, limits.height) - rows
    beside = _next_size(columns, limits.width) - columns
    return Canvas(
        np.pad(image, ((0, below), (0, beside), (0, 0)), mode="edge"),
        np.pad(mask, ((0, below), (0, beside)), mode="edge"),
        (rows, columns),
    )


def fit_to_enlarge(
    image: NDArray[np.uint8], limits: Limits, factor: int, *, height: int | None, width: int | None
) -> Canvas:
    """Bring a picture to a size that a bundle enlarges.

    The picture is taken pixel by pixel: its edges are continued to the right and below, up to the next size
    that the bundle takes, and what becomes of them is cut off. With ``height`` or ``width`` it is resized
    first, as `fit` does it.

    Args:
        image: uint8 [h, w, 3].
        limits: Of the bundle: of what is drawn.
        factor: How many times as large that is.
        height: In pixels, of what is drawn.
        width: In pixels, of what is drawn.

    Returns:
        The picture as the model reads it, and what is handed back of what it draws.

    Raises:
        UsageError: A size that the bundle does not draw, or a picture larger than it takes.
    """
    sides = [_smaller(limits.height, factor), _smaller(limits.width, factor)]
    if height is not None or width is not None:
        for name, size, limit in (("height", height, limits.height), ("width", width, limits.width)):
            if size is not None and not limit.admits(size):
                raise UsageError(f"{name} is {size}: this bundle draws {limit} pixels")
        asked = [None if size is None else size // factor for size in (height, width)]
        small = replace(limits, height=sides[0], width=sides[1])
        image = fit(image, small, height=asked[0], width=asked[1]).image
    rows, columns = image.shape[:2]
    if rows > _largest(sides[0]) or columns > _largest(sides[1]):
        raise UsageError(
            f"the image is {columns}x{rows} pixels (width x height), and this bundle enlarges up to "
            f"{_largest(sides[1])}x{_largest(sides[0])}: give height and width, of the result, to have it "
            "made smaller first, or export the bundle with larger ones"
        )
    below, beside = _next_size(rows, sides[0]) - rows, _next_size(columns, sides[1]) - columns
    padded = np.pad(image, ((0, below), (0, beside), (0, 0)), mode="edge")
    return Canvas(padded, None, (factor * rows, factor * columns))


def drawn_size(
    shape: Sequence[int], limits: Limits, height: int | None, width: int | None
) -> tuple[int, int]:
    """The size that a picture of a shape [H, W, …] is drawn at: what is given, the rest from its proportions.

    Raises:
        UsageError: A size that the bundle does not draw.
    """
    rows, columns = shape[:2]
    for name, size, limit in (("height", height, limits.height), ("width", width, limits.width)):
        if size is not None and not limit.admits(size):
            raise UsageError(f"{name} is {size}: this bundle draws {limit} pixels")
    if height is None and width is None:
        largest = min(_largest(limits.height) / rows, _largest(limits.width) / columns)
        smallest = max(_smallest(limits.height) / rows, _smallest(limits.width) / columns)
        # Of a very long picture the longer side decides; the shorter is cut to the smallest size.
        scale = min(max(1.0, smallest), largest)
    else:
        scale = height / rows if height is not None else (width or 0) / columns
    return (
        _nearest(rows * scale, limits.height) if height is None else height,
        _nearest(columns * scale, limits.width) if width is None else width,
    )


def finish(drawn: NDArray[np.uint8], canvas: Canvas) -> NDArray[np.uint8]:
    """What is handed back of the pictures that the model drew.

    Given pixels where the mask is 0, drawn ones where it is 1, and between them the mean with the mask's
    weights, rounded half to even.

    Args:
        drawn: uint8 [N, H, W, 3], of the canvas's size.
        canvas: As `fit` made it.

    Returns:
        uint8 [N, *crop, 3].
    """
    rows, columns = canvas.crop
    drawn = drawn[:, :rows, :columns]
    if canvas.mask is None:
        return drawn
    given = canvas.image[:rows, :columns].astype(np.float64)
    share = canvas.mask[:rows, :columns, np.newaxis].astype(np.float64)
    # float64 holds the product of a float32 and a difference of two uint8 exactly.
    blended = [np.rint(given + share * (picture - given)).astype(np.uint8) for picture in drawn]
    return np.stack(blended)


def latent_mask(mask: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """The mask of the latents: each as far as any of its pixels is drawn.

    So no latent inside the drawn area is kept, which would show as a seam.

    Args:
        mask: float32 [H, W] in [0, 1], sides multiples of ``factor``.
        factor: Pixels per latent and side.

    Returns:
        float32 [1, 1, H / factor, W / factor].
    """
    rows, columns = mask.shape[0] // factor, mask.shape[1] // factor
    latents: NDArray[np.float32] = mask.reshape(rows, factor, columns, factor).max(axis=(1, 3))
    return latents[np.newaxis, np.newaxis]


def image_to_float(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A picture uint8 [H, W, 3] as the VAE encoder reads it: float32 [1, 3, H, W] in [-1, 1]."""
    values = image.transpose(2, 0, 1)[np.newaxis].astype(np.float32)
    return np.ascontiguousarray(values / np.float32(127.5) - np.float32(1))


def masked_image(image: NDArray[np.uint8], mask: NDArray[np.float32]) -> NDArray[np.float32]:
    """The picture without what is drawn, as an inpainting U-Net was trained to see it.

    As diffusers' inpainting pipelines make it: pixels where the mask is 0.5 or more are 0, a middle grey.

    Args:
        image: uint8 [H, W, 3].
        mask: float32 [H, W] in [0, 1].

    Returns:
        float32 [1, 3, H, W] in [-1, 1].
    """
    return np.where(mask < 0.5, image_to_float(image), np.float32(0))


def clip_pixels(image: NDArray[np.uint8], facts: ImageProcessorFacts) -> NDArray[np.float32]:
    """A picture as a CLIP image encoder reads it; equal to transformers' ``CLIPImageProcessor``.

    The shorter side is brought to ``facts.size`` with Pillow's bicubic filter (in uint8), the middle is cut
    out, then RGB in [0, 1] less mean over std.

    Args:
        image: uint8 [H, W, 3].
        facts: Of the bundle's manifest.

    Returns:
        float32 [1, 3, size, size].

    Raises:
        UsageError: The picture is so long that at this size it would have more than `MAX_PIXELS` pixels.
    """
    from PIL import Image

    rows, columns = image.shape[:2]
    shorter, longer = sorted((rows, columns))
    other = int(facts.size * longer / shorter)  # cut off, as transformers does it
    if facts.size * other > MAX_PIXELS:
        raise UsageError(
            f"the image is {columns}x{rows} pixels (width x height): too long for an encoder that is shown "
            f"{facts.size}x{facts.size} of its middle; cut it first"
        )
    size = (facts.size, other) if columns <= rows else (other, facts.size)
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    top, left = (small.shape[0] - facts.size) // 2, (small.shape[1] - facts.size) // 2
    small = small[top : top + facts.size, left : left + facts.size]
    values = (small / 255).astype(np.float32)
    normal = (values - np.array(facts.mean, np.float32)) / np.array(facts.std, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1)[np.newaxis])


def _smaller(limit: SizeLimit, factor: int) -> SizeLimit:
    return SizeLimit(limit.minimum // factor, limit.maximum // factor, max(limit.multiple // factor, 1))


def _smallest(limit: SizeLimit) -> int:
    return -(-limit.minimum // limit.multiple) * limit.multiple


def _largest(limit: SizeLimit) -> int:
    return limit.maximum // limit.multiple * limit.multiple


def _nearest(size: float, limit: SizeLimit) -> int:
    """The admitted size nearest to ``size``, the smaller one of two."""
    nearest = math.ceil(size / limit.multiple - 0.5) * limit.multiple
    return min(max(nearest, _smallest(limit)), _largest(limit))


def _next_size(size: int, limit: SizeLimit) -> int:
    """The smallest admitted size that holds ``size`` pixels."""
    return max(-(-size // limit.multiple) * limit.multiple, _smallest(limit))


def _resized(image: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.uint8]:
    """The picture's middle, in its own proportions, at a size."""
    if image.shape[:2] == (rows, columns):
        return image
    from PIL import Image

    box = _middle(image.shape[0], image.shape[1], rows, columns)
    return np.array(Image.fromarray(image).resize((columns, rows), Image.Resampling.LANCZOS, box))


def _resized_mask(mask: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    """A mask, cut as `_resized` cuts the picture."""
    return _sampled(mask, rows, columns, _middle(mask.shape[0], mask.shape[1], rows, columns))


def _middle(height: int, width: int, rows: int, columns: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the largest box in the middle with the proportions of the size."""
    scale = min(height / rows, width / columns)
    left, top = (width - scale * columns) / 2, (height - scale * rows) / 2
    return max(left, 0.0), max(top, 0.0), min(width - left, width), min(height - top, height)


def _sampled(
    mask: NDArray[np.float32], rows: int, columns: int, box: tuple[float, float, float, float]
) -> NDArray[np.float32]:
    """A box of a mask as ``rows`` by ``columns`` pixels, without a value that was not there.

    Made smaller, each pixel is the largest of those it covers: what is thin and drawn must not be lost.
    """
    left, top, right, bottom = box
    if bottom - top > rows or right - left > columns:
        starts = (top + np.arange(rows) * (bottom - top) / rows).astype(int)
        begins = (left + np.arange(columns) * (right - left) / columns).astype(int)
        inside = mask[: math.ceil(bottom), : math.ceil(right)]
        covered: NDArray[np.float32] = np.maximum.reduceat(
            np.maximum.reduceat(inside, starts, axis=0), begins, axis=1
        )
        return covered
    down = top + (np.arange(rows) + 0.5) * (bottom - top) / rows
    across = left + (np.arange(columns) + 0.5) * (right - left) / columns
    sampled: NDArray[np.float32] = mask[np.ix_(down.astype(int), across.astype(int))]
    return sampled


def _mask_of_size(mask: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    """The mask at the picture's size, if it has its proportions to less than a pixel."""
    height, width = mask.shape
    off = min(abs(width - columns * height / rows), abs(height - rows * width / columns))
    if off >= 1:
        raise UsageError(
            f"the mask is {width}x{height} pixels and the picture {columns}x{rows} (width x height): a mask "
            "of the same size, or of the same proportions, is wanted"
        )
    return _sampled(mask, rows, columns, (0, 0, width, height))


def _check_room(image: NDArray[np.uint8], limits: Limits) -> None:
    rows, columns = image.shape[:2]
    if rows > _largest(limits.height) or columns > _largest(limits.width):
        raise UsageError(
            f"the picture is {columns}x{rows} pixels (width x height), and this bundle draws up to "
            f"{_largest(limits.width)}x{_largest(limits.height)}: with a mask or an expansion it keeps its "
            "size, so give height and width to have it resized first, or a smaller picture"
        )


def _checked_expansion(
    expand: Sequence[int], image: NDArray[np.uint8], limits: Limits
) -> tuple[int, int, int, int]:
    """Pixels at the left, top, right and bottom, if the canvas has room for them."""
    left, top, right, bottom = sides = _four_numbers(expand)
    for axis, names, grown, size, limit in (
        ("wide", "left and right", left + right, image.shape[1], limits.width),
        ("high", "top and bottom", top + bottom, image.shape[0], limits.height),
    ):
        if size + grown > _largest(limit):
            raise UsageError(
                f"expand adds {grown} pixels at {names} to a picture that is {size} {axis}: this bundle "
                f"draws up to {_largest(limit)}, so at most {_largest(limit) - size} together"
            )
    return sides


def _four_numbers(expand: Any) -> tuple[int, int, int, int]:
    try:
        left, top, right, bottom = map(operator.index, expand)
    except (TypeError, ValueError):
        raise UsageError(f"expand is {expand!r}: four whole numbers of pixels, {', '.join(_SIDES)}") from None
    sides = (left, top, right, bottom)
    if min(sides) < 0:
        raise UsageError(
            f"expand is {sides}: a side grows by 0 pixels or more; to cut, crop the picture first"
        )
    if not any(sides):
        raise UsageError("expand is 0 on all four sides: give at least one side some pixels")
    return sides


def _expanded(
    image: NDArray[np.uint8], mask: NDArray[np.float32] | None, sides: tuple[int, int, int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The picture on a larger canvas, whose new area is drawn and continues the picture's edges."""
    from PIL import Image, ImageFilter

    left, top, right, bottom = sides
    around = ((top, bottom), (left, right))
    edges = np.pad(image, (*around, (0, 0)), mode="edge")
    rows, columns = image.shape[:2]
    ground = edges.copy()
    # The picture's middle must not shine through: only its border is continued.
    ground[top : top + rows, left : left + columns] = _mean_of_border(image)
    blurred = np.asarray(Image.fromarray(ground).filter(ImageFilter.GaussianBlur(_FADE)), np.float32)
    # How many pixels away the picture is, which itself is 0 away.
    down = _distance(top, rows, bottom)[:, np.newaxis]
    across = _distance(left, columns, right)[np.newaxis]
    share = np.minimum(np.hypot(down, across) / _FADE, 1)[..., np.newaxis].astype(np.float32)
    filled = np.rint(edges + share * (blurred - edges)).astype(np.uint8)
    kept = np.zeros((rows, columns), np.float32) if mask is None else mask
    return filled, np.pad(kept, around, constant_values=1)


def _mean_of_border(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    sides = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    mean: NDArray[np.uint8] = np.rint(sides.mean(axis=0)).astype(np.uint8)
    return mean


def _distance(before: int, size: int, after: int) -> NDArray[np.int64]:
    """For each row (or column) of a canvas how far the picture's nearest one is."""
    return np.concatenate([np.arange(before, 0, -1), np.zeros(size, int), np.arange(1, after + 1)])
