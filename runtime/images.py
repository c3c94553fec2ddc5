"""Pictures on disk: PNG with the whole recipe inside."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

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
    karras = recipe["karras"] or recipe.get("sigma_schedule") == "karras"
    sampler = _A1111_SAMPLERS.get(recipe["sampler"], recipe["sampler"])
    pairs = {
        "Steps": recipe["num_inference_steps"],
        "Sampler": sampler + (" Karras" if karras else ""),
        "CFG scale": recipe["guidance_scale"],
        "Seed": recipe["seed"],
        "Size": f"{recipe['width']}x{recipe['height']}",
        **({"Denoising strength": recipe["strength"]} if "strength" in recipe else {}),
        # A1111 counts the layer that it stops at, from the end.
        **({"Clip skip": recipe["clip_skip"] + 1} if "clip_skip" in recipe else {}),
        **({} if recipe["eta"] is None else {"Eta": recipe["eta"]}),
        "RNG": _A1111_GENERATORS[recipe["rng"]],
        "Model": recipe["model"],
        "Version": f"sdrt {recipe['version']}",
    }
    lines = [recipe["prompt"]]
    if recipe["negative_prompt"]:
        lines.append(f"Negative prompt: {recipe['negative_prompt']}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items()))
    return "\n".join(lines)


_A1111_SAMPLERS: Final = {
    "ddim": "DDIM",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "lcm": "LCM",
    "lms": "LMS",
    "pndm": "PLMS",
    "tcd": "TCD",
    "unipc": "UniPC",
}
# "NV" is its name for Philox on any device.
_A1111_GENERATORS: Final = {"philox": "NV", "cpu": "CPU"}


def _quoted(value: object) -> str:
    """As A1111 does it: a value that would break the line apart is written as a JSON string."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text


def save_png(image: Image, path: str | Path, recipe: Mapping[str, Any]) -> None:
    """Write a picture and its recipe; whole or not at all.

    Raises:
        OutputError: The file cannot be written.
    """
    write_atomically(Path(path), png_bytes(image, recipe))


def slug(prompt: str, limit: int = 40) -> str:
    """A file name from a prompt: its letters and digits of any script, joined by dashes.

    At most ``limit`` characters; a file name may have 255 bytes, and a character takes up to four.
    """
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", prompt).lower())
    return words.strip("-")[:limit].strip("-") or "picture"
