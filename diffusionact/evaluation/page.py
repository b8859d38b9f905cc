"""The frame of our pages, light and dark, and the one plot they have. Nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np
import numpy.typing as npt

WIDTH, ROW, LEFT, RIGHT = 520, 26, 170, 16

STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --text: #1d1f21; --soft: #666b70;
  --line: #dcdedf; --accent: #2860b0; --fill: #2860b026; --warn: #a1460a; }
@media (prefers-color-scheme: dark) { :root { --back: #16181a; --text: #e4e6e7;
  --soft: #9aa0a5; --line: #34383b; --accent: #7fb0f0; --fill: #7fb0f033; --warn: #f0a060; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 84rem; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
.lead, p, li, figcaption { color: var(--soft); } p { margin: .3rem 0 .8rem; }
li b { color: var(--text); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .45rem .6rem; text-align: right; white-space: nowrap; vertical-align: top; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--back); }
thead th { white-space: normal; min-width: 4.2rem; color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
td small { display: block; color: var(--soft); font-size: .74rem; }
td.none { color: var(--soft); } td b { color: var(--accent); }
.published th, .published td { font-style: italic; } .warn { color: var(--warn); }
.figures { display: flex; flex-wrap: wrap; gap: 1.2rem; }
figure { margin: 0; flex: 0 1 35rem; min-width: 0; } figcaption { font-size: .82rem; max-width: 40rem; }
img, svg { max-width: 100%; height: auto; border-radius: 4px; } #above figure { flex: none; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
svg .name { fill: var(--text); } svg line, svg path { stroke: var(--line); }
svg .tick { stroke: var(--accent); stroke-opacity: .45; }
svg .box { fill: var(--fill); stroke: var(--accent); } svg .middle { stroke: var(--accent);
  stroke-width: 2; }
pre { overflow-x: auto; font-size: .8rem; } summary { cursor: pointer; }
.worst summary { font-size: 1.15rem; font-weight: 600; margin: 1.4rem 0 .5rem; }
button { font: inherit; padding: .6rem 1.2rem; border-radius: 6px; border: 1px solid var(--line);
  background: var(--fill); color: var(--text); cursor: pointer; }
button:focus-visible { outline: 2px solid var(--accent); }
button.chosen { border-color: var(--accent); box-shadow: inset 0 0 0 1px var(--accent); }
"""


def page(title: str, body: str, script: str = "") -> str:
    """Return a whole page. body: HTML; script: JavaScript, run at the end."""
    code = f"<script>{script}</script>" if script else ""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>\n{body}\n{code}</body></html>\n"
    )


def plot(series: Mapping[str, npt.NDArray[np.float64]]) -> str:
    """Return the values of each series on one axis, as SVG: a tick each, box and median over them.

    At most 400 ticks a series are drawn, evenly taken of the sorted values.
    """
    everything = np.concatenate(list(series.values()))
    low, high = float(everything.min()), float(everything.max())
    high = high if high > low else low + 1.0
    height = ROW * len(series) + 30

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    parts = [f"<svg viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}' role='img'>"]
    for i, (name, values) in enumerate(series.items()):
        y = ROW * i + 4
        parts.append(f"<text class='name' x='0' y='{y + 15}'>{escape(_short(name))}</text>")
        shown = np.sort(values)[np.linspace(0, len(values) - 1, min(len(values), 400)).astype(int)]
        path = "".join(f"M{x(v):.1f} {y + 3}v14" for v in shown)
        parts.append(f"<path class='tick' d='{path}'/>")
        first, middle, last = (x(float(q)) for q in np.quantile(values, (0.25, 0.5, 0.75)))
        parts.append(
            f"<rect class='box' x='{first:.1f}' y='{y + 1}' width='{last - first:.1f}' "
            f"height='18' rx='2'/><path class='middle' d='M{middle:.1f} {y + 1}v18'/>"
        )
    foot = ROW * len(series) + 8
    parts.append(f"<path d='M{LEFT} {foot}H{WIDTH - RIGHT}'/>")
    for value, anchor in ((low, "start"), ((low + high) / 2, "middle"), (high, "end")):
        parts.append(
            f"<text x='{x(value):.1f}' y='{foot + 16}' text-anchor='{anchor}'>{value:.3g}</text>"
        )
    return "".join([*parts, "</svg>"])


def _short(name: str) -> str:
    return name if len(name) <= 25 else name[:24] + "…"
