"""The page of a report: well formed, self-contained, escaped, and how a browser shows it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.fakes.example_document import (
    ERROR,
    SUBJECTS,
    document,
    document_without_measurements,
    small_document,
)
from support.runs.browsers import chromium

from sdrt.benchmarks.document.document import Ceilings, Document, Subject, read
from sdrt.benchmarks.report.page import page
from sdrt.benchmarks.report.style import STYLE
from sdrt.benchmarks.report.writing import write_report
from sdrt.runtime.errors import OutputError

SLY = '</title><script>alert("1")</script>&amp; <b>'
VOID = {"meta", "br", "link", "img"}
# What the browser made of each frame: told through the title of the page around them.
MEASURE = """<script>addEventListener("load", () => {
  document.title = JSON.stringify([...document.querySelectorAll("iframe")].map((frame) => {
    const view = frame.contentWindow, page = frame.contentDocument;
    const sizes = [...page.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect());
    const texts = [...page.querySelectorAll("figure svg text")].map((t) => t.getBoundingClientRect());
    return {
      width: view.innerWidth, overflow: page.documentElement.scrollWidth - view.innerWidth,
      dark: getComputedStyle(page.body).backgroundColor !== "rgb(255, 255, 255)",
      drawings: sizes.length, empty: sizes.filter((size) => !(size.width > 8 && size.height > 8)).length,
      outside: texts.filter((text) => text.left < 0 || text.right > view.innerWidth).length,
      least: Math.min(...texts.map((text) => text.height)),
      tables: [...page.querySelectorAll(".scroll")].filter(
        (box) => box.getBoundingClientRect().right > view.innerWidth).length,
    };
  }));
});</script>"""


class Checker(HTMLParser):
    """Every element closed in its order; keeps names, attributes and identifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    return checker


def seven_subjects() -> Document:
    """With labels as long and as sly as they come."""
    example = document()
    more = [Subject(f"peer-{number}", f"{SLY} {number}, a long label", "peer") for number in (1, 2)]
    copies = tuple(
        replace(entry, subject=peer.name)
        for peer in more
        for entry in example.measurements
        if entry.subject == "optimum-onnx"
    )
    subjects = (*example.subjects, *more)
    return replace(example, subjects=subjects, measurements=example.measurements + copies, complete=False)


def variants() -> Iterator[Document]:
    example = document()
    yield example
    yield seven_subjects()
    ours = tuple(entry for entry in example.measurements if entry.subject == SUBJECTS[0].name)
    yield replace(example, subjects=SUBJECTS[:1], measurements=ours, failures=(), ceilings=())
    yield replace(example, measurements=())
    yield replace(example, measurements=example.measurements[:1])
    yield replace(example, measurements=(replace(example.measurements[0], values=(), rounds=()),))
    odd: tuple[tuple[float | None, ...], ...] = ((0.0,) * 7, (None,) * 7, (1e-12, 1e15) + (1.0,) * 5)
    yield replace(
        example,
        measurements=tuple(
            replace(entry, values=odd[number % 3]) if len(entry.values) == 7 else entry
            for number, entry in enumerate(example.measurements)
        ),
        ceilings=(Ceilings(0, 0, ""),),
    )
    yield small_document()
    yield replace(document_without_measurements(), subjects=(), complete=False)


