"""``make gallery``: what each option does to a picture, on one page, each picture with its command.

Every picture is drawn from the words of its command, by the parser of ``sd-run``, so a command on the page is
what made the picture above it. Pictures that commands start from lie beside the page.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from sdrt.benchmarks.gallery.page import page
from sdrt.benchmarks.gallery.sections import Entry, Section, sections
from sdrt.runtime.bundle.bundle import EMBEDDED
from sdrt.runtime.cli.main import DEFAULT_FPS
from sdrt.runtime.cli.options import interpolates, parsed, parser, pipeline_options
from sdrt.runtime.pictures.animation import animation_bytes, animation_recipe
from sdrt.runtime.pictures.writing import png_bytes
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.system.files import write_all_atomically, write_atomically


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the gallery and say where it is."""
    commands = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands.add_argument("--output", type=Path, default=Path("out/gallery"), help="a folder")
    arguments = commands.parse_args(argv)
    file = write_gallery(arguments.output, sections(), progress=print)
    print(f"look at {file.resolve()}")
    return 0


def write_gallery(
    folder: Path, wanted: list[Section], progress: Callable[[str], None] = lambda _: None
) -> Path:
    """Draw every entry with the embedded model, and write the page.

    Args:
        folder: Made if it is not there; a page in it is replaced.
        wanted: The sections; their entries are filled in.
        progress: Told the title of each section.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_all_atomically({folder / name: data for name, data in {**_masks(), **_loras()}.items()})
    with Pipeline.load(backend="onnxruntime-cpu") as pipeline:
        for section in wanted:
            progress(section.title)
            for entry in section.entries:
                _draw(pipeline, folder, entry)
    target = folder / "index.html"
    write_atomically(target, page(wanted, pipeline.bundle.manifest).encode())
    return target


def _draw(pipeline: Pipeline, folder: Path, entry: Entry) -> None:
    arguments = parsed(parser(), entry.words)
    options = {**pipeline_options(arguments), "output_type": "numpy"}
    (prompt,) = arguments.prompt or [None]
    with contextlib.chdir(folder):  # the commands, and so the recipes, name pictures that lie there
        if interpolates(arguments):
            del options["num_images_per_prompt"]
            ends = {"to_prompt": arguments.to_prompt, "to_seed": arguments.to_seed}
            output = pipeline.interpolate(prompt, frames=arguments.frames, **ends, **options)
        else:
            output = pipeline(prompt, **options)
    recipe = output.recipes[0]
    if interpolates(arguments):
        fps = arguments.fps or DEFAULT_FPS
        entry.encoded = animation_bytes(output.images, ".webp", fps, animation_recipe(recipe, fps))
    else:
        entry.encoded = png_bytes(Image.fromarray(output.images[0]), recipe)
    entry.picture = output.images[0]
    if entry.file is not None:
        write_atomically(folder / entry.file, entry.encoded)


def _masks() -> dict[str, bytes]:
    """Masks that the commands name: white is drawn."""

    def mask(draw: Callable[[ImageDraw.ImageDraw], None]) -> bytes:
        image = Image.new("L", (64, 64))
        draw(ImageDraw.Draw(image))
        stream = io.BytesIO()
        image.save(stream, format="PNG")
        return stream.getvalue()

    return {
        "right-half.png": mask(lambda draw: draw.rectangle((32, 0, 63, 63), fill=255)),
        "top-half.png": mask(lambda draw: draw.rectangle((0, 0, 63, 31), fill=255)),
        "middle.png": mask(lambda draw: draw.ellipse((16, 16, 47, 47), fill=255)),
    }


def _loras() -> dict[str, bytes]:
    """The embedded model's, as the commands name them."""
    return {path.name: path.read_bytes() for path in sorted((EMBEDDED.parent / "lora").glob("*.safetensors"))}


if __name__ == "__main__":
    sys.exit(main())
