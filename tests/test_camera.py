"""Cameras that come, go and come back, and clips in their place."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pytest

from diffusionact.errors import MediaError, SettingsError
from diffusionact.landmarks import Landmarks, Track
from diffusionact.runtime import camera as camera_module
from diffusionact.runtime.camera import (
    MOST_LATE_NS,
    CameraError,
    ClipCamera,
    DeviceCamera,
    LiveCamera,
    Pictures,
    open_camera,
)
from diffusionact.runtime.media import FRAME_NS, NS, Frame, TrackReader
from tests.clips import grey, write

WAIT_S = 10.0
CLOCK_NS = 40_000_000  # that a sleep may take longer on a busy machine


def track(face: Landmarks, count: int, step_ns: int = FRAME_NS) -> TrackReader:
    return TrackReader(
        "track",
        Track(
            np.stack([face.points] * count), np.stack([face.gaze] * count),
            np.arange(count, dtype=np.int64) * step_ns, (64, 64),
        ),
    )  # fmt: skip


def test_a_clips_frames_come_when_they_are_due(tmp_path: Path, face: Landmarks) -> None:
    times = [0, 30_000_000, 130_000_000, 150_000_000]
    write(tmp_path / "clip.mp4", [grey(40 * i) for i in range(4)], times, face)
    camera = open_camera(str(tmp_path / "clip.mp4"), realtime=True)
    assert camera.live and camera.length == 4
    came_ns, frames = [], []
    for frame in camera:
        came_ns.append(time.monotonic_ns())
        frames.append(frame)
    due = np.array([frame.pts_ns for frame in frames])
    assert (due - due[0]).tolist() == pytest.approx(times, abs=20_000)
    late = np.array(came_ns) - due
    assert (late >= 0).all() and np.median(late) < CLOCK_NS


def test_the_clock_of_a_clip_starts_when_it_is_read(face: Landmarks) -> None:
    camera = ClipCamera(track(face, 3))
    time.sleep(0.3)
    first = next(iter(camera))
    assert time.monotonic_ns() - first.pts_ns < CLOCK_NS


def test_a_looped_clip_goes_on_in_time(face: Landmarks) -> None:
    camera = ClipCamera(track(face, 3, 10_000_000), loop=True)
    due = []
    for frame in camera:
        due.append(frame.pts_ns)
        if len(due) == 10:
            camera.close()
    assert np.diff(due).tolist() == [10_000_000] * 9
    assert camera.length is None


@dataclass(frozen=True)
class Bare:
    """A clip that tells nothing but its frames."""

    frames: list[Frame]
    name: str = "bare"
    live: bool = False
    length: int | None = None
    time_base: None = None

    def __iter__(self) -> Iterator[Frame]:
        return iter(self.frames)


def test_a_looped_clip_takes_its_time_whatever_its_file_says() -> None:
    camera, due = ClipCamera(Bare([Frame(grey(9), 0, 0)]), loop=True), []
    for frame in camera:
        due.append(frame.pts_ns)
        if len(due) == 3:
            camera.close()
    assert np.diff(due).tolist() == [FRAME_NS] * 2
    assert list(ClipCamera(Bare([]), loop=True)) == []


@dataclass(frozen=True)
class Slow(Bare):
    """A clip of which a frame takes longer to read than it lasts."""

    def __iter__(self) -> Iterator[Frame]:
        for frame in self.frames:
            time.sleep(0.06)
            yield frame


def test_the_frames_of_a_clip_that_is_read_slowly_do_not_grow_old() -> None:
    clip = Slow([Frame(grey(9), i * 10_000_000) for i in range(20)])
    ages_ns = [time.monotonic_ns() - frame.pts_ns for frame in ClipCamera(clip)]
    assert max(ages_ns) < MOST_LATE_NS + CLOCK_NS  # 20 frames, each 50 ms later than it should be


def test_a_clip_that_is_not_by_the_clock_waits_to_be_taken(face: Landmarks) -> None:
    camera = ClipCamera(track(face, 5), realtime=False)
    assert not camera.live
    assert [frame.pts_ns for frame in camera] == [i * FRAME_NS for i in range(5)]


@pytest.mark.parametrize("realtime", [True, False])
def test_a_closed_clip_ends_at_once(face: Landmarks, realtime: bool) -> None:
    camera = ClipCamera(track(face, 3, 60 * NS), realtime)
    threading.Timer(0.1, camera.close).start()
    begun_s = time.monotonic()
    for _ in camera:
        time.sleep(0.2)
    assert time.monotonic() - begun_s < WAIT_S


@pytest.mark.parametrize(
    ("spec", "how", "word"),
    [
        ("clip.mp4", {"loop": True}, "--realtime"),
        ("0", {"realtime": True}, "for clips"),
        ("/dev/video0", {"loop": True}, "for clips"),
        ("rtsp://door/1", {"realtime": True}, "for clips"),
    ],
)
def test_options_that_mean_nothing_are_refused(spec: str, how: dict[str, bool], word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        open_camera(spec, **how)


@pytest.mark.parametrize("spec", ["77", "/dev/video77", "http://127.0.0.1:9/none"])
def test_a_camera_that_is_not_there_is_named(spec: str, capfd: pytest.CaptureFixture[str]) -> None:
    camera = open_camera(spec)
    with pytest.raises(MediaError, match=f"camera {spec} cannot be opened"):
        next(iter(camera))


@dataclass
class Plug:
    """A camera on a cable: `pictures` a plugging-in, each of so many frames; None: no camera."""

    pictures: list[int | None]
    opened: int = 0
    released: int = 0
    left: int = 0
    times: list[float] = field(default_factory=list)

    def open(self) -> Pictures:
        self.times.append(time.monotonic())
        count = self.pictures.pop(0) if self.pictures else None
        if count is None:
            raise CameraError("camera 0 cannot be opened")
        self.opened, self.left = self.opened + 1, count
        return self

    def read(self) -> Frame:
        if not self.left:
            raise CameraError("camera 0 stopped sending; plug it in again")
        self.left -= 1
        return Frame(grey(9), time.monotonic_ns())

    def close(self) -> None:
        self.released += 1


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(camera_module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(camera_module, "LONGEST_WAIT_S", 0.04)
    yield


def test_an_unplugged_camera_is_taken_up_again(
    quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    plug = Plug([3, None, None, 2, None, 1])
    camera = LiveCamera("camera 0", plug.open)
    with caplog.at_level(logging.INFO):
        frames = []
        for frame in camera:
            frames.append(frame)
            if len(frames) == 6:
                camera.close()
    assert (plug.opened, plug.released) == (3, 3)
    said = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert "stopped sending; plug it in again; waiting" in said[0]
    assert "camera 0 is back after" in said[1]
    assert len(said) == 4


def test_the_wait_for_a_camera_grows_to_a_bound(quick: None) -> None:
    plug = Plug([1, *[None] * 30])
    camera = LiveCamera("camera 0", plug.open)
    threading.Timer(0.6, camera.close).start()
    begun_s = time.monotonic()
    assert len(list(camera)) == 1
    assert time.monotonic() - begun_s < WAIT_S
    gaps = np.diff(plug.times)[1:]
    assert gaps[0] < 0.035 and gaps[3:].min() >= 0.039  # 10, 20, 40, 40, 40 ms
    assert plug.opened == plug.released == 1


def test_a_camera_that_never_was_there_is_an_error() -> None:
    with pytest.raises(CameraError, match="cannot be opened"):
        list(LiveCamera("camera 0", Plug([None]).open))


class Capture:
    """What OpenCV gives for a device."""

    def __init__(self, stamp_ms: float, image: np.ndarray | None = None) -> None:
        self._stamp_ms, self._image = stamp_ms, grey(9) if image is None else image

    def read(self) -> tuple[bool, np.ndarray | None]:
        return True, self._image

    def get(self, which: int) -> float:
        assert which == cv2.CAP_PROP_POS_MSEC
        return self._stamp_ms

    def release(self) -> None:
        pass


@pytest.mark.parametrize(("ago_ms", "believed"), [(35.0, True), (5000.0, False), (-50.0, False)])
def test_the_drivers_time_of_capture_is_taken_where_it_can_be(
    ago_ms: float, believed: bool
) -> None:
    now_ms = time.monotonic_ns() / 1e6
    frame = DeviceCamera("0", Capture(now_ms - ago_ms)).read()
    wanted_ms = now_ms - ago_ms if believed else now_ms
    assert frame.pts_ns / 1e6 == pytest.approx(wanted_ms, abs=0.01 if believed else 30.0)
    assert DeviceCamera("0", Capture(0.0)).read().pts_ns / 1e6 >= now_ms  # no stamp at all


@pytest.mark.parametrize("shape", [(48, 64), (48, 64, 1)])
def test_a_camera_without_colours_gives_three_of_them(shape: tuple[int, ...]) -> None:
    image = DeviceCamera("0", Capture(0.0, np.full(shape, 7, np.uint8))).read().image_bgr
    assert image is not None and np.array_equal(image, grey(7))
