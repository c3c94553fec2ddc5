"""Draw the pictures of the README with the embedded model.

    python examples/readme_pictures.py docs/images

One call draws thirty prompts. A second picture shows what can be done with pictures: start from one, draw
inside a mask, walk from one prompt to another. A third shows the LoRAs of `models/emoji/lora`. The same
command draws the same sheets, but for rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdrt.runtime import Pipeline

LORAS = Path(__file__).parents[1] / "models" / "emoji" / "lora"
PROMPTS = """
a red apple, a slice of watermelon, a strawberry, a donut with icing, a cupcake, a pizza, a cup of hot coffee,
a fried egg, a red mushroom with white spots, a cactus, a cat, a fox face, a panda face, an owl,
a black and white penguin, a turtle, a dinosaur with a long neck, a blue whale, a butterfly, a ladybug,
a cool face, a robot, an alien, a red car, a steam train, a flying helicopter, a sailboat, a small house,
a guitar, an open umbrella
"""
STYLED = (
    *("a red apple", "a cat face", "a panda face", "an owl", "a clown face"),
    *("a red car", "a house", "a yellow star", "a guitar"),
)
COLUMNS, TILE, GAP, LABEL = 10, 96, 12, 28  # tiles in a row; pixels


def sheet_of(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures row by row on white."""
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, rows * (TILE + GAP) + GAP), "white")
    for place, picture in enumerate(pictures):
        left, top = (GAP + at * (TILE + GAP) for at in (place % COLUMNS, place // COLUMNS))
        sheet.paste(picture.resize((TILE, TILE), Image.Resampling.LANCZOS), (left, top))
    return sheet


def strip_of(groups: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Groups of pictures side by side, an arrow before each group's last, its label below."""
    strip = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, TILE + LABEL + 2 * GAP), "white")
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(size=20)
    tiles = sum(len(pictures) for _, pictures in groups)
    space = (strip.width - 2 * GAP - tiles * TILE - (tiles - len(groups)) * GAP) // (len(groups) - 1)
    left = GAP
    for label, pictures in groups:
        begin = left
        for number, picture in enumerate(pictures):
            if number:
                x, y = left - GAP // 2, GAP + TILE // 2
                pen.polygon([(x - 3, y - 5), (x - 3, y + 5), (x + 4, y)], "gray")
            strip.paste(picture.resize((TILE, TILE), Image.Resampling.LANCZOS), (left, GAP))
            left += TILE + GAP
        pen.text(((begin + left - GAP) // 2, GAP + TILE + 6), label, "dimgray", font, "ma")
        left += space - GAP
    return strip


def from_pictures(pipeline: Pipeline) -> list[tuple[str, list[Image.Image]]]:
    """What the commands of the README do to pictures."""
    cat, apple = pipeline(["a cat face", "a red apple"], seed=[3, 3]).images
    mask = Image.new("L", cat.size)
    mask.paste(255, (0, 0, cat.width, cat.height // 2))  # the upper half
    green = pipeline("a green apple", image=apple, strength=0.6, seed=3).images
    hat = pipeline("a top hat", image=cat, mask_image=mask, seed=3).images
    frames = pipeline.interpolate("a red car", "a bus", frames=17, seed=3).images
    return [
        ("start from a picture", [apple, *green]),
        ("draw inside a mask", [cat, *hat]),
        ("go from a red car to a bus", [frames[0], *frames[7:10], frames[-1]]),
    ]


def with_loras(pipeline: Pipeline) -> list[Image.Image]:
    """A row as it is and a row in each style; the last column is a word that one of them teaches."""
    rows: list[Image.Image] = []
    for style in (None, "delft", "outline"):
        worn = {} if style is None else {str(LORAS / f"{style}.safetensors"): 1.0}
        rows += pipeline(list(STYLED), seed=3, guidance_scale=3.0, loras=worn).images
        taught = {**worn, str(LORAS / "wizard.safetensors"): 1.0}
        rows += pipeline("a wizard", seed=3, guidance_scale=3.0, loras=taught).images
    return rows


def main() -> int:
    """Draw and save all."""
    if len(sys.argv) != 2:
        sys.stderr.write(f"usage: {sys.argv[0]} FOLDER\n")
        return 2
    folder = Path(sys.argv[1])
    prompts = [" ".join(prompt.split()) for prompt in PROMPTS.split(",")]
    with Pipeline.load() as pipeline:
        output = pipeline(prompts, seed=1, num_inference_steps=20, guidance_scale=5.0)
        sheet_of(output.images).save(folder / "emoji.webp", quality=88)
        strip_of(from_pictures(pipeline)).save(folder / "from-pictures.webp", quality=88)
        sheet_of(with_loras(pipeline)).save(folder / "lora.webp", quality=88)
    return 0


if __name__ == "__main__":
    sys.exit(main())
