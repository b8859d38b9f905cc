"""The time that is left: of both passes of a clip, and how it is shown."""

from __future__ import annotations

import io
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest

from diffusionact.landmarks import Landmarks
from diffusionact.progress import Progress, StageProgress, TimeLeft, duration
from diffusionact.runtime import clip
from diffusionact.runtime.clip import run_clip
from diffusionact.runtime.reenactor import Reenactor
from tests.clips import ScriptedTracker, folder_of, moving, write_portrait

UInt8Array = npt.NDArray[np.uint8]
FRAMES, TRACK_S, RENDER_S = 50, 0.01, 0.04
WORST_ERROR = 0.01  # of the time that is really left, by a clock that stands still between frames


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def said() -> list[float | None]:
    return []


@pytest.fixture
def left(clock: Clock, said: list[float | None]) -> TimeLeft:
    return TimeLeft(lambda stage, done, total, left_s: said.append(left_s), clock)


def test_the_time_left_is_that_of_all_stages(
    left: TimeLeft, clock: Clock, said: list[float | None]
) -> None:
    left.expect("render", 0.5)
    show = left.stage("track", total=100)
    for done in range(1, 101):
        clock.now_s += 0.1
        show(done, 100)
    assert said[0] is None  # nothing is known of a stage that has done nothing
    assert said[1:] == pytest.approx([0.1 * (100 - n) + 50.0 for n in range(1, 101)])
    said.clear()
    show = left.stage("render", total=100)
    for done in range(1, 101):
        clock.now_s += 0.7  # slower than was expected
        show(done, 100)
    assert said[1:] == pytest.approx([0.7 * (100 - n) for n in range(1, 101)])


def test_the_last_units_tell_how_fast_the_next_ones_go(
    left: TimeLeft, clock: Clock, said: list[float | None]
) -> None:
    show = left.stage("render", total=400)
    for done in range(1, 301):
        clock.now_s += 1.0 if done <= 200 else 0.2
        show(done, 400)
    assert said[-1] == pytest.approx(20.0)


def test_what_was_there_already_says_nothing_of_the_speed(
    left: TimeLeft, clock: Clock, said: list[float | None]
) -> None:
    show = left.stage("render", 900, 1000)
    clock.now_s += 2.0
    show(901, 1000)
    assert said == [None, pytest.approx(198.0)]


def test_what_cannot_be_known_is_not_told(
    left: TimeLeft, clock: Clock, said: list[float | None]
) -> None:
    left.expect("render", None)
    show = left.stage("track", total=10)
    clock.now_s += 1.0
    show(1, 10)
    show = left.stage("render")
    show(1, None)
    assert said == [None] * 4


def test_the_time_left_of_a_clip_is_true(
    toy_bundle: Path,
    tmp_path: Path,
    portrait: tuple[UInt8Array, Landmarks],
    face: Landmarks,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clip, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(clip, "TimeLeft", partial(TimeLeft, clock=clock))

    class SlowTracker(ScriptedTracker):
        def track(self, image_bgr: UInt8Array) -> Landmarks:
            clock.now_s += TRACK_S
            return super().track(image_bgr)

    told: list[tuple[str, float, float]] = []

    def note(stage: str, done: int, total: int | None, left_s: float | None) -> None:
        if left_s is not None and 0.1 * FRAMES <= done <= 0.9 * FRAMES:
            told.append((stage, clock(), left_s))

    driver = folder_of(tmp_path / "driver", FRAMES)
    still = write_portrait(tmp_path / "portrait.png", *portrait)
    with Reenactor.load(toy_bundle, tracker=SlowTracker(moving(face, FRAMES))) as act:
        render = act._loop.render

        def slow(*arguments: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            clock.now_s += RENDER_S
            return render(*arguments)

        monkeypatch.setattr(act._loop, "render", slow)
        run_clip(act, still, driver, tmp_path / "out.mp4", progress=note)
    errors = np.array([left_s / (clock() - now_s) - 1.0 for _, now_s, left_s in told])
    assert {stage for stage, _, _ in told} == {"track", "render"}
    assert np.abs(errors).max() <= WORST_ERROR


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"),
     (3600, "1 h 00 min"), (7384, "2 h 03 min")],
)  # fmt: skip
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_lines_say_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusionact.progress.LINE_INTERVAL_S", 0.0)
    with StageProgress() as progress:
        progress("track", 0, 100, None)
        progress("track", 50, 100, 125.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "track: 0 of 100 frames"
    assert lines[1].startswith("track: 50 of 100 frames, ")
    assert lines[1].endswith(" a second, 2 min 05 s left")


def test_a_bar_says_what_is_left_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress("render", done=20) as progress:
        progress(20, 100, None)
        time.sleep(0.15)  # a bar is drawn ten times a second
        progress(60, 100, 125.0)
    assert "60/100" in terminal.getvalue() and "2 min 05 s left" in terminal.getvalue()
