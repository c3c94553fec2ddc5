"""stable-diffusion-cpp-python as far as its worker knows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image
from support.fakes.fake_record import FAILS, note, pictures


class StableDiffusion:
    def __init__(self, **options: Any) -> None:
        note("StableDiffusion", **options)
        self.model = None if FAILS == "null" else object()

    def generate_image(
        self, progress_callback: Callable[[int, int, float], None], **options: Any
    ) -> list[Image.Image]:
        note("generate_image", **options)
        steps, images = options["sample_steps"], options["batch_count"]
        for _ in range(images):
            for step in range(steps):
                progress_callback(step + 1, steps, 0.1)
            for tile in range(steps + 3):  # the decoder's
                progress_callback(tile + 1, steps + 3, 0.1)
        found = pictures(images, options["height"], options["width"])
        return [Image.fromarray(picture).convert("RGBA") for picture in found]
