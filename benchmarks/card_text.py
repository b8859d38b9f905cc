"""The tables of the model card, and their place in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusionact.errors import MediaError
from diffusionact.evaluation.metrics import gap_closed
from diffusionact.files import write_whole

Scores = Mapping[str, NDArray[np.float64]]

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
COLUMNS = {
    "psnr_db": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "landmark_px": ("landmarks, px", "{:.2f}"),
    "landmark_nme": ("landmarks, NME", "{:.3f}"),
    "gaze_px": ("gaze, px", "{:.2f}"),
    "pose_deg": ("pose, deg", "{:.2f}"),
}
# The share of the gap from copying the source to the oracle that the shipped model must close,
# and the most that the oracle's landmark error may be of copying's.
REQUIRED = {"landmark_px": 0.8, "gaze_px": 0.8, "pose_deg": 0.8, "psnr_db": 0.6}
ORACLE_LANDMARKS = 1 / 3
LIKENESS = ("psnr_db", "ssim")  # higher is better; of all else, lower


def means(table: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    """The mean of every measure over the pictures where it has a value."""
    return {
        row: {name: float(np.nanmean(values)) for name, values in scores.items()}
        for row, scores in table.items()
    }


def standard_errors(table: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    """The standard error of every mean over the pictures; NaN for fewer than two."""
    return {
        row: {name: _standard_error(values) for name, values in scores.items()}
        for row, scores in table.items()
    }


def _standard_error(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.std(ddof=1) / math.sqrt(finite.size)) if finite.size > 1 else math.nan


def gaps(mean: Mapping[str, Mapping[str, float]], steps: Sequence[int]) -> dict[str, Any]:
    """By step count: the share of the gap closed in every measure, the oracle's landmark error
    over copying's, and whether all that is required holds."""
    copy, result = mean["copy"], {}
    for count in steps:
        ours, oracle = mean[f"reenactment T={count}"], mean[f"oracle T={count}"]
        closed = {name: gap_closed(copy[name], ours[name], oracle[name]) for name in COLUMNS}
        ratio = oracle["landmark_px"] / copy["landmark_px"]
        passed = all(
            closed[name] >= share and (oracle[name] > copy[name]) == (name in LIKENESS)
            for name, share in REQUIRED.items()
        )  # where the oracle is worse than copying, a share says nothing
        result[f"T={count}"] = {
            "closed": closed,
            "oracle_landmarks_of_copy": ratio,
            "passed": passed and ratio <= ORACLE_LANDMARKS,
        }
    return result


def section(table: Mapping[str, Scores], facts: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The card's measured section in Markdown, and the same as JSON values."""
    mean = means(table)
    gap = gaps(mean, facts["steps"])
    results = {**facts, "mean": mean, "standard_error": standard_errors(table), "gap": gap}
    return "\n\n".join(_paragraphs(mean, gap, facts)), _json(results)


def _json(value: Any) -> Any:
    """The value with what JSON cannot hold, NaN and infinity, replaced by null."""
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _paragraphs(
    mean: Mapping[str, Mapping[str, float]], gap: Mapping[str, Any], facts: Mapping[str, Any]
) -> list[str]:
    own = facts["judge_own_error"]
    rest = {name: row for name, row in mean.items() if not name.startswith("reconstruction")}
    reconstructions = {
        name.removeprefix("reconstruction, "): row
        for name, row in mean.items()
        if name.startswith("reconstruction")
    }
    return [
        f"{facts['identities']} rendered people the model never saw, one source and one target "
        f"picture each, seed {facts['seed']}; weights `{facts['weights_sha256'][:12]}`, computed "
        f"in {facts['precision']}. Landmarks, "
        "gaze and pose are read off the generated picture by a judge, a network of its own that "
        "no model was trained against, and compared with the exact truth of the render. Gaze is "
        "the iris' place from the centre of its eye; eyes that are shut or hidden do not count.",
        "The judge's own error on true renders of the same people: landmarks "
        f"{own['landmark_px']:.2f} px, gaze {own['gaze_px']:.2f} px, pose "
        f"{own['pose_deg']:.2f} degrees.",
        "**Reconstruction of the source** ({} steps of inversion, {} of rendering)".format(
            *facts["reconstruction_steps"]
        ),
        _table("z, x_T", reconstructions),
        "**Self-reenactment** (source to target of one person; x_T from "
        f"{facts['invert_steps']} steps of inversion). *Copy* leaves the source as it is; the "
        "*oracle* decodes the target's own semantic code from the source's x_T; the *mean face* "
        "answers with the mean picture, landmarks, gaze and pose.",
        _table("", rest),
        "**Share of the gap from copy to oracle that reenactment closes** (required: "
        + ", ".join(f"{_short(name)} {share:.0%}" for name, share in REQUIRED.items())
        + f"; oracle's landmark error at most {ORACLE_LANDMARKS:.0%} of copy's)",
        _gap_table(gap),
        f"The runtime's frame differs from the one measured here by at most "
        f"{facts['runtime_max_difference']:.1e} in [-1, 1].",
    ]


def _table(corner: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    lines = [[corner, *(title for title, _ in COLUMNS.values())]]
    for name, row in rows.items():
        lines.append([name, *(form.format(row[key]) for key, (_, form) in COLUMNS.items())])
    return _markdown(lines)


def _gap_table(gap: Mapping[str, Any]) -> str:
    lines = [["", *(_short(name) for name in COLUMNS), "oracle / copy", "holds"]]
    for name, row in gap.items():
        shares = [f"{row['closed'][key]:.0%}" for key in COLUMNS]
        ratio = f"{row['oracle_landmarks_of_copy']:.2f}"
        lines.append([name, *shares, ratio, "yes" if row["passed"] else "no"])
    return _markdown(lines)


def _short(name: str) -> str:
    title = COLUMNS[name][0]
    return title if name == "landmark_nme" else title.split(",")[0]


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    rows.insert(1, "|---|" + "---:|" * (len(lines[0]) - 1))
    return "\n".join(rows)


def write_section(path: Path, text: str) -> None:
    """Puts the text between the card's two markers, or at the end where there are none.

    Raises: MediaError when only one marker is there.
    """
    card = path.read_text(encoding="utf-8") if path.exists() else "# Model card\n"
    if (BEGIN in card) != (END in card):
        raise MediaError(f"{path} has one of the marks {BEGIN!r} and {END!r}; add the other")
    if BEGIN not in card:
        card = f"{card.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, rest = card.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
