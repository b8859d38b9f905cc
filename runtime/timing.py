"""Where a frame's time goes: laps of a monotonic clock, and percentiles over many frames."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

TOTAL = "total"


class StopWatch:
    """Laps since the start; a lap is the time from the one before it."""

    def __init__(self) -> None:
        self.times: dict[str, int] = {}
        self._last = time.monotonic_ns()

    def lap(self, stage: str) -> None:
        """Return nothing; adds the time since the last lap to `stage`."""
        now = time.monotonic_ns()
        self.times[stage] = self.times.get(stage, 0) + now - self._last
        self._last = now


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
