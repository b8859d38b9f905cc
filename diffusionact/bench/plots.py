"""Plots of measurements as SVG text; colours are the variables --c0 to --c7 of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TypeAlias

import numpy as np

Rounds: TypeAlias = Sequence[Sequence[float]]  # milliseconds of each frame, by round

WIDTH, NAME_PX, ROW_PX, TOP_PX, AXIS_PX = 900, 250, 44, 8, 26
COLOURS = 8
MOST_POINTS = 400  # of a curve
NAME_LETTERS = 38
TICKS = 5


def colour(i: int) -> str:
    """Return the colour of the i-th thing."""
    return f"var(--c{i % COLOURS})"


def boxes(names: Sequence[str], samples: Sequence[Rounds]) -> str:
    """Return a box plot, a row for each name: quartiles, 5 % and 95 %, medians of rounds."""
    five = [np.percentile([ms for one in s for ms in one], (5, 25, 50, 75, 95)) for s in samples]
    medians = [[float(np.median(one)) for one in s] for s in samples]
    top = max(max(float(f[4]), *m) for f, m in zip(five, medians, strict=True))
    x, parts = _axis(top, len(names))
    for i, (low, q25, p50, q75, high) in enumerate(five):
        y, paint = TOP_PX + ROW_PX * i + ROW_PX / 2, colour(i)
        parts += [
            _name(names[i], y),
            f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}" stroke="{paint}"/>',
            f'<rect x="{x(q25):.1f}" y="{y - 11}" width="{max(x(q75) - x(q25), 1):.1f}" '
            f'height="22" fill="{paint}" fill-opacity=".35" stroke="{paint}">'
            f"<title>{escape(names[i])}: median {p50:.2f} ms, half within {q25:.2f} to {q75:.2f}"
            "</title></rect>",
            f'<line x1="{x(p50):.1f}" x2="{x(p50):.1f}" y1="{y - 11}" y2="{y + 11}" '
            f'stroke="{paint}" stroke-width="3"/>',
        ]
        parts += [
            f'<circle cx="{x(ms):.1f}" cy="{y + 16}" r="2.5" fill="{paint}"/>' for ms in medians[i]
        ]
    return _svg(parts, len(names), "box plot of whole frames")


def stacks(names: Sequence[str], stages: Sequence[Mapping[str, float]]) -> str:
    """Return stacked bars, a row for each name, a part for each stage."""
    known = list(dict.fromkeys(stage for one in stages for stage in one))
    x, parts = _axis(max(sum(one.values()) for one in stages), len(names))
    for i, one in enumerate(stages):
        y, begin = TOP_PX + ROW_PX * i + ROW_PX / 2, 0.0
        parts.append(_name(names[i], y))
        for stage, ms in one.items():
            parts.append(
                f'<rect x="{x(begin):.1f}" y="{y - 12}" width="{max(x(begin + ms) - x(begin), 0.3):.1f}"'
                f' height="24" fill="{colour(known.index(stage))}">'
                f"<title>{escape(stage)}: {ms:.3f} ms</title></rect>"
            )
            begin += ms
        parts.append(f'<text x="{x(begin) + 6:.1f}" y="{y + 4}">{begin:.1f} ms</text>')
    return _svg(parts, len(names), "stacked bars of stages")


def courses(names: Sequence[str], samples: Sequence[Rounds]) -> str:
    """Return a curve for each name: milliseconds of each frame, in order."""
    height, left, bottom = 260, 60, 24
    flat = [np.array([ms for one in s for ms in one]) for s in samples]
    top = _ceiling(max(float(np.percentile(values, 99)) for values in flat) * 1.1)
    parts = []
    for tick in np.linspace(0, top, TICKS):
        y = height - bottom - (height - bottom - TOP_PX) * tick / top
        parts += [
            f'<line class="line" x1="{left}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<text class="soft" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>',
        ]
    for i, values in enumerate(flat):
        kept = values[:: max(1, math.ceil(len(values) / MOST_POINTS))]
        xs = left + (np.arange(len(kept)) + 0.5) / len(kept) * (WIDTH - left)
        ys = height - bottom - (height - bottom - TOP_PX) * np.minimum(kept / top, 1.0)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(xs, ys, strict=True))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour(i)}" stroke-width="1.5">'
            f"<title>{escape(names[i])}</title></polyline>"
        )
    parts.append(
        f'<text class="soft" x="{left}" y="{height - 6}">first frame after warm-up</text>'
        f'<text class="soft" x="{WIDTH - 4}" y="{height - 6}" text-anchor="end">last</text>'
    )
    return _frame(parts, height, "curve of frames in order")


def _axis(top: float, rows: int) -> tuple[Callable[[float], float], list[str]]:
    """Milliseconds -> px, and the lines and numbers of the axis."""
    end = _ceiling(top * 1.08)
    bottom = TOP_PX + ROW_PX * rows

    def x(ms: float) -> float:
        return NAME_PX + (WIDTH - NAME_PX - 20) * ms / end

    parts = []
    for tick in np.linspace(0, end, TICKS):
        at = x(float(tick))
        parts += [
            f'<line class="line" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP_PX}" y2="{bottom}"/>',
            f'<text class="soft" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{tick:g}</text>",
        ]
    return x, parts


def _ceiling(value: float) -> float:
    """The next of 1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8 at any power of ten."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-9)))
    steps = (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10)
    return next(float(f"{step * power:.6g}") for step in steps if step * power >= value * 0.999999)


def _name(name: str, y: float) -> str:
    short = name if len(name) <= NAME_LETTERS else name[: NAME_LETTERS - 1] + "…"
    return f'<text x="{NAME_PX - 10}" y="{y + 4}" text-anchor="end">{escape(short)}</text>'


def _svg(parts: Sequence[str], rows: int, about: str) -> str:
    return _frame(parts, TOP_PX + ROW_PX * rows + AXIS_PX, about)


def _frame(parts: Sequence[str], height: float, about: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{about}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
