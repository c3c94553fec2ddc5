"""The picture that a call starts from, and what is to become of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from numpy.typing import NDArray

from sdrt.runtime.bundle.families.components import CLASS_LABELS, LOW_RES, NOISE_LEVEL
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.checks import number, share, whole
from sdrt.runtime.errors import UsageError
from sdrt.runtime.request.recipes import check_pixels, pixels_sha256
from sdrt.runtime.request.sizes import checked_size

if TYPE_CHECKING:
    from sdrt.runtime.pictures.canvas import Canvas

DEFAULT_VARIATION: Final = 0.3  # seen on the embedded model: the same thing, drawn otherwise
PICTURE_OPTIONS: Final = ("strength", "mask_image", "expand", "variation")

# What is drawn from an image's seed before the first step.
LATENTS: Final = "latents"  # of the given picture, from the VAE's posterior
NOISE: Final = "noise"  # that sampling starts from
MASKED_LATENTS: Final = "masked_latents"  # of the given picture without what is to be drawn
PICTURE_NOISE: Final = "picture_noise"  # laid over what the U-Net reads of the given picture


@dataclass(frozen=True, slots=True)
class PictureTask:
    """A run that starts from a picture.

    Attributes:
        canvas: The picture, and what of it is drawn.
        strength: Share of the schedule that is run, above 0 to 1.
        variation: The share of fresh noise in the noise that the picture was inverted to; None for a run that
            starts mid-schedule.
        recipe: The arguments behind it, as plain data.
        input: The input of the U-Net that it becomes, in place of a start; empty for none.
        noise_level: How much noise is laid over that; None for none.
        drawn: Height and width that the model draws, where that is not the canvas.
    """

    canvas: Canvas
    strength: float
    variation: float | None
    recipe: Mapping[str, Any]
    input: str = ""
    noise_level: int | None = None
    drawn: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width that the model draws."""
        height, width, _ = self.canvas.image.shape
        return (height, width) if self.drawn is None else self.drawn

    @property
    def starts_from_noise(self) -> bool:
        """Whether nothing of the picture is in the first x: a mask with a strength of 1 (as in diffusers)."""
        return bool(self.input) or (self.canvas.mask is not None and self.strength == 1.0)


def draws_at_start(picture: PictureTask | None, manifest: Manifest) -> tuple[str, ...]:
    """What diffusers' pipelines draw from an image's generator before the first step, in their order.

    Image to image and inpainting draw the picture's latents from the VAE's posterior, where they need them,
    and inpainting those of the masked picture, whether the U-Net reads them or not. A variation by inversion,
    which diffusers' pipelines do not have, takes the posterior's mean, and so does a picture that is edited.
    """
    if picture is None or picture.variation is not None:
        return (NOISE,)
    if picture.input:
        return (NOISE,) if picture.noise_level is None else (PICTURE_NOISE, NOISE)
    if picture.canvas.mask is None:
        return (LATENTS, NOISE)
    if manifest.reads_mask and picture.starts_from_noise:
        return (NOISE, MASKED_LATENTS)
    return (LATENTS, NOISE, MASKED_LATENTS)


def build_picture(manifest: Manifest, options: Mapping[str, Any], *, has_prompt: bool) -> PictureTask | None:
    """Check and read what of a call's options is about a picture; None for text to image.

    Raises:
        UsageError: A picture cannot be read or does not fit, or the options contradict each other.
    """
    image, read = options.get("image"), manifest.record.picture_input
    if read:
        return _read_by_unet(manifest, options, has_prompt=has_prompt)
    inpaints = manifest.reads_mask
    if image is None:
        for name in PICTURE_OPTIONS:
            if options.get(name) is not None:
                raise UsageError(f"{name} is given, but no image: it says what becomes of one")
        if inpaints:
            raise UsageError(
                "this bundle is an inpainting model: it needs an image, and a mask_image or expand"
            )
        return None
    _check_encoder(manifest)
    masked = options.get("mask_image") is not None or options.get("expand") is not None
    if inpaints and not masked:
        raise UsageError(
            "this bundle is an inpainting model: it needs a mask_image or expand beside the image"
        )
    variation = _variation(options, masked=masked, has_prompt=has_prompt)
    if not has_prompt and variation is None:
        raise UsageError("the prompt is missing: what shall be drawn?")
    canvas, shown = _canvas(manifest, options)
    strength = _strength(options.get("strength"), 1.0 if masked else manifest.record.strength)
    way = {"strength": strength} if variation is None else {"variation": variation}
    return PictureTask(canvas, strength, variation, {**shown, **way})


def _read_by_unet(manifest: Manifest, options: Mapping[str, Any], *, has_prompt: bool) -> PictureTask:
    """The picture that the U-Net reads beside the noise."""
    if options.get("image") is None:
        raise UsageError(f"this bundle is of {manifest.record.title}: it needs an image")
    if not has_prompt and not manifest.record.picture_alone:
        raise UsageError("the prompt is missing: what shall become of the image?")
    read, level = manifest.record.picture_input, _noise_level(manifest, options.get(NOISE_LEVEL))
    brought = _AS_READ.get(read, _resized)
    canvas, shown, size = brought(manifest, options)
    recipe = shown if level is None else {**shown, NOISE_LEVEL: level}
    return PictureTask(canvas, 1.0, None, recipe, read, level, size)


class _Bring(Protocol):
    def __call__(
        self, manifest: Manifest, options: Mapping[str, Any]
    ) -> tuple[Canvas, dict[str, Any], tuple[int, int] | None]: ...


def _resized(manifest: Manifest, options: Mapping[str, Any]) -> tuple[Canvas, dict[str, Any], None]:
    """The canvas at the size that is drawn, and what the recipe says of it."""
    return *_canvas(manifest, options), None


