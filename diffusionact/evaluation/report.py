"""One page of runs: tables with intervals, distributions, worst cases. It needs nothing else."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.errors import MediaError
from diffusionact.evaluation.columns import COLUMNS, COUNTS, DAMAGES, FRAME_COLUMNS, text_of
from diffusionact.evaluation.page import page, plot
from diffusionact.evaluation.published import Published, PublishedRow, published
from diffusionact.evaluation.runfile import HEAD, SUMMARY, read_rows, read_run
from diffusionact.evaluation.worst import read_worst
from diffusionact.files import write_whole

Values: TypeAlias = Mapping[str, npt.NDArray[np.float64]]

YARD = ("copy", "mean", "true", "oracle")  # yardsticks: measured, not judged
HISTOGRAMS = ("psnr", "lpips", "perceptual_rendered", "csim", "nme", "gaze_px", "apd", "aed")
DAMAGE_TEXT = {
    **DAMAGES,
    "resized": "the result's size was another; it was brought to the reference's",
    "unusable_clips": "a whole clip could not be read, or shows no face (frames.jsonl says which)",
    "no_face": "no face was found in the result",
    "no_face_reference": "no face was found in the reference",
}


@dataclass(frozen=True)
class Run:
    """One run as the page shows it."""

    name: str
    folder: Path
    head: Mapping[str, Any]
    summary: Mapping[str, Any]
    values: Values


def write_report(
    path: Path, places: Sequence[Path], rows: Path | None = None
) -> dict[str, dict[str, Any]]:
    """Return what a page, written to `path`, shows: run -> measure -> [mean, low, high], the ends
    of the interval None of one person.

    places: runs, or folders that hold some; rows: published ones, of a file of the user's.
    Raises: MediaError when there is no complete run.
    """
    runs = [_read(folder) for place in places for folder in _runs_in(place)]
    if not runs:
        raise MediaError(
            f"{', '.join(map(str, places))}: no run of `diffusionact eval`; keep one with -o"
        )
    known = published(rows)
    parts = [_heading(runs), _table(runs, known), _counts(runs), _histograms(runs)]
    parts += [_worst(run, first=i == 0) for i, run in enumerate(runs)]
    parts += [_absent(runs), _about(runs, known)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page("Evaluation", "\n".join(part for part in parts if part)))
    return {run.name: _figures(run) for run in runs}


def _figures(run: Run) -> dict[str, Any]:
    made: dict[str, Any] = {"frames": run.summary["frames"]}
    for name in COLUMNS:
        if (value := run.summary.get(name)) is not None:
            low, high = run.summary.get("interval_95", {}).get(name, (None, None))
            made[name] = [None if v is None else float(f"{v:.6g}") for v in (value, low, high)]
    return made


def _runs_in(place: Path) -> list[Path]:
    if (place / HEAD).exists():
        return [place]
    if not place.is_dir():
        raise MediaError(f"{place}: no such folder; wanted a run of `diffusionact eval -o`")
    found = [path.parent for path in place.glob(f"*/{SUMMARY}")]
    return sorted(found, key=lambda folder: _order(folder.name))


def _order(name: str) -> tuple[int, tuple[tuple[int, int | str], ...]]:
    """Ours first, then by name, numbers as numbers, and yardsticks last."""
    words = tuple(
        (0, int(word[1:])) if word[:1] == "T" and word[1:].isdigit() else (1, word)
        for word in name.split("-")
    )
    kinds = ("ours", "oracle", "copy", "mean", "true")
    return (kinds.index(str(words[0][1])) if words[0][1] in kinds else 0, words)


def _read(folder: Path) -> Run:
    head, summary = read_run(folder)
    values: dict[str, list[float]] = {}
    for row in read_rows(folder):
        for name in HISTOGRAMS:
            if row.get(name) is not None:
                values.setdefault(name, []).append(row[name])
    arrays = {name: np.array(found) for name, found in values.items()}
    return Run(folder.name, folder, head, summary, arrays)


def _heading(runs: Sequence[Run]) -> str:
    protocols = sorted({str(run.head.get("protocol")) for run in runs})
    data = sorted({_data(run) for run in runs})
    people = sorted({run.summary["identities"] for run in runs})
    frames = sorted({run.summary["frames"] for run in runs})
    who = f"{_range(people)} identities" if people[-1] else "no one measured"
    facts = [f"protocol {', '.join(protocols)}", ", ".join(data), who, f"{_range(frames)} frames"]
    return f"<h1>Evaluation</h1><p class='lead'>{escape(' · '.join(facts))}</p>"


def _data(run: Run) -> str:
    data = run.head.get("data")
    return ", ".join(map(str, data)) if isinstance(data, list) else str(data)


def _range(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _table(runs: Sequence[Run], known: Published) -> str:
    shown = [name for name in COLUMNS if any(run.summary.get(name) is not None for run in runs)]
    rows = _published_rows(runs, known)
    shown += [name for name in COLUMNS if name not in shown and any(name in r.values for r in rows)]
    best = {name: _best(name, runs) for name in shown}
    head = "".join(f"<th>{escape(_arrow(name))}</th>" for name in shown)
    lines = []
    for run in runs:
        cells = "".join(_cell(name, run, best[name]) for name in shown)
        lines.append(f"<tr><th>{escape(run.name)}</th>{cells}</tr>")
    for row in rows:
        cells = "".join(f"<td>{text_of(name, row.values.get(name))}</td>" for name in shown)
        same = row.data in {_data(run) for run in runs}
        mark = "" if same else f" <span class='warn'>other data: {escape(row.data)}</span>"
        title = f"{escape(row.method)}, {escape(row.table)}{mark}"
        lines.append(f"<tr class='published'><th>{title}</th>{cells}</tr>")
    note = "Means with 95 % intervals, bootstrap over identities. The best of a column is bold; "
    note += "copy, mean, oracle and true are yardsticks and never bold."
    return (
        f"<h2>Measures</h2><p>{note}</p><div class='scroll'><table><thead><tr><th></th>{head}"
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _published_rows(runs: Sequence[Run], known: Published) -> list[PublishedRow]:
    protocols = {str(run.head.get("protocol")) for run in runs}
    return [row for row in known.rows if row.protocol in protocols]


def _arrow(name: str) -> str:
    column = COLUMNS[name]
    mark = {"higher": " ↑", "lower": " ↓", "zero": " →0", "none": ""}[column.better]
    return column.title + mark


def _best(name: str, runs: Sequence[Run]) -> float | None:
    values = [
        run.summary[name]
        for run in runs
        if run.summary.get(name) is not None and run.head.get("method") not in YARD
    ]
    better = COLUMNS[name].better
    if len(values) < 2 or better == "none":
        return None
    keys = {"higher": lambda v: -v, "lower": lambda v: v, "zero": abs}
    return float(min(values, key=keys[better]))


def _cell(name: str, run: Run, best: float | None) -> str:
    value = run.summary.get(name)
    if value is None:
        why = run.summary.get("why_null", {}).get(name, "")
        return f"<td class='none' title='{escape(why, quote=True)}'>-</td>"
    ends = run.summary.get("interval_95", {}).get(name)
    span = "" if ends is None else f"<small>{_span(name, ends)}</small>"
    text = text_of(name, value)
    ours = best is not None and run.head.get("method") not in YARD
    marked = f"<b>{text}</b>" if ours and text == text_of(name, best) else text
    return f"<td>{marked}{span}</td>"


def _span(name: str, ends: Sequence[float]) -> str:
    return f"{text_of(name, ends[0])} … {text_of(name, ends[1])}"


def _counts(runs: Sequence[Run]) -> str:
    shown = [name for name in COUNTS if any(run.summary.get(name) for run in runs)]
    if not shown:
        looked = all(run.summary.get("no_face") is not None for run in runs)
        found = "; a face was found in each" if looked else ""
        return f"<p>Every frame of every run could be compared{found}.</p>"
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in shown)
    lines = [
        f"<tr><th>{escape(run.name)}</th><td>{run.summary['frames']}</td>"
        f"<td>{run.summary['compared']}</td>"
        + "".join(f"<td>{_count(run.summary.get(name))}</td>" for name in shown)
        + "</tr>"
        for run in runs
    ]
    notes = "".join(
        f"<li><b>{escape(name.replace('_', ' '))}</b>: {escape(DAMAGE_TEXT[name])}</li>"
        for name in shown
    )
    return (
        "<h2>What could not be compared</h2><div class='scroll'><table><thead><tr><th></th>"
        f"<th>frames</th><th>compared</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
        f"</table></div><ul>{notes}</ul>"
    )


def _count(number: int | None) -> str:
    return "-" if number is None else str(number)


def _histograms(runs: Sequence[Run]) -> str:
    figures = []
    for name in HISTOGRAMS:
        series = {
            run.name: run.values[name]
            for run in runs
            if len(run.values.get(name, ())) > 1
            and run.head.get("method") not in ("true", "mean", "copy")
        }
        if series:
            figures.append(f"<figure>{plot(series)}<figcaption>{escape(_arrow(name))}: "
                           f"{escape(COLUMNS[name].note)}</figcaption></figure>")  # fmt: skip
    if not figures:
        return ""
    return (
        "<h2>Distributions</h2><p>Each frame is a tick; the box spans the middle half, its line is "
        f"the median.</p><div class='figures'>{''.join(figures)}</div>"
    )


def _worst(run: Run, first: bool) -> str:
    cases = read_worst(run.folder / "worst")
    if not cases or run.head.get("method") in YARD:
        return ""
    shown = []
    for case in cases[:8]:
        data = base64.b64encode((run.folder / "worst" / case.file).read_bytes()).decode()
        title = FRAME_COLUMNS[case.by].title
        text = f"{case.clip}, {case.frame}: {title} {text_of(case.by, case.value)}"
        shown.append(
            f"<figure><img alt='' src='data:image/jpeg;base64,{data}'>"
            f"<figcaption>{escape(text)}</figcaption></figure>"
        )
    return (
        f"<details class='worst'{' open' if first else ''}><summary>Worst of {escape(run.name)}"
        "</summary><p>Source (where known), what it should be, the result, and twice their "
        f"difference.</p><div class='figures'>{''.join(shown)}</div></details>"
    )


def _absent(runs: Sequence[Run]) -> str:
    reasons: dict[str, str] = {}
    for run in runs:
        reasons |= run.summary.get("why_null", {})
    present = {n for run in runs for n in COLUMNS if run.summary.get(n) is not None}
    lines = "".join(
        f"<li><b>{escape(COLUMNS[name].title)}</b>: {escape(why)}</li>"
        for name, why in reasons.items()
        if name not in present and name in COLUMNS
    )
    return f"<h2>Not measured</h2><ul>{lines}</ul>" if lines else ""


def _about(runs: Sequence[Run], known: Published) -> str:
    notes = "".join(
        f"<li><b>{escape(_arrow(name))}</b>: {escape(column.note)}</li>"
        for name, column in COLUMNS.items()
        if any(run.summary.get(name) is not None for run in runs)
    )
    heads = "".join(
        f"<details><summary>{escape(run.name)}</summary><pre>"
        f"{escape(json.dumps(run.head, indent=1))}</pre></details>"
        for run in runs
    )
    rows = _published_rows(runs, known)
    sources = "".join(f"<li>{escape(row.table)}: {escape(row.read_in)}</li>" for row in rows)
    paper = escape(known.paper)
    beside = f"<ul>{sources}</ul>" if rows else f"<p>{escape(known.note)}</p>"
    return (
        f"<h2>How to read it</h2><ul>{notes}</ul><h2>Published rows</h2><p>{paper}</p>{beside}"
        f"<h2>The runs</h2>{heads}"
    )
