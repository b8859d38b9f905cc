"""Whether two measurements differ, by how much, and whether that is more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact import machine
from diffusionact.bench.records import TOTAL, Record, repeats
from diffusionact.errors import SettingsError

Rounds: TypeAlias = Sequence[Sequence[float]]

DRAWS = 2000
CONFIDENCE = 0.95
FEWEST_ROUNDS = 3  # of a side: fewer show next to nothing of the machine's moods
SEED = 0
ONE_RUN = (
    "one run a side: what changes from run to run is not in the intervals; repeat "
    "`diffusionact bench --out` into the same files to have it in"
)

TOO_FEW = (
    f"fewer than {FEWEST_ROUNDS} rounds of frames in a file tell no change from noise; measure "
    "again with more of `diffusionact bench --frames --rounds`, or without these options"
)


@dataclass(frozen=True)
class Change:
    """One stage, or "total", of one variant in two files.

    before_ms, after_ms: medians; ratio: after / before; low, high: of the interval that holds the
    ratio in 95 of 100 such pairs of runs; rounds: of the side that has fewer; real: whether 1 lies
    outside of the interval, and the rounds are enough to tell.
    """

    variant: str
    stage: str
    before_ms: float
    after_ms: float
    ratio: float
    low: float
    high: float
    rounds: int

    @property
    def real(self) -> bool:
        return self.rounds >= FEWEST_ROUNDS and not self.low <= 1.0 <= self.high


@dataclass(frozen=True)
class Comparison:
    """changes: of all variants that both files have; unmatched: names of the others; notes: what
    else differs, in words."""

    changes: tuple[Change, ...]
    unmatched: tuple[str, ...]
    notes: tuple[str, ...]

    def slower_than(self, share: float) -> list[Change]:
        """Return the changes of whole frames that are real and above the share, such as 0.05."""
        return [c for c in self.changes if c.stage == TOTAL and c.real and c.ratio > 1.0 + share]


def compare(before: Sequence[Record], after: Sequence[Record], force: bool = False) -> Comparison:
    """Return what changed between two files' records.

    Variants belong together by what was asked for; where each file has a single one, these do.
    Records of a variant with the versions and commit of its last are repeats of one measurement.

    Raises: SettingsError when nothing belongs together, or when the machines differ and `force`
    is not set.
    """
    pairs, unmatched = _paired(repeats(before), repeats(after))
    notes: dict[str, None] = {}
    for a, b in ((a[-1], b[-1]) for a, b in pairs):
        apart = machine.differences(a["machine"], b["machine"])
        if apart and not force:
            raise SettingsError(
                f"measured on different machines ({'; '.join(apart)}): their ratio says nothing "
                "about the software; measure both on one, or compare with --force"
            )
        notes.update(dict.fromkeys(apart + _differences(a, b)))
    if any(len(runs) == 1 for pair in pairs for runs in pair):
        notes[ONE_RUN] = None
    changes = [change for a, b in pairs for change in _changes(a, b)]
    if any(change.rounds < FEWEST_ROUNDS for change in changes):
        notes[TOO_FEW] = None
    return Comparison(tuple(changes), tuple(unmatched), tuple(notes))


def ratio_of_medians(
    before: Sequence[Rounds], after: Sequence[Rounds], draws: int = DRAWS
) -> tuple[float, float, float]:
    """Return median(after) / median(before) and its 95 % interval, by bootstrap.

    before, after: runs, of rounds, of milliseconds. The frames of one round share the machine's
    mood, as do the rounds of one run: runs are drawn, then rounds in them, then frames in those.
    Source: Davison & Hinkley, Bootstrap Methods, section 3.8 (hierarchical data).
    """
    rng = np.random.default_rng(SEED)
    drawn = _drawn_medians(after, draws, rng) / _drawn_medians(before, draws, rng)
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(drawn, (tail, 1.0 - tail))
    return _median(after) / _median(before), float(low), float(high)


def _median(runs: Sequence[Rounds]) -> float:
    return float(np.median([ms for run in runs for one in run for ms in one]))


def _drawn_medians(
    runs: Sequence[Rounds], draws: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Medians of samples drawn with replacement, float64 [draws]."""
    rounds = [one for run in runs for one in run]
    lengths = np.array([len(one) for one in rounds])
    table = np.zeros((len(rounds), lengths.max()))
    for row, one in zip(table, rounds, strict=True):
        row[: len(one)] = one
    counts = np.array([len(run) for run in runs])
    starts = np.cumsum(counts) - counts

    def below(limits: npt.NDArray[np.int64], shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
        return np.asarray(rng.random(shape) * limits, np.int64)

    run = rng.integers(len(runs), size=(draws, len(runs))).repeat(round(counts.mean()), axis=1)
    row = starts[run] + below(counts[run], run.shape)
    at = row[:, :, None]
    frames = below(lengths[at], (*row.shape, round(lengths.mean())))
    return np.asarray(np.median(table[at, frames].reshape(draws, -1), axis=1))


def _paired(
    before: dict[tuple[object, ...], list[Record]], after: dict[tuple[object, ...], list[Record]]
) -> tuple[list[tuple[list[Record], list[Record]]], list[str]]:
    if len(before) == len(after) == 1:
        return list(zip(before.values(), after.values(), strict=True)), []
    pairs = [(before[key], after[key]) for key in before if key in after]
    alone = [variant_name(runs[-1]) for key, runs in before.items() if key not in after]
    new = [variant_name(runs[-1]) for key, runs in after.items() if key not in before]
    if not pairs:
        raise SettingsError(
            "the two files have no variant in common (bundle, device, backend, precision, steps, "
            "threads, batch, approximation); "
            f"the first has {' | '.join(alone)}; the second {' | '.join(new)}"
        )
    return pairs, alone + new


def variant_name(record: Record) -> str:
    """Return what was asked for, with the bundle."""
    asked, ran = record["variant"], record["ran"]
    threads = f", {asked['threads']} threads" if asked["threads"] else ""
    batch = f", {asked['batch']} at once" if asked["batch"] != 1 else ""
    way = f", approximate: {asked['approximate']}" if asked["approximate"] else ""
    return (
        f"{record['bundle']['name']}: {asked['backend']} {asked['precision']}, "
        f"{ran['steps']} steps{threads}{batch}{way}"
    )


def _differences(a: Record, b: Record) -> list[str]:
    """What else may explain a change, in words."""
    found = [
        f"{name} {a['versions'].get(name)} -> {b['versions'].get(name)}"
        for name in sorted({*a["versions"], *b["versions"]})
        if a["versions"].get(name) != b["versions"].get(name)
    ]
    if a["commit"] != b["commit"]:
        found.append(f"commit {a['commit']} -> {b['commit']}")
    for key in ("backend", "precision", "steps", "threads", "device", "approximate"):
        if a["ran"].get(key) != b["ran"].get(key):
            found.append(f"{key} {a['ran'].get(key)} -> {b['ran'].get(key)}")
    for key, name in (("weights_sha256", "weights"), ("image_size", "px")):
        if a["bundle"][key] != b["bundle"][key]:
            found.append(f"{name} {str(a['bundle'][key])[:12]} -> {str(b['bundle'][key])[:12]}")
    if a["frame"] != b["frame"]:
        found.append(f"frames {a['frame']} -> {b['frame']}")
    found += [f"{when}: {text}" for when, r in (("A", a), ("B", b)) for text in r["warnings"]]
    return found


def _changes(a: Sequence[Record], b: Sequence[Record]) -> list[Change]:
    made = []
    for stage in (s for s in a[-1]["samples_ms"] if s in b[-1]["samples_ms"]):
        before, after = ([run["samples_ms"][stage] for run in runs] for runs in (a, b))
        ratio, low, high = ratio_of_medians(before, after)
        name, rounds = variant_name(b[-1]), min(sum(map(len, runs)) for runs in (before, after))
        made.append(Change(name, stage, _median(before), _median(after), ratio, low, high, rounds))
    return made
