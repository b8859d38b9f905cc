"""The table and the plot of what benchmarks.steps_quality measured.

    python -m benchmarks.steps_text    # -> docs/steps_quality.md (its place) and docs/steps_quality.svg

The Markdown goes between two marks of the page, which is made where there is none.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality_plot import COLOURS, STYLE
from diffusionact import machine
from diffusionact.errors import MediaError
from diffusionact.files import write_whole

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "steps_quality.json"
PAGE = ROOT / "docs" / "steps_quality.md"
PLOT = ROOT / "docs" / "steps_quality.svg"
BEGIN, END = "<!-- measured: steps: begin -->", "<!-- measured: steps: end -->"
COLUMNS = {
    "psnr_db": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "perceptual": ("perceptual", "{:.4f}"),
    "detail": ("detail", "{:.2f}"),
    "identity": ("identity", "{:.3f}"),
    "landmark_px": ("landmarks, px", "{:.2f}"),
    "gaze_px": ("gaze, px", "{:.2f}"),
    "pose_deg": ("pose, deg", "{:.2f}"),
}
TITLES = {"ddim": "DDIM", "dpm++2m": "DPM-Solver++ (2M)", "unipc": "UniPC"}
PANELS = ("psnr_db", "perceptual")
WIDTH, HEIGHT, PANEL = 960, 400, (370, 300)
LEFTS, TOP = (70, 560), 40
CROWDED = 18  # px between two dots, closer than which one number is enough


def text(found: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    speed, mean = found["speed"], found["mean"]
    lines = [["", "steps", *(title for title, _ in COLUMNS.values()), "ms a frame"]]
    for row in mean:
        who, solver, count = _parts(row)
        ms = speed[who]["frame_ms"][count] if who in speed else None
        values = [form.format(mean[row][key]) for key, (_, form) in COLUMNS.items()]
        name = "copy the source" if who == "copy" else _title(who, solver)
        lines.append([name, count, *values, "" if ms is None else f"{ms:.1f}"])
    paragraphs = [_table(lines), _caption(found)]
    if found["given_up"]:
        paragraphs += [_given_up(found), _goal_sentence(found)]
    return "\n\n".join(paragraphs)


def _given_up(found: Mapping[str, Any]) -> str:
    lines = [["steps of the student", *(title.split(",")[0] for title, _ in COLUMNS.values())]]
    for count, measures in found["given_up"].items():
        lines.append([count, *(_share(measures[key]) for key in COLUMNS)])
    return _table(lines)


def _share(entry: Mapping[str, float | None]) -> str:
    """A share of the gap with its error; where there is no gap, what lies between the two."""
    if entry["share"] is not None:
        error = entry["share_error"]
        return f"{entry['share']:.1%}" + ("" if error is None else f" ± {error:.1%}")
    worse_by = entry["worse_by"] or 0.0
    return f"no gap; {'worse' if worse_by > 0 else 'better'} by {abs(worse_by):.3f}"


def failures(found: Mapping[str, Any]) -> list[str]:
    """The measures in which a student gives up more than its goal: "4 steps: PSNR"."""
    return [
        f"{count} steps: {COLUMNS[key][0].split(',')[0]}"
        for count, goal in found["goals"].items()
        for key in COLUMNS
        if count in found["given_up"]
        and (share := found["given_up"][count][key]["share"]) is not None
        and share > goal
    ]


def _goal_sentence(found: Mapping[str, Any]) -> str:
    goals = ", ".join(f"{count} steps {share:.0%}" for count, share in found["goals"].items())
    missed = failures(found)
    held = "All hold." if not missed else f"Missed: {'; '.join(missed)}."
    return (
        "Share of the gap from copying the source to the teacher (DDIM, 20 steps) that the student "
        "gives up, its own inversion included, with standard errors over people; below 0 it is "
        "better than the teacher. A copy is a true picture of the same person, so that in detail "
        "(here the logarithm's distance from 0) and identity there is no gap to give up. Goals, at "
        f"most: {goals}. {held}"
    )


def _caption(found: Mapping[str, Any]) -> str:
    speed, weights = found["speed"], found["teacher_sha256"][:12]
    inverts = ", ".join(
        f"{who} {len(found['timesteps'][who]['invert'])} steps, {each['invert_ms']:.0f} ms"
        for who, each in speed.items()
    )
    ran = speed["teacher"]
    return (
        f"{found['people']} rendered people that no network saw, seed {found['seed']}; teacher "
        f"`{weights}`, computed in {found['precision']}. Perceptual: distance in the judge's "
        "features. Detail: energy of the Laplacian, 1 as in the true picture. Identity: cosine of "
        "the guide's embeddings, in whose losses the student was trained, so that this column "
        "flatters it. Landmarks, gaze and pose as the judge reads them, which nothing was trained "
        "against. Inversion: "
        f"{inverts}. Times: {ran['backend']} {ran['precision']} on "
        f"{machine.describe_briefly(found['machine'])}, {found['date'][:10]}, load average "
        f"{found['load_average']} before, commit `{found['commit']}`."
    )


def drawing(found: Mapping[str, Any]) -> str:
    """Two panels as SVG: PSNR and perceptual distance over milliseconds a frame."""
    lines = _lines(found)
    times = [ms for dots in lines.values() for _, ms, _ in dots]
    parts = [f'<rect class="back" width="{WIDTH}" height="{HEIGHT}"/>']
    for left, measure in zip(LEFTS, PANELS, strict=True):
        parts += _panel(left, measure, lines, (min(times) / 1.2, max(times) * 1.2))
    for i, name in enumerate(lines):
        x, y = 70 + 220 * i, HEIGHT - 12
        parts += [
            f'<circle cx="{x}" cy="{y - 4}" r="6" fill="{COLOURS[i % len(COLOURS)]}"/>',
            f'<text x="{x + 12}" y="{y}">{name}</text>',
        ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="quality over the time of a frame"><style>{STYLE}</style>'
        + "\n".join(parts)
        + "</svg>\n"
    )


Dot = tuple[str, float, Mapping[str, float]]  # steps, milliseconds, measures


def _lines(found: Mapping[str, Any]) -> dict[str, list[Dot]]:
    lines: dict[str, list[Dot]] = {}
    for row, measures in found["mean"].items():
        who, solver, count = _parts(row)
        if who in found["speed"]:
            dot = (count, found["speed"][who]["frame_ms"][count], measures)
            lines.setdefault(_title(who, solver), []).append(dot)
    return lines


def _panel(
    left: int, measure: str, lines: Mapping[str, Sequence[Dot]], times: tuple[float, float]
) -> list[str]:
    width, height = PANEL
    values = [dot[2][measure] for dots in lines.values() for dot in dots]
    low, high = min(values), max(values)
    spare = 0.08 * (high - low) or 1.0
    low, high = low - spare, high + spare

    def x(ms: float) -> float:
        return left + width * math.log(ms / times[0]) / math.log(times[1] / times[0])

    def y(value: float) -> float:
        return TOP + height * (high - value) / (high - low)

    title, form = COLUMNS[measure]
    better = "higher is better" if measure == "psnr_db" else "lower is better"
    parts = [f'<text x="{left}" y="{TOP - 14}">{title} ({better}) over ms a frame</text>']
    for i in range(5):
        value = low + (high - low) * i / 4
        parts += [
            f'<line class="line" x1="{left}" x2="{left + width}" y1="{y(value):.1f}" '
            f'y2="{y(value):.1f}"/>',
            f'<text class="soft" x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">'
            f"{form.format(value)}</text>",
        ]
    for ms in (n * 10.0**power for power in range(5) for n in (1, 2, 5)):
        if times[0] <= ms <= times[1]:
            parts.append(
                f'<text class="soft" x="{x(ms):.1f}" y="{TOP + height + 16}" '
                f'text-anchor="middle">{ms:g}</text>'
            )
    named: list[tuple[float, float]] = []  # where a count stands already
    for i, dots in enumerate(lines.values()):
        paint = COLOURS[i % len(COLOURS)]
        places = [(count, x(ms), y(measures[measure])) for count, ms, measures in dots]
        course = " ".join(f"{a:.1f},{b:.1f}" for _, a, b in places)
        parts.append(f'<polyline points="{course}" fill="none" stroke="{paint}" stroke-width="2"/>')
        for count, a, b in places:
            parts.append(f'<circle class="ring" cx="{a:.1f}" cy="{b:.1f}" r="5" fill="{paint}"/>')
            if all(math.hypot(a - x_0, b - y_0) > CROWDED for x_0, y_0 in named):
                parts.append(f'<text class="soft" x="{a + 6:.1f}" y="{b - 7:.1f}">{count}</text>')
            named.append((a, b))
    return parts


def _parts(row: str) -> tuple[str, str, str]:
    """Who, solver and count of "teacher ddim 20"; of "copy" only who."""
    who, solver, count = (row.split() + ["", ""])[:3]
    return who, solver, count


def _title(who: str, solver: str) -> str:
    return "student" if who == "student" else f"{who}, {TITLES[solver]}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    rows.insert(1, "| --- |" + " ---: |" * (len(lines[0]) - 1))
    return "\n".join(rows)


def with_section(page: str, section: str) -> str:
    """The page with the section between its marks, at the end where there are none.

    Raises: MediaError when only one mark is there.
    """
    if (BEGIN in page) != (END in page):
        raise MediaError(f"the page has one of the marks {BEGIN!r} and {END!r}; add the other")
    if BEGIN not in page:
        page = f"{page.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, rest = page.split(BEGIN, 1)
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--plot", type=Path, default=PLOT)
    given = parser.parse_args()
    found = json.loads(given.results.read_text(encoding="utf-8"))
    page = "# Steps against quality\n\n![quality over time](steps_quality.svg)\n"
    if given.page.is_file():
        page = given.page.read_text(encoding="utf-8")
    write_whole(given.page, with_section(page, text(found)))
    write_whole(given.plot, drawing(found))


if __name__ == "__main__":
    main()
