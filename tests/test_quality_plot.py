"""The plot of quality over time is that of the results, and puts things where they belong."""

from __future__ import annotations

import json
import re
from typing import Any

from benchmarks import quality_plot


def result(steps: int, **rows: tuple[float, float | None]) -> dict[str, Any]:
    variants = {name: {"ms": ms, "psnr_db": db} for name, (ms, db) in rows.items()}
    return {"steps": steps, "variants": variants}


def test_right_is_slower_and_up_is_nearer() -> None:
    drawn = quality_plot.drawing(
        [
            result(4, plain=(100.0, None), rough=(25.0, 40.0), fine=(50.0, 50.0)),
            result(8, plain=(200.0, 95.0), rough=(50.0, 30.0), fine=(100.0, 48.0)),
        ]
    )
    courses = [
        [tuple(map(float, dot.split(","))) for dot in found.split()]
        for found in re.findall(r'points="([^"]+)"', drawn)
    ]
    plain, rough, fine = courses
    assert plain[0][1] == plain[1][1] == quality_plot.BAND_Y
    assert plain[0][1] < fine[0][1] < fine[1][1] < rough[0][1] < rough[1][1]
    assert rough[1][1] == quality_plot.BOTTOM, "what is off the scale stays on the paper"
    assert rough[0][0] < rough[1][0] == fine[0][0] < fine[1][0] == plain[0][0] < plain[1][0]


def test_the_plot_in_the_docs_is_that_of_the_results() -> None:
    results = json.loads(quality_plot.RESULTS.read_text())["results"]
    due = quality_plot.drawing(results)
    assert quality_plot.PLOT.read_text() == due, "run: python -m benchmarks.quality_plot"