def _as_it_is(
    manifest: Manifest, options: Mapping[str, Any]
) -> tuple[Canvas, dict[str, Any], tuple[int, int]]:
    """The picture itself, of any size, what the recipe says of it, and the size that is drawn."""
    from sdrt.runtime.pictures.canvas import Canvas
    from sdrt.runtime.pictures.reading import read_image

    image, size = read_image(options["image"]), checked_size(manifest, *_asked_size(options))
    return Canvas(image, None, size), picture_recipe(options, "image", image), size


def _to_enlarge(
    manifest: Manifest, options: Mapping[str, Any]
) -> tuple[Canvas, dict[str, Any], tuple[int, int]]:
    """The picture at the latents' size, what the recipe says of it, and the size that is drawn."""
    from sdrt.runtime.pictures.canvas import fit_to_enlarge
    from sdrt.runtime.pictures.reading import read_image

    image, (height, width) = read_image(options["image"]), _asked_size(options)
    factor = manifest.latents.factor
    canvas = fit_to_enlarge(image, manifest.limits, factor, height=height, width=width)
    rows, columns, _ = canvas.image.shape
    shown = {"height": height, "width": width, "output_size": list(canvas.crop)}  # as for a mask
    return canvas, {**picture_recipe(options, "image", image), **shown}, (factor * rows, factor * columns)


# Input of the U-Net → how the picture is brought to its size.
_AS_READ: Final[Mapping[str, _Bring]] = {
    CLASS_LABELS: _as_it_is,
    LOW_RES: _to_enlarge,
}


def _asked_size(options: Mapping[str, Any]) -> tuple[int | None, int | None]:
    height, width = (
        None if options.get(name) is None else whole(name, options[name]) for name in ("height", "width")
    )
    return height, width


def _noise_level(manifest: Manifest, given: object) -> int | None:
    if manifest.noising is None:
        return None
    level = manifest.record.noise_level if given is None else whole(NOISE_LEVEL, given)
    assert level is not None  # by the manifest's rules
    if not 0 <= level <= manifest.noising.max_level:
        raise UsageError(
            f"{NOISE_LEVEL} is {level}: allowed are whole numbers from 0 to {manifest.noising.max_level}"
        )
    return level


def picture_noise_shape(manifest: Manifest, picture: PictureTask | None) -> tuple[int, ...] | None:
    """The shape of an image's `PICTURE_NOISE`; None where there is none."""
    if picture is None or picture.noise_level is None:
        return None
    if picture.input == LOW_RES:
        rows, columns, channels = picture.canvas.image.shape
        return channels, rows, columns
    entry = manifest.components["unet"].spec.input(picture.input)
    assert entry is not None  # of its family
    width = entry.shape[1]
    assert isinstance(width, int)  # in every manifest that was read
    return (width // 2,)  # the other half says how much noise it is


def _check_encoder(manifest: Manifest) -> None:
    if "vae_encoder" not in manifest.components:
        raise UsageError("an image is given, but this bundle has no vae_encoder: export it again")


def _variation(options: Mapping[str, Any], *, masked: bool, has_prompt: bool) -> float | None:
    given = options.get("variation")
    if given is None:
        if has_prompt or masked or options.get("strength") is not None:
            return None
        given = DEFAULT_VARIATION
    for name in ("mask_image", "expand", "strength", "latents"):
        if options.get(name) is not None:
            raise UsageError(f"variation and {name} are given: a variation begins at the inverted picture")
    for name in ("timesteps", "sigmas"):
        if options.get(name) is not None:
            raise UsageError(
                f"variation and {name} are given: the inversion ends at the schedule's own start"
            )
    return share("variation", given)


def _strength(given: object, default: float) -> float:
    if given is None:
        return default
    strength = number("strength", given)
    if not 0.0 < strength <= 1.0:
        raise UsageError(
            f"strength is {given!r}: a number above 0, which would leave the picture as it is, to 1"
        )
    return strength


def _canvas(manifest: Manifest, options: Mapping[str, Any]) -> tuple[Canvas, dict[str, Any]]:
    """The canvas, and what the recipe says of it."""
    from sdrt.runtime.pictures.canvas import fit
    from sdrt.runtime.pictures.reading import read_image, read_mask

    image, given = read_image(options["image"]), options.get("mask_image")
    recipe = picture_recipe(options, "image", image)
    mask = None
    if given is not None:
        mask = read_mask(given, may_be_black=options.get("expand") is not None)
        recipe |= picture_recipe(options, "mask_image", mask)
    height, width = _asked_size(options)
    expand = options.get("expand")
    canvas = fit(image, manifest.limits, mask=mask, expand=expand, height=height, width=width)
    if canvas.mask is not None:
        # Sizes say here what the picture is resized to before anything else: if none was asked for, none is.
        recipe |= {"height": height, "width": width, "output_size": list(canvas.crop)}
    if expand is not None:
        recipe["expand"] = [int(pixels) for pixels in expand]
    return canvas, recipe


def picture_recipe(options: Mapping[str, Any], name: str, pixels: NDArray[Any]) -> dict[str, Any]:
    """A given picture in the recipe: the file's name as it was given, if it is one, and the pixels' SHA-256.

    Raises:
        UsageError: It is not the one that the options, of a recipe, say.
    """
    digest = pixels_sha256(pixels)
    check_pixels(options, name, digest)
    source = options[name]
    path = os.fsdecode(source) if isinstance(source, str | os.PathLike) else ""
    file = {name: path} if path.isprintable() and path else {}  # JSON holds no name that is not Unicode
    return {**file, f"{name.removesuffix('_image')}_sha256": digest}
