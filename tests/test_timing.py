from __future__ import annotations

import pytest

from diffusionact.runtime import timing


def test_laps_add_up_to_the_time_that_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100, 130, 150, 155])
    monkeypatch.setattr(timing.time, "monotonic_ns", lambda: next(clock))
    watch = timing.StopWatch()
    for stage in ("encode", "render", "encode"):
        watch.lap(stage)
    assert watch.times == {"encode": 35, "render": 20}
    assert list(watch.times) == ["encode", "render"]


def test_percentiles_are_in_milliseconds_and_end_with_the_total() -> None:
    frames = [{"track": i * 1_000_000, "render": 2_000_000} for i in range(1, 101)]
    frames.append({"render": 2_000_000})
    summary = timing.summarise(frames)
    assert list(summary) == ["track", "render", timing.TOTAL]
    assert summary["track"].count == 100 and summary["render"].count == 101
    assert summary["track"].p50_ms == pytest.approx(50.5)
    assert summary["track"].p95_ms == pytest.approx(95.05)
    assert summary["render"].p99_ms == 2.0
    assert summary[timing.TOTAL].p50_ms == pytest.approx(52.0)


def test_no_frames_have_no_percentiles() -> None:
    assert timing.summarise([]) == {}
