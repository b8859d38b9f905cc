"""What a long session is judged by; and, slow, a session of two minutes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest

from benchmarks.soak import Sample, course, judge, record, sample, soak_live, watch
from diffusionact import bundle_path, driver_path, portrait_paths
from diffusionact.errors import BackendMissing
from diffusionact.runtime.tracker import open_tracker

linux = pytest.mark.skipif(sys.platform != "linux", reason="figures are of /proc")


def samples(
    memory_mb: Callable[[int], float] = lambda i: 300.0 + i % 3,
    threads: Callable[[int], int] = lambda i: 20,
    latency_ms: Callable[[int], float] = lambda i: 80.0 + i % 5,
) -> list[Sample]:
    return [
        Sample(float(i), memory_mb(i), threads(i), 9, (latency_ms(i),) * 20) for i in range(100)
    ]


def test_a_session_that_keeps_its_size_is_flat() -> None:
    verdict = judge(samples())
    assert verdict.flat
    assert verdict.faces == 2000 and len(verdict.p99_ms) == 4
    # Memory of the first frames is not a leak.
    assert judge(samples(memory_mb=lambda i: 300.0 - 100.0 * (i < 10))).flat


@pytest.mark.parametrize(
    "grows",
    [
        {"memory_mb": lambda i: 300.0 + 0.5 * i},
        {"threads": lambda i: 20 + i // 30},
        {"latency_ms": lambda i: 80.0 * (1.0 + i / 100.0)},
    ],
)
def test_what_grows_is_noticed(grows: dict[str, Callable[[int], float]]) -> None:
    assert not judge(samples(**grows)).flat  # type: ignore[arg-type]


def test_a_tail_that_grows_and_faces_that_end_are_noticed() -> None:
    tail = samples()
    for i in range(75, 100):
        tail[i] = Sample(float(i), 300.0, 20, 9, (80.0,) * 18 + (400.0,) * 2)
    assert not judge(tail).flat
    ended = [*samples()[:60], *(Sample(60.0 + i, 300.0, 20, 9) for i in range(40))]
    assert not judge(ended).flat
    assert judge([Sample(float(i), 300.0, 20, 9) for i in range(100)]).flat  # of a mere process


def test_a_record_tells_start_end_and_slope() -> None:
    told = record(samples(memory_mb=lambda i: 300.0 + i / 36.0))  # 100 MB an hour
    assert told["memory_mb_start_end"] == [300.0, 302.8]
    assert told["memory_mb_an_hour"] == pytest.approx(100.0, abs=0.1)
    assert told["threads_an_hour"] == pytest.approx(0.0, abs=0.1) and told["flat"]
    assert [one["at_s"] for one in told["course"]][-1] == 99.0


def test_the_course_of_a_session_is_told_by_intervals() -> None:
    quiet = [Sample(100.0 + i, 300.0, 20, 9) for i in range(100)]
    whole = course([*samples(), *quiet], 4)
    assert [one.faces for one in whole] == [1000, 1000, 0, 0]
    assert whole[0].p50_ms == 82.0 and whole[3].p50_ms is None


@linux
def test_this_process_can_be_watched() -> None:
    now = sample(os.getpid(), 1.0)
    assert now.memory_mb > 10.0 and now.threads >= 1 and now.files >= 3
    seen = iter([[(5, 1_000_000)], [(5, 1_000_000), (6, 3_000_000)], []])
    got = watch(os.getpid(), 1.2, lambda: next(seen, []), quiet=True)
    assert [ms for one in got for ms in one.latencies_ms] == [1.0, 3.0]


@linux
@pytest.mark.slow
def test_two_minutes_of_live_are_flat() -> None:
    try:
        open_tracker().close()
    except BackendMissing as missing:
        pytest.skip(str(missing))
    verdict = judge(soak_live(bundle_path(), portrait_paths()[0], driver_path(), 120.0, quiet=True))
    assert verdict.flat, verdict
    assert verdict.faces > 120
