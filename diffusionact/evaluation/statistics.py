"""Means with their uncertainty, and what changed between two runs: bootstrap over identities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.evaluation.columns import COLUMNS, COUNTS, FRAME_COLUMNS, improvement

FloatArray: TypeAlias = npt.NDArray[np.float64]
Row: TypeAlias = Mapping[str, Any]

LOOKED_FOR = ("no_face", "no_face_reference")  # counts of what only a reader of faces can tell
RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 7


@dataclass(frozen=True)
class Estimate:
    """mean over all frames (or clips), with the ends of its 95 % interval, None of one identity;
    count: of what the mean is over; identities: of whom."""

    mean: float
    low: float | None
    high: float | None
    count: int
    identities: int


def bootstrap(sums: FloatArray, counts: FloatArray) -> tuple[float, float] | None:
    """Return the ends of the 95 % interval of a mean, identities drawn with replacement; None of
    fewer than two, who say nothing of others.

    sums, counts: float64 [I], of the values of each identity; the statistic is the mean over all
    values of those drawn. The random stream is fixed: equal input, equal interval.
    Source: Efron 1979, percentile interval; the cluster is the identity, because frames of one
    person are alike.
    """
    if len(sums) < 2:
        return None
    drawn = np.random.default_rng(SEED).integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)


class Totals:
    """Sums of every measure a person, fed line by line; what a summary is made of."""

    def __init__(self) -> None:
        self.frames = 0
        self.compared = 0
        self.clips = 0
        self.counts: dict[str, int | None] = dict.fromkeys(COUNTS, 0)
        self.counts |= dict.fromkeys(LOOKED_FOR)  # None until somebody looks for a face
        self._sums: dict[str, dict[str, list[float]]] = {}

    def add(self, row: Row) -> None:
        """Return nothing; takes a line of a frame or of a clip's end."""
        if row.get("end"):
            self.clips += 1
            self.counts["unusable_clips"] = (self.counts["unusable_clips"] or 0) + (
                "unusable" in row
            )
        else:
            self.frames += 1
            self.compared += row["damage"] is None
            for name in COUNTS:
                if name not in LOOKED_FOR or row.get(name) is not None:
                    found = row["damage"] == name or bool(row.get(name))
                    self.counts[name] = (self.counts[name] or 0) + found
        for name in COLUMNS:
            value = row.get(name)
            if value is not None:
                total = self._sums.setdefault(name, {}).setdefault(row["identity"], [0.0, 0])
                total[0] += value
                total[1] += 1

    def estimates(self) -> dict[str, Estimate]:
        """Return the mean and its interval of every measure that has a value."""
        made = {}
        for name in COLUMNS:
            people = self._sums.get(name)
            if not people:
                continue
            sums, counts = np.array(list(people.values()), np.float64).T
            low, high = bootstrap(sums, counts) or (None, None)
            mean = float(sums.sum() / counts.sum())
            made[name] = Estimate(mean, low, high, int(counts.sum()), len(people))
        return made

    def identities(self) -> int:
        """Return how many people have any value."""
        return len({person for people in self._sums.values() for person in people})


@dataclass(frozen=True)
class Change:
    """What became of a measure from run A to run B, over the frames that both have.

    a, b: means, of a measure that is best at zero of its size; change: b - a with the ends of its interval; verdict: "better", "worse",
    "changed" (of a measure without a direction), "noise", or "unknown" of fewer than two people.
    """

    a: float
    b: float
    change: float
    low: float | None
    high: float | None
    count: int
    identities: int
    verdict: str


def changes(a: Iterable[Row], b: Iterable[Row]) -> tuple[dict[str, Change], dict[str, int]]:
    """Return the change of every measure that both runs have, and the counts of frames that only
    one has ("only_a", "only_b") or both ("both").

    Frames are matched by clip and frame, so that what is compared is the same face at the same
    moment; the interval is that of the mean difference, resampled over identities.
    """
    first, second = _by_place(a), _by_place(b)
    both = [place for place in first if place in second]
    counts = {
        "both": len(both),
        "only_a": len(first) - len(both),
        "only_b": len(second) - len(both),
    }
    made = {}
    for name in COLUMNS:
        rows = [
            (first[place], second[place])
            for place in both
            if first[place].get(name) is not None and second[place].get(name) is not None
        ]
        if rows:
            made[name] = _change(name, rows)
    return made, counts


def _by_place(rows: Iterable[Row]) -> dict[tuple[str, str | None], Row]:
    return {(row["clip"], row.get("frame")): row for row in rows}


def _change(name: str, rows: list[tuple[Row, Row]]) -> Change:
    people: dict[str, list[float]] = {}
    for a, b in rows:
        total = people.setdefault(a["identity"], [0.0, 0])
        total[0] += _distance_from_best(name, b[name]) - _distance_from_best(name, a[name])
        total[1] += 1
    sums, counts = np.array(list(people.values()), np.float64).T
    ends = bootstrap(sums, counts)
    before, after = (
        float(np.mean([_distance_from_best(name, row[i][name]) for row in rows])) for i in (0, 1)
    )
    shift = float(sums.sum() / counts.sum())
    low, high = ends or (None, None)
    return Change(
        before, after, shift, low, high, len(rows), len(people), _verdict(name, shift, ends)
    )


def _distance_from_best(name: str, value: float) -> float:
    """The value; of a measure that is best at zero, how far it is from there."""
    return abs(value) if COLUMNS[name].better == "zero" else float(value)


def _verdict(name: str, shift: float, ends: tuple[float, float] | None) -> str:
    if shift == 0 and (ends is None or ends == (0.0, 0.0)):
        return "equal"
    if ends is None:
        return "unknown"
    if ends[0] <= 0 <= ends[1]:
        return "noise"
    better = COLUMNS[name].better
    if better == "none":
        return "changed"
    gain = -shift if better == "zero" else improvement(name, shift)
    return "better" if gain > 0 else "worse"


def summary_values(totals: Totals, absent: Mapping[str, str]) -> dict[str, Any]:
    """Return the summary line: counts, every measure or None, intervals, and why one is None."""
    estimates = totals.estimates()
    values: dict[str, Any] = {"summary": True, "clips": totals.clips, "frames": totals.frames}
    values |= {"compared": totals.compared, "identities": totals.identities(), **totals.counts}
    values |= {name: estimates[name].mean if name in estimates else None for name in COLUMNS}
    values["interval_95"] = {
        name: [e.low, e.high] for name, e in estimates.items() if e.low is not None
    }
    values["count"] = {name: e.count for name, e in estimates.items()}
    values["why_null"] = {
        name: absent.get(name, _reason(name, totals)) for name in COLUMNS if name not in estimates
    }
    if totals.counts["no_face"] is None:
        values["why_null"]["no_face"] = absent.get("nme", _reason("nme", totals))
    return values


def _reason(name: str, totals: Totals) -> str:
    if not totals.compared:
        return "no frame could be compared"
    if name not in FRAME_COLUMNS:
        return "no clip with two neighbouring frames"
    if name in ("psnr", "ssim", "l1", "lpips", "perceptual_rendered", "brightness", "psnr_face"):
        return "no true picture to compare with"
    return "no face was found in any pair of frames"
