"""Where a frame's time goes: laps of a monotonic clock, and percentiles over many frames."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TOTAL = "total"
# Of a Tally: bins from 1 us to 1000 s, each 1 % wide, so that what it keeps never grows.
FINEST_NS, BINS_PER_E, TALLY_BINS = 1_000.0, 100.0, 2073


class Times(dict[str, int]):
    """Stage -> nanoseconds in order, and when the first of them began."""

    def __init__(self, begun_ns: int) -> None:
        super().__init__()
        self.begun_ns = begun_ns  # on the monotonic clock

    def spans(self) -> Iterator[tuple[str, int, int]]:
        """Yield (stage, begin, duration), nanoseconds, of stages that had one lap each."""
        begun_ns = self.begun_ns
        for stage, spent_ns in self.items():
            yield stage, begun_ns, spent_ns
            begun_ns += spent_ns


class StopWatch:
    """Laps since the start; a lap is the time from the one before it.

    begun_ns: when it started, on the monotonic clock; None is now.
    """

    def __init__(self, begun_ns: int | None = None) -> None:
        self._last = time.monotonic_ns() if begun_ns is None else begun_ns
        self.times = Times(self._last)

    def lap(self, stage: str, now_ns: int | None = None) -> None:
        """Return nothing; adds the time since the last lap to `stage`.

        now_ns: when it ended, on the monotonic clock; None is now.
        """
        now = time.monotonic_ns() if now_ns is None else now_ns
        self.times[stage] = self.times.get(stage, 0) + now - self._last
        self._last = now

    def take(self, times: Mapping[str, int]) -> None:
        """Return nothing; adds laps that another watch took since the last lap."""
        for stage, spent_ns in times.items():
            self.times[stage] = self.times.get(stage, 0) + spent_ns
        self._last = time.monotonic_ns()


@dataclass(frozen=True)
class StageTimes:
    """Percentiles of one stage over `count` frames, milliseconds."""

    count: int
    p50_ms: float
    p95_ms: float
    p99_ms: float


def summarise(frames: Iterable[Mapping[str, int]]) -> dict[str, StageTimes]:
    """Return the percentiles of every stage in order of appearance, and of their sum as "total".

    frames: per frame, stage -> nanoseconds, as `Result.times`; a stage may be absent from some.
    """
    stages: dict[str, list[int]] = {}
    totals: list[int] = []
    for times in frames:
        totals.append(sum(times.values()))
        for stage, spent_ns in times.items():
            stages.setdefault(stage, []).append(spent_ns)
    if not totals:
        return {}
    return {stage: _percentiles(spent) for stage, spent in {**stages, TOTAL: totals}.items()}


def _percentiles(spent_ns: list[int]) -> StageTimes:
    p50, p95, p99 = np.percentile(np.array(spent_ns) / 1e6, (50, 95, 99))
    return StageTimes(len(spent_ns), float(p50), float(p95), float(p99))


class Tally:
    """The percentiles of `summarise` for frames without end, in memory that is fixed: each the time
    of a frame, not one between two, and within 1 % of it."""

    def __init__(self) -> None:
        self._bins: dict[str, npt.NDArray[np.int64]] = {}

    def add(self, times: Mapping[str, int]) -> None:
        """Return nothing; counts one frame, stage -> nanoseconds, and its sum as "total"."""
        for stage, spent_ns in times.items():
            self._count(stage, spent_ns)
        self._count(TOTAL, sum(times.values()))

    def summary(self) -> dict[str, StageTimes]:
        """Return the percentiles of every stage in order of appearance, "total" last."""
        stages = sorted(self._bins, key=lambda stage: stage == TOTAL)
        return {stage: _of_bins(self._bins[stage]) for stage in stages}

    def _count(self, stage: str, spent_ns: int) -> None:
        if stage not in self._bins:
            self._bins[stage] = np.zeros(TALLY_BINS, np.int64)
        place = round(BINS_PER_E * math.log(max(spent_ns, FINEST_NS) / FINEST_NS))
        self._bins[stage][min(place, TALLY_BINS - 1)] += 1


def _of_bins(bins: npt.NDArray[np.int64]) -> StageTimes:
    counted = np.cumsum(bins)
    count = int(counted[-1])
    places = np.searchsorted(counted, np.array((0.50, 0.95, 0.99)) * count)
    p50, p95, p99 = FINEST_NS * np.exp(places / BINS_PER_E) / 1e6
    return StageTimes(count, float(p50), float(p95), float(p99))
