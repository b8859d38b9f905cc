"""Frames that are not tracked: only those that the next one replaces in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from diffusionact.landmarks import Landmarks
from diffusionact.runtime import pacing as module
from diffusionact.runtime.media import Frame
from diffusionact.runtime.pacing import Pacing
from diffusionact.runtime.reenactor import Result
from diffusionact.runtime.stream import Pipeline

MS = 1_000_000
FRAMES = 120


class Clock:
    def __init__(self) -> None:
        self.now_ns = 0

    def monotonic_ns(self) -> int:
        return self.now_ns


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def learnt(clock: Clock, period_ms: int, track_ms: int, render_ms: int) -> Pacing:
    """A pacing that has seen three frames of these times."""
    pacing = Pacing()
    for _ in range(3):
        pacing.leaves_out(clock.now_ns, clock.now_ns)
        with pacing.tracking():
            clock.now_ns += track_ms * MS
        with pacing.rendering():
            clock.now_ns += render_ms * MS
        clock.now_ns += (period_ms - track_ms - render_ms) * MS
    return pacing


@pytest.mark.parametrize(
    ("at_ms", "left_out"),
    [
        (0, True),  # the next comes at 33, is tracked at 41: the renderer is free at 60
        (18, True),  # ready at 59
        (20, False),  # at 61: too late, this one is wanted
        (50, False),
    ],
)
def test_a_frame_is_left_out_when_the_next_is_ready_in_time(
    clock: Clock, at_ms: int, left_out: bool
) -> None:
    pacing = learnt(clock, period_ms=33, track_ms=8, render_ms=60)
    begun_ns, last_ns = clock.now_ns, clock.now_ns - 33 * MS
    pacing._captured_ns = last_ns + at_ms * MS
    with pacing.rendering():
        now_ns = begun_ns + at_ms * MS
        assert pacing.leaves_out(now_ns, now_ns) is left_out


def test_nothing_is_left_out_while_the_renderer_is_free_or_unknown(clock: Clock) -> None:
    assert not learnt(clock, 33, 8, 60).leaves_out(clock.now_ns, clock.now_ns)
    fresh = Pacing()
    with fresh.rendering():  # the first: nobody knows how long it takes
        assert not fresh.leaves_out(0, 0)
        assert not fresh.leaves_out(33 * MS, 33 * MS)


def test_a_renderer_faster_than_the_camera_gets_every_frame(clock: Clock) -> None:
    pacing = learnt(clock, period_ms=33, track_ms=3, render_ms=12)
    with pacing.rendering():
        assert not pacing.leaves_out(clock.now_ns, clock.now_ns)


def test_one_hiccup_changes_no_expectation(clock: Clock) -> None:
    pacing = learnt(clock, period_ms=33, track_ms=8, render_ms=12)
    with pacing.rendering():
        clock.now_ns += 500 * MS
    with pacing.rendering():
        assert not pacing.leaves_out(clock.now_ns, clock.now_ns)


@dataclass(frozen=True)
class Camera:
    """A face at a steady rate, on the clock."""

    face: Landmarks
    live: bool
    name: str = "fake camera"
    length: None = None
    time_base: None = None

    def __iter__(self) -> Iterator[Frame]:
        due_s = time.monotonic()
        for _ in range(FRAMES):
            yield Frame(None, time.monotonic_ns(), 0, self.face)
            due_s += 0.01
            time.sleep(max(due_s - time.monotonic(), 0.0))


def tracked_and_shown(face: Landmarks, live: bool) -> tuple[int, int, int]:
    """How many frames a pipeline tracked and showed, and how many it says made way."""
    tracked = 0

    def find(frame: Frame) -> Landmarks | None:
        nonlocal tracked
        tracked += 1
        return frame.landmarks

    picture = np.zeros((2, 2, 3), np.uint8)

    def render(driver: Landmarks | None, pts_ns: int) -> Result:
        time.sleep(0.08 if live else 0.0)
        return Result(picture, picture, face, {})

    with Pipeline(Camera(face, live), find, render) as pipeline:
        shown = sum(rendered.frame is not None for rendered in pipeline)  # not a silent camera's
    return tracked, shown, sum(pipeline.dropped.values())


def test_few_faces_are_tracked_in_vain(face: Landmarks) -> None:
    """Eight frames come while one is rendered; tracking all of them would find 120 faces."""
    tracked, shown, dropped = tracked_and_shown(face, live=True)
    assert shown + dropped == FRAMES
    assert 8 <= shown <= tracked < FRAMES // 2  # of 15 that there is time for


def test_every_frame_of_a_file_is_tracked(face: Landmarks) -> None:
    assert tracked_and_shown(face, live=False) == (FRAMES, FRAMES, 0)
