"""The latency that a session reports, against a mouth that opens at known times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.stopwatch import (
    FPS,
    Reading,
    measure,
    mouth_times,
    read_mouth,
    reading_of,
    write_driver,
)
from diffusionact import bundle_path, portrait_paths
from diffusionact.errors import BackendMissing
from diffusionact.runtime.clip import prepare_portrait
from diffusionact.runtime.live import LiveReport
from diffusionact.runtime.media import open_reader
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.timing import StageTimes
from diffusionact.runtime.tracker import open_tracker

SECONDS = 7.0
RAREST_MS = 250.0  # half of the shortest time that the mouth stays as it is
MOST_MISSED = 0.2  # of the mouth's changes, on a machine too busy to show each


def report(latency_ms: float, fps: float) -> LiveReport:
    times = StageTimes(100, latency_ms, latency_ms, latency_ms)
    return LiveReport(10.0, 1, round(10 * fps), times, {}, {}, 4, ())


def ideal(delay_s: float, fps: float) -> Reading:
    """A display that shows each change after just this delay, at its next frame."""
    times_s = mouth_times(30.0)
    moments = np.arange(0.0, 30.0, 1.0 / fps)
    is_open = np.array([sum(t + delay_s <= m for t in times_s) % 2 for m in moments], float)
    return reading_of(moments, is_open, times_s, report(100.0, fps))


def test_the_stopwatch_reads_a_known_delay_and_notices_a_wrong_one() -> None:
    right = ideal(0.1, 25.0)
    assert right.agrees and 100.0 <= right.delay_ms <= 140.0
    assert len(right.delays_ms) == right.events > 30
    assert not ideal(0.2, 25.0).agrees and not ideal(0.02, 25.0).agrees


def test_the_mouth_of_the_clip_moves_at_its_times(tmp_path: Path) -> None:
    times_s = mouth_times(4.0)
    write_driver(tmp_path / "mouth.mp4", 4.0, times_s)
    levels = [f.image_bgr for f in open_reader(tmp_path / "mouth.mp4") if f.image_bgr is not None]
    steps = np.abs(np.diff(np.stack(levels).astype(int), axis=0)).max(axis=(1, 2, 3))
    changes = (np.flatnonzero(steps > 60) + 1) / FPS
    np.testing.assert_allclose(changes, times_s, atol=1e-6)


def test_the_reported_latency_is_what_the_mouth_says(tmp_path: Path) -> None:
    try:
        open_tracker().close()
    except BackendMissing as missing:
        pytest.skip(str(missing))
    with Reenactor.load(bundle_path(), settings=Settings(steps=2)) as act:
        source = prepare_portrait(act, portrait_paths()[0])
        seen = measure(act, source, SECONDS, tmp_path)
    if seen.frame_ms > RAREST_MS:
        pytest.skip(f"{seen.frame_ms:.0f} ms a frame: this machine is too busy to show a mouth")
    assert len(seen.delays_ms) >= (1.0 - MOST_MISSED) * seen.events
    assert seen.agrees, seen
    times, openings = read_mouth(tmp_path / "shown.mp4", source)
    assert len(times) > 3 * SECONDS and np.mean((openings < 0.2) | (openings > 0.8)) > 0.6
