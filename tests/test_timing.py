from __future__ import annotations

import time

import numpy as np
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


def test_spans_follow_one_another_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100, 130, 150])
    monkeypatch.setattr(timing.time, "monotonic_ns", lambda: next(clock))
    watch = timing.StopWatch()
    for stage in ("encode", "render"):
        watch.lap(stage)
    assert list(watch.times.spans()) == [("encode", 100, 30), ("render", 130, 20)]


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


def test_a_tally_agrees_with_the_percentiles_and_does_not_grow() -> None:
    rng = np.random.default_rng(0)
    frames = [{"track": int(a), "render": int(b)} for a, b in rng.lognormal(16, 0.4, (2000, 2))]
    tally = timing.Tally()
    for times in frames:
        tally.add(times)
    exact, seen = timing.summarise(frames), tally.summary()
    assert list(seen) == list(exact)
    for stage, wanted in exact.items():
        got = seen[stage]
        assert got.count == wanted.count
        for name in ("p50_ms", "p95_ms", "p99_ms"):
            assert getattr(got, name) == pytest.approx(getattr(wanted, name), rel=0.015), stage


def test_a_tally_holds_what_is_very_short_and_very_long() -> None:
    tally = timing.Tally()
    for spent_ns in (0, 5, 10**15):
        tally.add({"stage": spent_ns})
    assert tally.summary()["stage"].count == 3
    assert tally.summary()["stage"].p99_ms == pytest.approx(1e6, rel=0.02)


def test_a_watch_may_begin_in_the_past_and_take_anothers_laps() -> None:
    now_ns = time.monotonic_ns()
    watch = timing.StopWatch(now_ns - 50_000_000)
    watch.lap("read")
    watch.take({"render": 7, "read": 1})
    watch.lap("show")
    assert 50_000_000 <= watch.times["read"] < 60_000_000
    assert watch.times["render"] == 7 and watch.times["show"] < 10_000_000
