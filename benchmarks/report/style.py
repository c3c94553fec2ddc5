"""The style sheet of a report's page: light and dark, phone and paper."""

import re
from typing import Final

# Subjects: after Okabe & Ito, whose colours colour-blind people tell apart, darker on white and lighter on
# black so that each has a contrast of 3:1 and more. Parts of a bar: shades of one hue, apart in greys, too.
_LIGHT: Final = """
  --paper: #ffffff; --ink: #1b1f24; --soft: #59616b; --line: #e1e5ea; --strong-line: #aeb6c0;
  --tint: #f5f7f9; --warn: #8a4b00; --warn-tint: #fff6e5; --bad: #a8201a;
  --s0: #0067b0; --s1: #c24e00; --s2: #007a5a; --s3: #a13d84; --s4: #7d6100; --s5: #2f7f9e; --s6: #3c4249;
  --p0: #16324f; --p1: #2f6697; --p2: #6ba6d3; --p3: #a3c7e3; --p4: #d4e4f1; --p5: #d9dce0;
  --q-dark: #ffffff; --q-middle: #16324f; --q-light: #16324f;
"""
_DARK: Final = """
  --paper: #13171c; --ink: #e8ebee; --soft: #a1abb6; --line: #2a3139; --strong-line: #56606b;
  --tint: #1b2128; --warn: #ffc96b; --warn-tint: #2c2312; --bad: #ff9a91;
  --s0: #5db7f5; --s1: #f58a4b; --s2: #3cc79d; --s3: #e592ca; --s4: #dcbf4e; --s5: #9adcf0; --s6: #cfd5db;
  --p0: #e3f0fb; --p1: #9ccbf0; --p2: #5d9fd3; --p3: #356f9f; --p4: #234a6b; --p5: #454d56;
  --q-dark: #10243a; --q-middle: #10243a; --q-light: #ffffff;
"""

SUBJECT_COLORS: Final = 7  # subjects that have a colour of their own; more begin again, with the next mark
# Black, which a drawing has where nothing else was said, is ink.
VARIABLES: Final = sorted(re.findall(r"--([\w-]+):", _LIGHT), key=lambda name: name != "ink")