def test_pages_of_all_kinds_of_runs_are_well_formed_and_need_nothing_else() -> None:
    for variant in variants():
        text = page(variant)
        elements = checked(text).elements
        names = {name for name, _ in elements}
        assert not names & {"script", "link", "img", "iframe", "object", "b"}
        assert "://" not in text
        assert "url(" not in text.replace("url(#", "")
        assert "@import" not in text
        assert not re.search(r'="[^"]*\b(nan|inf)\b', text)
        ids = [str(attributes["id"]) for _, attributes in elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        targets = {str(a["href"])[1:] for _, a in elements if "href" in a}
        assert targets <= set(ids)


def test_drawings_and_tables_can_be_read_aloud() -> None:
    text = page(document())
    drawings = [a for name, a in checked(text).elements if name == "svg" and a.get("aria-hidden") != "true"]
    assert len(drawings) == 2 * 11  # both models: three bars, three distributions, three curves, two limits
    assert all(entry["role"] == "img" and entry["aria-label"] for entry in drawings)
    assert text.count('<svg role="img"') == len(
        re.findall(r'<svg role="img"[^>]*><title>[^<]+</title>', text)
    )
    assert len(re.findall("<table><caption>", text)) == text.count("<table>")
    assert all("scope" in attributes for name, attributes in checked(text).elements if name == "th")


def test_the_page_shows_what_was_found() -> None:
    text = page(document())
    assert html.escape(ERROR) in text
    assert "--report &#x27;out/report &amp; more&#x27;" in text
    assert "The machine was noisy" in text
    assert text.index("Warnings") < text.index('<section id="model-emoji"')
    assert re.search(r"0\.4\d × the fastest peer, OpenVINO GenAI \(2\.\d\d s\)", text)
    assert re.search(r"<td class=\"joined\">0\.1\d <small>\(0\.1\d–0\.1\d\)</small>", text)
    assert "Nothing was measured." in page(replace(document(), measurements=()))


def test_nothing_in_a_document_becomes_an_element() -> None:
    example = document()
    model = replace(example.models[0], name=SLY, source=SLY, prompt=SLY, sampler=SLY)
    named = tuple(
        replace(entry, model=SLY) if entry.model == "emoji" else entry for entry in example.measurements
    )
    machine = replace(example.machine, cpu=SLY, system=SLY, python=SLY, gpus=(SLY,))
    subject = replace(SUBJECTS[0], label=SLY, versions={SLY: SLY}, notes=(SLY,))
    text = page(
        replace(
            seven_subjects(),
            models=(model, *example.models[1:]),
            measurements=named,
            machine=machine,
            subjects=(subject, *SUBJECTS[1:]),
            created=SLY,
            sdrt=SLY,
            command=(SLY,),
        )
    )
    plain = checked(page(example)).elements
    assert {name for name, _ in checked(text).elements} == {name for name, _ in plain}
    assert "alert(&quot;1&quot;)" in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_letters_have_contrast(scheme: str) -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1 for letters."""
    blocks = re.findall(r":root \{([^}]*--paper[^}]*)\}", STYLE)
    colors = dict(re.findall(r"--([\w-]+): (#\w{6})", blocks[scheme == "dark"]))
    for name in ("ink", "soft", "warn", "bad", *(f"s{index}" for index in range(7))):
        assert contrast(colors[name], colors["paper"]) >= 4.5, name
    assert contrast(colors["ink"], colors["warn-tint"]) >= 4.5
    for shade, inside in enumerate(("q-dark", "q-dark", "q-middle", "q-light", "q-light")):
        assert contrast(colors[f"p{shade}"], colors[inside]) >= 4.5, shade


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of relative luminances."""

    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_three_files_are_written_and_the_data_come_back(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "report"
    example = replace(document(), command=("sd-bench", "\udcff"))
    write_report(example, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "report.json", "report.md"]
    assert read(folder / "report.json") == example
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="file"):
        write_report(example, tmp_path / "file")


def test_a_browser_shows_it_on_phone_and_desk_in_light_and_dark(browser: str, tmp_path: Path) -> None:
    """Each in a frame of its own, whose width and colour scheme the page sees as those of its window."""
    views = [(width, scheme) for width in (360, 1200) for scheme in ("light", "dark")]
    text = html.escape(page(seven_subjects()))
    look = "height:900px;border:0"
    frames = [
        f'<iframe style="width:{width}px;{look};color-scheme:{scheme}" srcdoc="{text}"></iframe>'
        for width, scheme in views
    ]
    around = tmp_path / "around.html"
    around.write_text("<!doctype html><title></title>" + "".join(frames) + MEASURE, encoding="utf-8")
    dom = chromium(browser, tmp_path / "profile", "--window-size=1300,900", "--dump-dom", around.as_uri())
    title = re.search("<title>(.*?)</title>", dom)
    assert title
    found = json.loads(html.unescape(title[1]))
    assert [(view["width"], view["dark"]) for view in found] == [(w, s == "dark") for w, s in views]
    for view in found:
        assert view["overflow"] <= 0
        assert view["drawings"] > 22
        assert (view["empty"], view["outside"], view["tables"]) == (0, 0, 0)
        assert view["least"] >= 11  # the height of a line of the smallest letters
