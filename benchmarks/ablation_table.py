"""The ablations as JSON, as a page with tables, and as a plot: a dot for each seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation_plan import Run, weights_of
from benchmarks.ablation_scores import MEASURES
from benchmarks.quality_plot import STYLE
from diffusionact.files import write_whole

# What the paper's Table 3 says: variant, measure, in which it is worse than the full protocol.
CLAIMS = (
    ("no pre-training", "pose_deg"),
    ("no pre-training", "expression"),
    ("no batch split", "reconstruction_psnr_db"),
    ("no batch split", "reconstruction_perceptual"),
    ("no fine-tuning", "pose_deg"),
)
HEADS = {
    "reconstruction_psnr_db": ("reconstruction, PSNR dB", 2),
    "reconstruction_perceptual": ("reconstruction, perceptual", 4),
    "psnr_db": ("reenactment, PSNR dB", 2),
    "perceptual": ("perceptual", 4),
    "landmark_nme": ("landmarks, NME", 3),
    "pose_deg": ("pose (APD), degrees", 2),
    "gaze_px": ("gaze, px", 3),
    "expression": ("expression", 4),
}
Rows = dict[str, dict[str, dict[str, list[float]]]]  # variant -> steps -> measure -> by seed


def write(runs: Sequence[Run], folder: Path, root: Path) -> str:
    """The page; also writes it, the JSON and the plot under `root`."""
    results = collect(runs, folder)
    text = page(results)
    write_whole(root / "benchmarks" / "results" / "ablations.json",
                json.dumps(results, indent=1) + "\n")  # fmt: skip
    write_whole(root / "docs" / "ablations.md", text)
    if results["protocol"]:
        write_whole(root / "docs" / "ablations.svg", plot(results["protocol"]))
    return text


def collect(runs: Sequence[Run], folder: Path) -> dict[str, Any]:
    """What the finished runs were worth, the yardsticks, the verdicts, and what was not run."""
    parts: dict[str, Rows] = {"protocol": {}, "distillation": {}}
    seconds, images, missing = {}, {}, []
    for run in runs:
        place = folder / run.name
        images[run.name] = sum(stage["images"] for stage in run.recipe["stages"])
        if (place / "seconds.json").exists():
            seconds[run.name] = json.loads((place / "seconds.json").read_text())
        if not weights_of(folder, run.name).exists():
            missing.append(run.name)
        if not run.part or not (place / "scores.json").exists():
            continue
        table = json.loads((place / "scores.json").read_text())
        for steps, row in table.items():
            known = parts[run.part].setdefault(run.variant, {}).setdefault(steps, {})
            known.setdefault("seed", []).append(run.seed)
            for name in MEASURES:
                known.setdefault(name, []).append(row[name])
    yards = folder / "yardsticks.json"
    return {
        **parts,
        "yardsticks": json.loads(yards.read_text()) if yards.exists() else {},
        "directions": directions(parts["protocol"]),
        "images": images, "seconds": seconds, "not_run": missing,
    }  # fmt: skip


def directions(rows: Rows) -> list[dict[str, Any]]:
    """Whether each claim holds: by how much the variant is worse than the full protocol, seed by
    seed."""
    found = []
    for variant, measure in CLAIMS:
        if variant not in rows or "full" not in rows:
            continue
        full, other = rows["full"]["20"], rows[variant]["20"]
        sign = -1 if MEASURES[measure] else 1
        of_full = dict(zip(full["seed"], full[measure], strict=True))
        worse = [sign * (value - of_full[seed]) for seed, value in
                 zip(other["seed"], other[measure], strict=True) if seed in of_full]  # fmt: skip
        found.append({"variant": variant, "measure": measure, "worse_by": worse,
                      "verdict": verdict(worse)})  # fmt: skip
    return found


def verdict(worse: Sequence[float]) -> str:
    """What the seeds say of a claim, of which one alone says little."""
    if not worse:
        return "not run"
    said = "holds" if statistics.mean(worse) > 0 else "does not hold"
    if len(worse) == 1:
        return f"{said} (one seed)"
    agree = all(w > 0 for w in worse) or all(w <= 0 for w in worse)
    return said if agree else "open: the seeds disagree"


def page(results: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    lines = [
        "# Ablations on small pictures", "",
        "Made by `python -m benchmarks.ablations`; figures in `benchmarks/results/ablations.json`.",
        "Rendered faces of 32 px, 64 people held out, one trial of two motions each. A cell is the "
        "mean over the seeds ± their standard deviation. Gaze, pose, landmarks and expression are "
        "read, in pictures enlarged to 128 px, by the shipped model's judge, which no training listened "
        "to, against the renderer's truth; expression is the error of the openings of mouth and "
        "eyes.", "",
        "## The protocol (the paper's Table 3)", "",
        *_table(results["protocol"], results["yardsticks"], ("copy of the source", "true pictures")),
        "", "![A dot for each seed](ablations.svg)", "",
        "Which of the paper's directions hold:", "",
    ]  # fmt: skip
    for row in results["directions"]:
        amounts = ", ".join(f"{value:+.4g}" for value in row["worse_by"])
        head = HEADS[row["measure"]][0]
        lines.append(f"- {row['variant']}, {head} worse: **{row['verdict']}** ({amounts})")
    lines += ["", "## Few steps (which method distils)", "",
              "Each method saw the same number of pictures, from the same 20-step teacher.", "",
              *_table(results["distillation"], results["yardsticks"], ("teacher",)), ""]  # fmt: skip
    if results["not_run"]:
        lines += ["Not run: " + ", ".join(results["not_run"]) + ".", ""]
    return "\n".join(lines)


def _table(rows: Rows, yardsticks: Mapping[str, Any], wanted: Sequence[str]) -> list[str]:
    heads = [head for head, _ in HEADS.values()]
    lines = ["| variant | steps | seeds | " + " | ".join(heads) + " |",
             "|---|---|---|" + "---|" * len(heads)]  # fmt: skip
    for name in wanted:
        for steps, row in yardsticks.get(name, {}).items():
            cells = [
                _cell([row[m]] if row[m] is not None else [], d) for m, (_, d) in HEADS.items()
            ]
            lines.append(f"| *{name}* | {steps} | | " + " | ".join(cells) + " |")
    for name, counts in rows.items():
        for steps, row in counts.items():
            cells = [_cell(row[measure], digits) for measure, (_, digits) in HEADS.items()]
            lines.append(f"| {name} | {steps} | {len(row['seed'])} | " + " | ".join(cells) + " |")
    return lines


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


PANELS = ("reconstruction_psnr_db", "pose_deg", "landmark_nme", "expression")
PANEL, LEFT, TOP, ROW = 190, 150, 48, 26  # px


def plot(rows: Rows) -> str:
    """Panels of measures side by side, a line for each variant, as SVG."""
    names = list(rows)
    width, height = LEFT + PANEL * len(PANELS) + 10, TOP + ROW * len(names) + 24
    parts = [f'<rect class="back" width="{width}" height="{height}"/>']
    for i, name in enumerate(names):
        y = TOP + ROW * i + ROW / 2
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4:.0f}" text-anchor="end">{name}</text>')
    for column, measure in enumerate(PANELS):
        left, right = LEFT + column * PANEL + 12, LEFT + (column + 1) * PANEL - 12
        values = [v for row in rows.values() for v in row["20"][measure]]
        low, high = min(values), max(values)
        unit = (right - left) / ((high - low) or 1)
        better = "more is better" if MEASURES[measure] else "less is better"
        digits = HEADS[measure][1]
        parts += [f'<text x="{left}" y="18">{HEADS[measure][0]}</text>',
                  f'<text class="soft" x="{left}" y="36">{better}</text>',
                  f'<text class="soft" x="{left}" y="{height - 6}">{low:.{digits}f}</text>',
                  f'<text class="soft" x="{right}" y="{height - 6}" text-anchor="end">'
                  f"{high:.{digits}f}</text>"]  # fmt: skip
        for i, row in enumerate(rows.values()):
            y = TOP + ROW * i + ROW / 2
            parts.append(f'<path class="line" d="M{left} {y}H{right}"/>')
            parts += [f'<circle cx="{left + (v - low) * unit:.1f}" cy="{y}" r="4.5" fill="#2f6fbd" '
                      f'fill-opacity="0.7"/>' for v in row["20"][measure]]  # fmt: skip
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}"><style>{STYLE}</style>{"".join(parts)}</svg>\n'
    )