STYLE: Final = (
    f":root {{ color-scheme: light dark; {_LIGHT} }}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}\n"
    """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1160px; padding: 2.5rem 1.5rem 4rem; background: var(--paper);
  color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1, h2, h3, h4, p, ul, dl, dd, figure { margin: 0; }
h1 { font-size: 2rem; line-height: 1.15; letter-spacing: -.02em; font-weight: 650; }
h2 { font-size: 1.5rem; line-height: 1.2; letter-spacing: -.015em; font-weight: 650;
  overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; line-height: 1.3; font-weight: 650; margin: 3rem 0 1rem; }
a { color: var(--s0); text-underline-offset: .15em; }
code { font: .88em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
small { font-size: .86em; color: var(--soft); }
.soft, .note { color: var(--soft); }
.note { font-size: .875rem; line-height: 1.5; max-width: 46rem; }
header p { margin-top: .6rem; max-width: 46rem; overflow-wrap: anywhere; }
.over { font-size: .8rem; letter-spacing: .06em; text-transform: uppercase; color: var(--soft);
  margin: 0 0 .5rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin-top: 1.1rem; font-size: .95rem; }
section { margin-top: 3.5rem; padding-top: 2rem; border-top: 1px solid var(--line); }
section > h2 + p { margin-top: .5rem; overflow-wrap: anywhere; }

.warnings { list-style: none; padding: .9rem 1.1rem; margin-top: 1.75rem; background: var(--warn-tint);
  border-left: 4px solid var(--warn); border-radius: 3px; }
.warnings li { padding-left: 1.5rem; text-indent: -1.5rem; overflow-wrap: anywhere; }
.warnings li + li { margin-top: .45rem; }
.warnings li::before { content: "▲"; color: var(--warn); display: inline-block; width: 1.5rem; text-indent: 0;
  font-size: .8em; }

.headlines { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr));
  gap: 1.5rem 2rem; margin: 2rem 0 2.25rem; }
.headlines dt { font-size: .875rem; color: var(--soft); }
.headlines .big { font-size: 2rem; line-height: 1.25; font-weight: 600; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.headlines .beside { font-size: .875rem; line-height: 1.45; }

.scroll { overflow-x: auto; margin: 1rem 0 .6rem; max-width: 100%; }
.note + .scroll, .scroll + .scroll { margin-top: 2.5rem; }
.scroll:focus-visible { outline: 2px solid var(--s0); outline-offset: 3px; }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.4; font-variant-numeric: tabular-nums;
  min-width: 100%; }
caption { text-align: left; font-weight: 650; padding: 0 0 .5rem; }
caption span { position: sticky; left: 0; }
th, td { padding: .5rem .6rem; text-align: right; vertical-align: baseline; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { white-space: normal; min-width: 3.5rem; vertical-align: bottom; font-size: .8rem; line-height: 1.3;
  font-weight: 500; color: var(--soft); border-bottom-color: var(--strong-line); }
.joined { padding-left: .2rem; }
th:first-child, td:first-child { padding-left: 0; }
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--paper); }
.words, th.words { text-align: left; }
td.words { white-space: normal; min-width: 8rem; }
td.long { min-width: 15rem; }
td.error { text-align: left; color: var(--bad); white-space: normal; }
td.error span { display: block; max-width: 34rem; overflow-wrap: anywhere; }
tr.ours > * { background: var(--tint); }
tr.ours th { font-weight: 650; }
tbody th.marked { padding-left: 1.2rem; text-indent: -1.2rem; }
.marked .key { margin-right: .45rem; text-indent: 0; }
.key { vertical-align: -.06em; overflow: visible; }

.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr));
  gap: 2.75rem 2.25rem; align-items: start; }
figure { min-width: 0; }
figcaption { margin-bottom: 1rem; }
figcaption h4 { font-size: .95rem; font-weight: 600; line-height: 1.35; }
figcaption p { font-size: .85rem; line-height: 1.45; color: var(--soft); margin-top: .2rem; }
figure > svg { display: block; width: 100%; max-width: 420px; height: auto; overflow: visible; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .15rem .9rem; margin-top: .8rem;
  font-size: .8rem; }
.swatch { display: inline-block; width: .75em; height: .75em; margin-right: .4em; border-radius: 1px; }

figure svg text { fill: var(--ink); font-variant-numeric: tabular-nums; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
.key path { fill: currentColor; }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); } .s3 { color: var(--s3); }
.s4 { color: var(--s4); } .s5 { color: var(--s5); } .s6 { color: var(--s6); }
.p0 { fill: var(--p0); background: var(--p0); } .p1 { fill: var(--p1); background: var(--p1); }
.p2 { fill: var(--p2); background: var(--p2); } .p3 { fill: var(--p3); background: var(--p3); }
.p4 { fill: var(--p4); background: var(--p4); } .p5 { fill: var(--p5); background: var(--p5); }

details { margin-top: 2rem; }
summary { cursor: pointer; font-weight: 500; padding: .35rem 0; }
pre { margin: .8rem 0 0; padding: .8rem 1rem; background: var(--tint); border-radius: 4px; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; }
footer { margin-top: 3.5rem; }

@media (max-width: 600px) {
  body { padding: 1.5rem 1rem 3rem; font-size: 15px; }
  h1 { font-size: 1.65rem; } h2 { font-size: 1.3rem; }
  section { margin-top: 2.5rem; padding-top: 1.5rem; }
  .headlines { grid-template-columns: 1fr 1fr; gap: 1.4rem 1.25rem; }
  .headlines .big { font-size: 1.6rem; }
  tbody th { min-width: 7.5rem; max-width: 9.5rem; font-size: .85rem; white-space: normal; }
}
@media print {
  @page { margin: 15mm 13mm; }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  nav { display: none; }
  section { margin-top: 1.5rem; padding-top: 1.2rem; }
  h2, h3, figcaption, caption { break-after: avoid; }
  figure, tr, .headlines, .warnings li { break-inside: avoid; }
  .figures { grid-template-columns: repeat(3, 1fr); gap: 1.5rem 1.2rem; }
  .scroll { overflow: visible; }
  .headlines { grid-template-columns: repeat(4, 1fr); gap: 1rem; }
  .headlines .big { font-size: 1.5rem; }
  .headlines dt, .headlines .beside, .note, figcaption p, .legend { font-size: 8pt; }
  table { font-size: 7.5pt; } thead th { font-size: 7pt; min-width: 0; }
  th, td { padding: .28rem .4rem; } tbody th { position: static; white-space: normal; }
  td.words { min-width: 0; }
  svg, .swatch, .warnings, tr.ours > * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  details { display: none; }
}
"""
)
