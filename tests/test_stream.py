"""Streaming: every frame of a file, the newest of a camera, and errors that end all threads."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import pytest

from diffusionact.errors import MediaError
from diffusionact.landmarks import Landmarks, Track
from diffusionact.runtime import stream as stream_module
from diffusionact.runtime.handover import Slot
from diffusionact.runtime.media import Frame, TrackReader, open_reader
from diffusionact.runtime.reenactor import Reenactor, Result
from diffusionact.runtime.source import Source
from diffusionact.runtime.stream import Pipeline, stream
from diffusionact.runtime.writer import open_writer

UInt8Array = npt.NDArray[np.uint8]
GOLDEN = Path(__file__).parent / "golden"
WAIT_S = 20.0  # for a thread that is about to end; longer means it hangs


class Sink:
    """Keeps the times of what it is given."""

    wants_pictures = True

    def __init__(self, delay_s: float = 0.0, fail_at: int = -1) -> None:
        self.times: list[int] = []
        self._delay_s, self._fail_at = delay_s, fail_at

    def write(
        self, image_bgr: UInt8Array | None, pts_ns: int, duration_ns: int, landmarks: Landmarks
    ) -> None:
        if len(self.times) == self._fail_at:
            raise MediaError("disk full")
        time.sleep(self._delay_s)
        self.times.append(pts_ns)

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


@dataclass(frozen=True)
class Camera:
    """A face at a steady rate; the clock is the capture time."""

    face: Landmarks
    count: int
    period_s: float
    fail: bool = False
    name: str = "fake camera"
    live: bool = True
    length: None = None
    time_base: None = None

    def __iter__(self) -> Iterator[Frame]:
        for _ in range(self.count):
            yield Frame(None, time.monotonic_ns(), 0, self.face)
            time.sleep(self.period_s)
        if self.fail:
            raise MediaError("unplugged")


@pytest.fixture
def act(toy_bundle: Path) -> Iterator[Reenactor]:
    with Reenactor.load(toy_bundle) as made:
        yield made


@pytest.fixture
def source(act: Reenactor, portrait: tuple[UInt8Array, Landmarks]) -> Source:
    return act.prepare(portrait[0], landmarks=portrait[1])


def test_every_frame_of_a_file_arrives_in_order(act: Reenactor, source: Source) -> None:
    track = Track.load(GOLDEN / "driver_gaps.npz")
    sink = Sink()
    report = stream(act, source, TrackReader("track", track), sink)
    assert sink.times == track.pts_ns.tolist()
    assert (report.frames, report.dropped, report.latency) == (len(track), 0, None)
    assert {"render", "write"} <= set(report.times)


def test_live_frames_are_dropped_rather_than_delayed(
    act: Reenactor, source: Source, face: Landmarks
) -> None:
    sink = Sink(delay_s=0.05)
    report = stream(act, source, Camera(face, 60, 0.005), sink)
    assert report.dropped > 0
    assert report.frames < 60
    assert sink.times == sorted(sink.times)
    assert report.latency is not None and report.latency.count == report.frames


def test_stop_ends_the_stream(act: Reenactor, source: Source, face: Landmarks) -> None:
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    begun = time.monotonic()
    stream(act, source, Camera(face, 1_000_000, 0.005), Sink(), stop)
    assert time.monotonic() - begun < WAIT_S


@pytest.mark.parametrize("where", ["reader", "sink", "render"])
def test_an_error_anywhere_ends_all(
    act: Reenactor,
    source: Source,
    face: Landmarks,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise MediaError("no render")

    count = 5 if where == "reader" else 1_000_000
    camera = Camera(face, count, 0.002, fail=where == "reader")
    sink = Sink(fail_at=2 if where == "sink" else -1)
    if where == "render":
        monkeypatch.setattr(act, "reenact", broken)
    before = threading.active_count()
    with pytest.raises(MediaError, match={"reader": "unplugged", "sink": "disk full"}.get(where)):
        stream(act, source, camera, sink)
    assert threading.active_count() == before


def test_a_slot_keeps_the_newest_or_waits() -> None:
    newest: Slot[int] = Slot(newest_wins=True)
    for i in range(3):
        assert newest.put(i)
    assert (newest.get(), newest.dropped) == (2, 2)
    patient: Slot[int] = Slot(newest_wins=False)
    got: list[int | None] = []
    taker = threading.Thread(target=lambda: got.extend(iter(patient.get, None)))
    taker.start()
    assert all(patient.put(i) for i in range(50))
    patient.close()
    taker.join(WAIT_S)
    assert got == list(range(50))
    assert not patient.put(51)


@pytest.mark.parametrize("inside_with", [False, True])
def test_a_file_is_complete_when_the_stream_ends(
    act: Reenactor, source: Source, tmp_path: Path, inside_with: bool
) -> None:
    track = Track.load(GOLDEN / "driver_nod.npz")
    writer = open_writer(tmp_path / "out.mp4")
    with writer if inside_with else contextlib.nullcontext():
        stream(act, source, TrackReader("track", track), writer)
    assert len(list(open_reader(tmp_path / "out.mp4"))) == len(track)
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


def test_a_stream_that_fails_leaves_nothing_behind(
    act: Reenactor, source: Source, face: Landmarks, tmp_path: Path
) -> None:
    with pytest.raises(MediaError, match="unplugged"):
        stream(act, source, Camera(face, 5, 0.002, fail=True), open_writer(tmp_path / "out.mp4"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_offered_to_a_slot_displaces_nothing() -> None:
    slot: Slot[int] = Slot(newest_wins=True)
    assert slot.offer(1) and slot.offer(2)
    assert (slot.get(), slot.dropped) == (1, 0)
    slot.close()
    assert not slot.offer(3) and slot.get() is None


def test_a_slow_camera_is_not_taken_for_a_silent_one(
    act: Reenactor, source: Source, face: Landmarks
) -> None:
    """Five pictures a second, as webcams send in the dark; then silence."""

    class Silent(Camera):
        def __iter__(self) -> Iterator[Frame]:
            yield from super().__iter__()
            time.sleep(0.8)

    with Pipeline(
        Silent(face, 5, 0.2), lambda frame: frame.landmarks,
        lambda driver, pts_ns: act.reenact(driver, source, pts_ns),
    ) as pipeline:  # fmt: skip
        shown = [rendered.frame is not None for rendered in pipeline]
    assert shown[:5] == [True] * 5 and len(shown) >= 8 and not any(shown[5:])
    assert sum(pipeline.dropped.values()) == 0


def test_a_slot_is_waited_for_no_longer_than_asked() -> None:
    slot: Slot[int] = Slot(newest_wins=True)
    begun = time.monotonic()
    assert slot.get(0.05) is None
    assert 0.05 <= time.monotonic() - begun < WAIT_S
    assert not slot.ended  # the time was up, the hand-over goes on
    slot.put(1)
    slot.close()
    assert not slot.ended and slot.get(0.05) == 1
    assert slot.ended


def test_a_camera_that_never_answers_does_not_hold_the_end_up(
    act: Reenactor, source: Source, face: Landmarks, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()

    class Hanging(Camera):
        def __iter__(self) -> Iterator[Frame]:
            yield from super().__iter__()
            answered.wait(WAIT_S)  # a driver's own call, which nothing interrupts

    monkeypatch.setattr(stream_module, "END_S", 0.2)
    pipeline = Pipeline(
        Hanging(face, 3, 0.001), lambda frame: frame.landmarks,
        lambda driver, pts_ns: act.reenact(driver, source, pts_ns),
    )  # fmt: skip
    begun = time.monotonic()
    with pipeline:
        assert pipeline.get(WAIT_S) is not None
    assert time.monotonic() - begun < WAIT_S / 2
    answered.set()


def test_tracking_and_rendering_overlap(face: Landmarks, act: Reenactor, source: Source) -> None:
    """The tracker is at work on each frame while the one before it is rendered: they meet."""
    rest, track = act.rest(source), Track.load(GOLDEN / "driver_nod.npz")
    meeting = threading.Barrier(2, timeout=WAIT_S)
    found, rendered = itertools.count(), itertools.count()

    def find(frame: Frame) -> Landmarks | None:
        if next(found) > 0:
            meeting.wait()
        return frame.landmarks

    def render(driver: Landmarks | None, pts_ns: int) -> Result:
        if next(rendered) < len(track) - 1:
            meeting.wait()
        return rest

    with Pipeline(TrackReader("track", track), find, render) as pipeline:
        assert sum(1 for _ in pipeline) == len(track)
