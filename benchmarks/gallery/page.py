"""The gallery as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import sdrt
from sdrt.runtime.bundle.manifest import Manifest

if TYPE_CHECKING:
    from sdrt.benchmarks.gallery.sections import Entry, Section

SCALE = 2  # a picture of 64 pixels is small


def page(sections: Sequence[Section], manifest: Manifest) -> str:
    """The whole page; every entry must have been drawn."""
    links = " ".join(f'<a href="#{_anchor(part.title)}">{html.escape(part.title)}</a>' for part in sections)
    body = "\n".join(map(_section, sections))
    model = html.escape(str(manifest.provenance.get("source", "the embedded model")))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sdrt: gallery</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>What each option does</h1>
<p>Drawn by sdrt {sdrt.__version__} with its embedded model ({model}) on the CPU. Under each picture is the
command that draws it; pictures that commands start from lie beside this page.</p>
<nav>{links}</nav>
</header>
{body}
</body>
</html>
"""


def _section(section: Section) -> str:
    columns = f' style="--columns: {section.columns}"' if section.columns else ""
    kind = "rows" if section.columns else "flow"
    figures = "\n".join(map(_figure, section.entries))
    return f"""<section id="{_anchor(section.title)}">
<h2>{html.escape(section.title)}</h2>
<p>{html.escape(section.about)}</p>
<div class="{kind}"{columns}>
{figures}
</div>
</section>"""


def _figure(entry: Entry) -> str:
    if entry.picture is None:
        raise ValueError(f"{entry.command} was not drawn")
    height, width = entry.picture.shape[:2]
    kind = "webp" if entry.encoded.startswith(b"RIFF") else "png"
    data = base64.b64encode(entry.encoded).decode("ascii")
    caption = html.escape(entry.caption)
    return (
        f'<figure><img src="data:image/{kind};base64,{data}" width="{width * SCALE}" '
        f'height="{height * SCALE}" alt="{caption}">'
        f"<figcaption>{caption}<code>{html.escape(entry.command)}</code></figcaption></figure>"
    )


def _anchor(title: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1180px; padding: 1rem; }
h1 { margin: .5rem 0; } h2 { margin: 2.5rem 0 .25rem; border-top: 1px solid var(--line); padding-top: 1rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem .9rem; }
.flow, .rows { display: grid; gap: 1rem; }
.flow { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.rows { grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); max-width: 620px; }
figure { margin: 0; min-width: 0; }
img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 4px; }
figcaption { margin-top: .3rem; }
code { display: block; font-size: 11px; line-height: 1.35; overflow-wrap: anywhere; background: var(--soft);
  border-radius: 3px; padding: .2rem .35rem; margin-top: .2rem; max-height: 9em; overflow: auto; }
"""
