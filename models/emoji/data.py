"""The training pictures and their captions.

Pictures: Noto emoji (Apache-2.0) as 64-pixel PNGs, from the npm package named below. They are fetched
once, checked against the hash written here, and kept in the cache folder as one safetensors file.
Captions: `captions.tsv`, one line per emoji the model is to draw.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

PACKAGE = "emoji-datasource-google@16.0.0"
INTEGRITY = "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="
IMAGE_SIZE = 64
CAPTIONS_FILE = Path(__file__).parent / "captions.tsv"

# "{}" is the phrase with its article, "{bare}" the phrase without it.
TEMPLATES = (
    "{}",
    "{bare}",
    "a picture of {}",
    "an emoji of {}",
    "a drawing of {}",
    "{bare} emoji",
)
# Prompts for a whole group of emoji: "a fruit" is drawn as any fruit.
GROUP_PROMPTS = {
    "fruit": "a fruit",
    "vegetable": "a vegetable",
    "food": "food",
    "drink": "a drink",
    "animal": "an animal",
    "face": "a face",
    "vehicle": "a vehicle",
    "plant": "a plant",
    "sky": "something in the sky",
    "building": "a building",
    "sport": "a sport",
    "object": "an object",
}
ARTICLES = ("a ", "an ", "the ")


@dataclass(frozen=True)
class Emoji:
    """One line of the captions table.

    `code` is the code point sequence as the data set writes it (`1F34E`), `group` a key of
    `GROUP_PROMPTS`, `phrases` the canonical caption followed by its alternates.
    """

    code: str
    group: str
    phrases: tuple[str, ...]

    @property
    def caption(self) -> str:
        """The canonical caption."""
        return self.phrases[0]

    def prompts(self) -> list[str]:
        """Every wording of this emoji: each phrase in each template, without repeats."""
        worded = [
            template.format(phrase, bare=without_article(phrase))
            for phrase in self.phrases
            for template in TEMPLATES
        ]
        return list(dict.fromkeys(worded))


def without_article(phrase: str) -> str:
    """`"a red apple"` → `"red apple"`."""
    for article in ARTICLES:
        if phrase.startswith(article):
            return phrase[len(article) :]
    return phrase


def read_captions(path: Path = CAPTIONS_FILE) -> list[Emoji]:
    """The captions table, in file order."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [
        Emoji(
            code=row["code"],
            group=row["group"],
            phrases=(row["caption"], *filter(None, row["alternates"].split("|"))),
        )
        for row in rows
    ]


def cache_folder() -> Path:
    """Where downloads and training state are kept: `$SDRT_CACHE/emoji` or `~/.cache/sdrt/emoji`."""
    root = Path(os.environ.get("SDRT_CACHE", Path.home() / ".cache" / "sdrt"))
    return root / "emoji"


def fetch_package(folder: Path) -> Path:
    """The package's archive, downloaded by npm if it is not in `folder`, and checked.

    Raises `ValueError` if the archive's SHA-512 is not the one this recipe was written for.
    """
    archive = folder / (PACKAGE.replace("@", "-") + ".tgz")
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True)
    digest = hashlib.sha512(archive.read_bytes()).digest()
    if "sha512-" + base64.b64encode(digest).decode() != INTEGRITY:
        raise ValueError(f"{archive} is not {PACKAGE}: its SHA-512 differs; delete it and try again")
    return archive


def on_white(png: bytes) -> np.ndarray:
    """A PNG with transparency composed on white: [64, 64, 3] uint8."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))


def unpack_images(archive: Path) -> dict[str, torch.Tensor]:
    """Every emoji without skin-tone variants: code → [3, 64, 64] uint8."""
    with tarfile.open(archive) as tar:
        listing = tar.extractfile("package/emoji.json")
        assert listing is not None
        codes = {entry["image"]: entry["unified"] for entry in json.load(listing)}
        images = {}
        for member in tar:
            name = Path(member.name)
            if name.parts[1:-1] != ("img", "google", "64") or name.name not in codes:
                continue
            file = tar.extractfile(member)
            assert file is not None
            pixels = torch.from_numpy(on_white(file.read()).copy())
            images[codes[name.name]] = pixels.permute(2, 0, 1).contiguous()
    return images


def load_images(cache: Path | None = None) -> dict[str, torch.Tensor]:
    """All emoji, code → [3, 64, 64] uint8, fetched on first use."""
    cache = cache or cache_folder()
    file = cache / "images.safetensors"
    if not file.exists():
        part = file.with_suffix(".part")
        save_file(unpack_images(fetch_package(cache / "download")), part)
        part.rename(file)
    images: dict[str, torch.Tensor] = load_file(file)
    return images


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 pixels → float32 in [-1, 1], the range the autoencoder works in."""
    return images.float() / 127.5 - 1.0
