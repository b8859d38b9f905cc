"""A picture of quality over time, made of what benchmarks.cpu_quality measured.

    python -m benchmarks.quality_plot      # benchmarks/results/cpu_quality.json -> docs/cpu_quality.svg

A line for each variant, a dot on it for each number of steps; frames that are nearer to the
reference than `TOP_DB` lie in the band at the top, for nobody sees such differences.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusionact.files import write_whole
from diffusionact.runtime.choice import LEAST_PSNR_DB

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu_quality.json"
PLOT = ROOT / "docs" / "cpu_quality.svg"

WIDTH, HEIGHT = 900, 470
LEFT, RIGHT, TOP, BOTTOM = 70, 710, 50, 410
LEAST_DB, TOP_DB = 36.0, 56.0
BAND_Y = 28
COLOURS = ("#7d8794", "#2f6fbd", "#d9782d", "#3c9a5f", "#8a56b5", "#c0476b")
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1b1f24}.soft{fill:#5b6470}.back{fill:#fff}"
    ".line{stroke:#d5dae0}.ring{stroke:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#e6e9ed}.soft{fill:#9aa4b0}.back{fill:#15181c}"
    ".line{stroke:#3a414a}.ring{stroke:#15181c}}"
)


def drawing(results: Sequence[Mapping[str, Any]]) -> str:
    """The plot of the results as SVG."""
    times = [row["ms"] for result in results for row in result["variants"].values()]
    low, high = math.log(min(times) / 1.2), math.log(max(times) * 1.2)

    def x(ms: float) -> float:
        return LEFT + (RIGHT - LEFT) * (math.log(ms) - low) / (high - low)

    def y(db: float | None) -> float:
        if db is None or db > TOP_DB:
            return BAND_Y
        return BOTTOM - (BOTTOM - TOP) * (max(db, LEAST_DB) - LEAST_DB) / (TOP_DB - LEAST_DB)

    parts = [f'<rect class="back" width="{WIDTH}" height="{HEIGHT}"/>', *_axes(x, y, times)]
    for i, name in enumerate(results[0]["variants"]):
        rows = [(result["steps"], result["variants"][name]) for result in results]
        dots = [(steps, x(row["ms"]), y(row["psnr_db"])) for steps, row in rows]
        course = " ".join(f"{a:.1f},{b:.1f}" for _, a, b in dots)
        paint = COLOURS[i % len(COLOURS)]
        parts.append(f'<polyline points="{course}" fill="none" stroke="{paint}" stroke-width="2"/>')
        for steps, a, b in dots:
            parts += [
                f'<circle class="ring" cx="{a:.1f}" cy="{b:.1f}" r="6" fill="{paint}"/>',
                f'<text class="soft" x="{a + 8:.1f}" y="{b + (18 if i else -8):.1f}">{steps}</text>',
            ]
        parts += [
            f'<circle cx="{RIGHT + 25}" cy="{TOP + 26 * i + 6}" r="6" fill="{paint}"/>',
            f'<text x="{RIGHT + 40}" y="{TOP + 26 * i + 11}">{name}</text>',
        ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="quality of a frame over its time"><style>{STYLE}</style>'
        + "\n".join(parts)
        + "</svg>\n"
    )


def _axes(x: Any, y: Any, times: Sequence[float]) -> list[str]:
    parts = [
        f'<text class="soft" x="{LEFT - 8}" y="{BAND_Y + 4}" text-anchor="end">nearer</text>',
        f'<line class="line" x1="{LEFT}" x2="{RIGHT}" y1="{TOP - 4}" y2="{TOP - 4}"/>',
    ]
    for db in range(int(LEAST_DB), int(TOP_DB) + 1, 4):
        dash = ' stroke-dasharray="6 4" stroke-width="2"' if db == LEAST_PSNR_DB else ""
        at = y(float(db))
        parts += [
            f'<line class="line" x1="{LEFT}" x2="{RIGHT}" y1="{at:.1f}" y2="{at:.1f}"{dash}/>',
            f'<text class="soft" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{db}</text>',
        ]
    marks = [n * 10.0**power for power in range(5) for n in (1, 2, 5)]
    for ms in (ms for ms in marks if min(times) / 1.2 <= ms <= max(times) * 1.2):
        at = x(ms)
        parts += [
            f'<line class="line" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{BOTTOM}"/>',
            f'<text class="soft" x="{at:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{ms:g}</text>',
        ]
    below = BOTTOM + 44
    return [
        *parts,
        f'<text x="{LEFT}" y="{below}">dB from ONNX Runtime in fp32 at the same steps, over '
        "milliseconds a frame; at the dots: steps</text>",
        f'<text class="soft" x="{RIGHT + 18}" y="{y(LEAST_PSNR_DB) + 4:.1f}">'
        "a default is above</text>",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=PLOT)
    given = parser.parse_args()
    write_whole(given.plot, drawing(json.loads(given.results.read_text())["results"]))


if __name__ == "__main__":
    main()
