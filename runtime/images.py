"""Pictures on disk: PNG with the whole recipe inside."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdrt.runtime.files import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image


def png_bytes(image: Image, recipe: Mapping[str, Any]) -> bytes:
    """Encode a picture as PNG with two text chunks.

    ``parameters`` is the text that A1111's web UI writes and reads; ``sdrt`` is the recipe as JSON.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("parameters", parameters_text(recipe))
    info.add_itxt("sdrt", json.dumps(recipe, ensure_ascii=False, sort_keys=True))
    stream = io.BytesIO()
    image.save(stream, format="PNG", pnginfo=info)
    return stream.getvalue()


def parameters_text(recipe: Mapping[str, Any]) -> str:
    """The recipe in A1111's form: prompt, negative prompt, then ``Key: value`` pairs on one line."""
    names = {
        "dpmpp_2m": "DPM++ 2M",
        "euler": "Euler",
        "ddim": "DDIM",
    }
    sampler = names.get(recipe["sampler"], recipe["sampler"]) + (" Karras" if recipe["karras"] else "")
    pairs = {
        "Steps": recipe["num_inference_steps"],
        "Sampler": sampler,
        "CFG scale": recipe["guidance_scale"],
        "Seed": recipe["seed"],
        "Size": f"{recipe['width']}x{recipe['height']}",
        "RNG": {"philox": "GPU", "cpu": "CPU"}[recipe["rng"]],
        "Model": recipe["model"],
        "Version": f"sdrt {recipe['version']}",
    }
    lines = [recipe["prompt"]]
    if recipe["negative_prompt"]:
        lines.append(f"Negative prompt: {recipe['negative_prompt']}")
    lines.append(", ".join(f"{key}: {value}" for key, value in pairs.items()))
    return "\n".join(lines)


def save_png(image: Image, path: Path, recipe: Mapping[str, Any]) -> None:
    """Write a picture and its recipe; whole or not at all.

    Raises:
        OutputError: The file cannot be written.
    """
    write_atomically(path, png_bytes(image, recipe))


def slug(prompt: str, limit: int = 40) -> str:
    """A file name from a prompt: ASCII letters, digits and dashes, at most ``limit`` characters."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:limit].strip("-") or "picture"
