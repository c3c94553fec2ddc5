"""The gallery: its commands, its page, and how a browser shows it."""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.runs.browsers import chromium

from sdrt.benchmarks.gallery.sections import SAMPLER_STEPS, Section
from sdrt.runtime.cli.main import main as sd_run
from sdrt.runtime.samplers.registry import SAMPLERS

Gallery = tuple[Path, list[Section]]
# Appended to a copy of the page: what the browser made of it, as attributes that --dump-dom prints.
REPORT = """<script>addEventListener("load", () => {
  const images = [...document.images], root = document.documentElement;
  root.dataset.shown = images.filter((image) => image.complete && image.naturalWidth > 0).length;
  root.dataset.images = images.length;
  root.dataset.overflow = root.scrollWidth - root.clientWidth;
});</script>"""


def test_every_sampler_and_every_task_is_there(gallery: Gallery) -> None:
    text = gallery[0].read_text(encoding="utf-8")
    for sampler in SAMPLERS:
        for steps in SAMPLER_STEPS:
            assert f"--sampler {sampler} --steps {steps} " in text
    for option in (
        "--negative-prompt",
        "--strength 0.1",
        "--strength 1",
        "--mask",
        "--expand",
        "--variation",
    ):
        assert option in text
    for option in ("--to-prompt", "--to-seed", "--guidance-scale 12", "--guidance-scale 1<"):
        assert option in text
    assert len(re.findall("<figure>", text)) == sum(len(section.entries) for section in gallery[1])


@pytest.mark.parametrize("title", ["Prompts", "Image to image", "Outpainting", "Interpolation"])
def test_a_command_of_the_page_draws_its_picture(
    gallery: Gallery, title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (section,) = (section for section in gallery[1] if section.title == title)
    entry = section.entries[0]
    command = shlex.split(entry.command)
    assert html.escape(entry.command) in gallery[0].read_text(encoding="utf-8")
    assert command[0] == "sd-run"
    words = command[1 : command.index("--output")] if entry.file else command[1:]
    monkeypatch.chdir(gallery[0].parent)
    suffix = ".webp" if title == "Interpolation" else ".png"
    target = tmp_path / f"again{suffix}"
    assert sd_run([*words, "--quiet", "--backend", "onnxruntime-cpu", "--output", str(target)]) == 0
    assert entry.picture is not None
    with Image.open(target) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), entry.picture)
    assert target.read_bytes() == entry.encoded


@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_every_picture_and_nothing_sticks_out(
    gallery: Gallery, browser: str, tmp_path: Path, width: int
) -> None:
    page = tmp_path / "page.html"
    page.write_text(gallery[0].read_text(encoding="utf-8") + REPORT, encoding="utf-8")
    size = f"--window-size={width},2000"
    dom = chromium(
        browser, tmp_path / "profile", size, "--virtual-time-budget=10000", "--dump-dom", page.as_uri()
    )
    told = dict(re.findall(r'data-(\w+)="(-?\d+)"', dom[:1000]))
    count = sum(len(section.entries) for section in gallery[1])
    assert told == {"shown": str(count), "images": str(count), "overflow": "0"}


def test_the_screenshot_shows_the_first_picture(gallery: Gallery, browser: str, tmp_path: Path) -> None:
    target = tmp_path / "page.png"
    chromium(
        browser,
        tmp_path / "profile",
        "--window-size=1200,900",
        f"--screenshot={target}",
        gallery[0].as_uri(),
    )
    with Image.open(target) as image:
        shown = np.asarray(image.convert("RGB")).astype(int)
    assert shown.shape == (900, 1200, 3)
    red = (shown[..., 0] > 180) & (shown[..., 1] < 110) & (shown[..., 2] < 90)
    assert red.sum() > 3000  # the apple, at twice its size, and the car
