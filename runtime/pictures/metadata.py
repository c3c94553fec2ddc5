"""The recipe inside a picture's file: where A1111's web UI looks for it, and as JSON for sdrt itself.

======  =======================================  ==============================
file    A1111's text                             JSON
======  =======================================  ==============================
PNG     text chunk ``parameters``                text chunk ``sdrt``
JPEG    EXIF user comment                        XMP property ``sdrt:recipe``
WebP    EXIF user comment                        XMP property ``sdrt:recipe``
======  =======================================  ==============================
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from xml.sax.saxutils import escape, unescape

from sdrt.runtime.errors import UsageError
from sdrt.runtime.lora.weights import short_name

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

TEXT_KEY: Final = "parameters"  # of PNG, as A1111's web UI has it
JSON_KEY: Final = "sdrt"
RECIPE_NAMESPACE: Final = "urn:sdrt:recipe"  # of the XMP property `recipe`
FORMATS: Final = ("PNG", "JPEG", "WEBP")  # that hold a recipe
_USER_COMMENT: Final = 0x9286  # EXIF's tag, where A1111's web UI keeps `parameters` in a JPEG or WebP
_EXIF_IFD: Final = 0x8769
_LONG, _UNDEFINED = 4, 7  # TIFF's types
_FIRST, _SECOND = 8, 26  # where the directories begin
_MOST: Final = 16 << 20  # bytes of metadata that are looked at
_IN_XMP: Final = re.compile(rb"<sdrt:recipe>(.*?)</sdrt:recipe>", re.DOTALL)
# "NV" is its name for Philox on any device.
_A1111_GENERATORS: Final = {"philox": "NV", "cpu": "CPU"}


def parameters_text(recipe: Mapping[str, Any]) -> str:
    """The recipe in A1111's form: prompt, negative prompt, then ``Key: value`` pairs on one line."""
    # With NumPy, which the look at an output need not wait for.
    from sdrt.runtime.samplers.registry import a1111_name

    height, width = recipe.get("output_size") or (recipe["height"], recipe["width"])
    pairs = {
        "Steps": recipe["num_inference_steps"],
        "Sampler": a1111_name(recipe["sampler"], recipe),
        # It has one for all steps.
        **({"CFG scale": recipe["guidance_scale"]} if isinstance(recipe["guidance_scale"], float) else {}),
        "Seed": recipe["seed"],
        "Size": f"{width}x{height}",
        **({"Denoising strength": recipe["strength"]} if "strength" in recipe else {}),
        # A1111 counts the layer that it stops at, from the end.
        **({"Clip skip": recipe["clip_skip"] + 1} if "clip_skip" in recipe else {}),
        **({} if recipe["eta"] is None else {"Eta": recipe["eta"]}),
        "RNG": _A1111_GENERATORS[recipe["rng"]],
        **({"Lora hashes": _lora_hashes(recipe["lora_hashes"])} if recipe.get("lora_hashes") else {}),
        "Model": recipe["model"],
        "Version": f"sdrt {recipe['version']}",
    }
    lines = [f"{recipe['prompt']}{_lora_tags(recipe.get('loras', {}))}"]
    if recipe["negative_prompt"]:
        lines.append(f"Negative prompt: {recipe['negative_prompt']}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items()))
    return "\n".join(lines)


def _lora_tags(loras: Mapping[str, Any]) -> str:
    """LoRAs that the prompt does not ask for, as A1111's prompts do."""
    tags = []
    for name, weight in loras.items():
        weights = (weight["text_encoder"], weight["unet"]) if isinstance(weight, Mapping) else (weight,)
        tags.append(f" <lora:{short_name(name)}:{':'.join(f'{one:g}' for one in weights)}>")
    return "".join(tags)


def _lora_hashes(hashes: Mapping[str, str]) -> str:
    """As ``extra_networks_lora.py`` has them: without what would break the list apart."""
    named = ((name.replace(":", "").replace(",", ""), digest) for name, digest in hashes.items())
    return ", ".join(f"{name}: {digest}" for name, digest in named)


def png_text(recipe: Mapping[str, Any]) -> PngInfo:
    """Two text chunks: tEXt where the text is Latin-1, which every program reads, and iTXt elsewhere."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(TEXT_KEY, parameters_text(recipe).replace("\0", "�"))  # no chunk of text may hold a NUL
    info.add_text(JSON_KEY, json.dumps(recipe, ensure_ascii=False, sort_keys=True))
    return info


def exif(recipe: Mapping[str, Any]) -> bytes:
    """A1111's text as EXIF user comment, without the marker ``Exif`` that a JPEG has before it."""
    comment = b"UNICODE\0" + parameters_text(recipe).encode("utf-16-be", "replace")
    # TIFF 6.0: a head and two directories of one entry each. Pillow's own would say that the comment's bytes
    # are numbers, where EXIF (and who reads it for A1111's web UI) wants the type "undefined".
    head = struct.pack(">2sHI", b"MM", 42, _FIRST)
    first = struct.pack(">HHHIII", 1, _EXIF_IFD, _LONG, 1, _SECOND, 0)
    second = struct.pack(">HHHIII", 1, _USER_COMMENT, _UNDEFINED, len(comment), _SECOND + len(first), 0)
    return head + first + second + comment


def xmp(recipe: Mapping[str, Any]) -> bytes:
    """The recipe in an XMP packet; ASCII, since XML allows fewer characters than a prompt may have."""
    text = escape(json.dumps(recipe, sort_keys=True))
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" xmlns:sdrt="{RECIPE_NAMESPACE}">'
        f"<sdrt:recipe>{text}</sdrt:recipe></rdf:Description></rdf:RDF></x:xmpmeta>"
    ).encode("ascii")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe that sdrt wrote into a picture.

    Args:
        path: A PNG, JPEG or WebP, moving or not.

    Returns:
        See `sdrt.runtime.request.output.PipelineOutput.recipes`. It came from outside: nothing in it is
        checked yet.

    Raises:
        UsageError: No such file, no picture, or none with a recipe.
    """
    from sdrt.runtime.pictures.reading import opened_picture
    from sdrt.runtime.system.untrusted import parse_json

    with opened_picture(path, "--from", FORMATS) as image:
        text = image.info.get(JSON_KEY)
        packet = image.info.get("xmp")
    if text is None and isinstance(packet, bytes) and (found := _IN_XMP.search(packet[:_MOST])):
        text = unescape(found[1].decode("utf-8", "replace"))
    if not isinstance(text, str):
        raise UsageError(
            f"{path} holds no recipe of sdrt: another program made it, or one that keeps no metadata saved it"
        )
    try:
        recipe = parse_json(text[:_MOST])
        if not isinstance(recipe, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise UsageError(f"the recipe in {path} is damaged: {error}") from None
    return recipe


def _quoted(value: object) -> str:
    """As A1111 does it: a value that would break the line apart is written as a JSON string."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text
