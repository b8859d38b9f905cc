"""Frames from a reader to a sink while they come: reading, tracking, rendering and showing overlap.

Each hand-over holds one frame. Live, a newer frame takes the place of one that waits, so that
delay never grows; from files every frame is kept. The only threads of the package are here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

from diffusionact.errors import NoFace
from diffusionact.landmarks import Landmarks
from diffusionact.runtime.media import FRAME_NS, Frame, Reader, TrackReader
from diffusionact.runtime.reenactor import Reenactor, Result
from diffusionact.runtime.source import Source
from diffusionact.runtime.timing import StageTimes, StopWatch, Tally
from diffusionact.runtime.tracker import Tracker
from diffusionact.runtime.writer import Writer

T = TypeVar("T")

IDLE_S = 0.15  # of silence from a camera, then the portrait is moved without it, towards rest
END_S = 5.0  # that a reader gets to end: a driver of a camera may sit in a call of its own


class Slot(Generic[T]):
    """A hand-over of depth one between two threads. newest_wins: put replaces what waits."""

    def __init__(self, newest_wins: bool) -> None:
        self._newest_wins = newest_wins
        self._changed = threading.Condition()
        self._item: T | None = None
        self._closed = False
        self.dropped = 0

    def put(self, item: T) -> bool:
        """Return False when the slot was closed and the item is not wanted any more."""
        with self._changed:
            if not self._newest_wins:
                self._changed.wait_for(lambda: self._item is None or self._closed)
            if self._closed:
                return False
            self.dropped += self._item is not None
            self._item = item
            self._changed.notify_all()
            return True

    def get(self, timeout_s: float | None = None) -> T | None:
        """Return the next item, or None when the slot is closed and empty, or the time is up."""
        with self._changed:
            self._changed.wait_for(lambda: self._item is not None or self._closed, timeout_s)
            item, self._item = self._item, None
            self._changed.notify_all()
            return item

    @property
    def ended(self) -> bool:
        """Whether nothing is left, and nothing will come."""
        with self._changed:
            return self._closed and self._item is None

    def close(self) -> None:
        """End the hand-over: what waits can still be taken, nothing more be put."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Workers:
    """Threads whose first error is raised by `join`."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def start(self, name: str, work: Callable[[], None], *at_end: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._guard, args=(work, at_end), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def join(self, timeout_s: float | None = None) -> None:
        """Return when all have ended, or the time is up. Raises: the first error of any."""
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(None if until_s is None else max(until_s - time.monotonic(), 0.0))
        if self._errors:
            raise self._errors[0]

    def _guard(self, work: Callable[[], None], at_end: tuple[Callable[[], None], ...]) -> None:
        try:
            work()
        except BaseException as error:
            self._errors.append(error)
        finally:
            for end in at_end:
                end()


@dataclass(frozen=True)
class Rendered:
    """One picture to show. frame: what it was rendered from, None when nothing came and the
    portrait moved by itself; watch: laps of all stages since the frame's capture."""

    result: Result
    frame: Frame | None
    watch: StopWatch

    @property
    def is_new_face(self) -> bool:
        """Whether it shows a driver's face from a frame of its own: each is rendered once."""
        return self.frame is not None and self.result.seen


@dataclass(frozen=True)
class _Tracked:
    frame: Frame | None
    face: Landmarks | None
    pts_ns: int
    watch: StopWatch


class Pipeline:
    """Reader, tracker and renderer in threads of their own; the results come to the caller's.

    find: the face of a frame; render: the picture for a face (or None) at a time, ns.
    """

    def __init__(
        self,
        reader: Reader,
        find: Callable[[Frame], Landmarks | None],
        render: Callable[[Landmarks | None, int], Result],
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        """interrupt: wakes a reader that waits for its camera, when all is to end."""
        self._reader, self._find, self._render = reader, find, render
        self._interrupt = interrupt
        self._frames: Slot[tuple[Frame, StopWatch]] = Slot(newest_wins=reader.live)
        self._faces: Slot[_Tracked] = Slot(newest_wins=reader.live)
        self._results: Slot[Rendered] = Slot(newest_wins=reader.live)
        self._workers = Workers()

    @property
    def dropped(self) -> Mapping[str, int]:
        """Return how many were replaced by newer ones before each stage."""
        return {
            "track": self._frames.dropped,
            "render": self._faces.dropped,
            "show": self._results.dropped,
        }

    @property
    def ended(self) -> bool:
        """Whether the last result was taken."""
        return self._results.ended

    def get(self, timeout_s: float | None = None) -> Rendered | None:
        """Return the next result, or None at the end, or when the time is up."""
        return self._results.get(timeout_s)

    def __iter__(self) -> Iterator[Rendered]:
        while (rendered := self.get()) is not None:
            yield rendered

    def __enter__(self) -> Pipeline:
        start, close = self._workers.start, (self._frames.close, self._faces.close)
        start("reader", self._read, self._frames.close)
        start("tracker", self._track, *close)
        start("renderer", self._draw, *close, self._results.close)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End all threads. Raises: the first error of any of them, unless one is on its way."""
        for slot in (self._frames, self._faces, self._results):
            slot.close()
        self._interrupt()
        try:
            self._workers.join(END_S)
        except BaseException:
            if kind is None:
                raise

    def _read(self) -> None:
        # Of a camera the time of capture is known, of a file that of its first byte is not.
        watch = StopWatch()
        for frame in self._reader:
            if self._reader.live:
                watch = StopWatch(frame.pts_ns)
            watch.lap("read")
            if not self._frames.put((frame, watch)):
                return
            watch = StopWatch()

    def _track(self) -> None:
        while not self._frames.ended:
            if (item := self._frames.get(IDLE_S)) is None:
                if not self._reader.live or self._frames.ended:
                    continue
                now_ns = time.monotonic_ns()
                tracked = _Tracked(None, None, now_ns, StopWatch(now_ns))
            else:
                frame, watch = item
                watch.lap("wait for tracker")
                face = self._find(frame)
                watch.lap("track")
                tracked = _Tracked(frame, face, frame.pts_ns, watch)
            if not self._faces.put(tracked):
                return

    def _draw(self) -> None:
        while (tracked := self._faces.get()) is not None:
            watch = tracked.watch
            watch.lap("wait for renderer")
            result = self._render(tracked.face, tracked.pts_ns)
            watch.take(result.times)
            if not self._results.put(Rendered(result, tracked.frame, watch)):
                return


def find_with(tracker: Callable[[], Tracker]) -> Callable[[Frame], Landmarks | None]:
    """Return what finds the face of a frame: its own landmarks, else the tracker's; None where
    there is none. The tracker is asked for when the first picture comes."""

    def find(frame: Frame) -> Landmarks | None:
        if frame.image_bgr is None:
            return frame.landmarks
        try:
            return tracker().track(frame.image_bgr)
        except NoFace:
            return None

    return find


@dataclass(frozen=True)
class StreamReport:
    """frames: written; dropped: replaced by newer ones; seconds: spent; times: percentiles a
    stage; latency: from capture until the sink has the frame, of a live reader."""

    frames: int
    dropped: int
    seconds: float
    times: Mapping[str, StageTimes]
    latency: StageTimes | None


def stream(
    act: Reenactor,
    source: Source,
    reader: Reader,
    sink: Writer,
    stop: threading.Event | None = None,
) -> StreamReport:
    """Return what was done when the reader ends or `stop` is set; the sink is closed then, and
    its file complete.

    The neutral face is the first second's, or the calmest frame of a recorded track. An error in
    any thread ends all of them and is raised here, and the sink leaves nothing behind.
    """
    begun_s = time.monotonic()
    session = act.session(source)
    session.start(reader.track if isinstance(reader, TrackReader) else None)
    frames, tally = 0, Tally()
    pipeline = Pipeline(
        reader,
        find_with(lambda: act.tracker),
        lambda face, pts_ns: act.reenact(face, session, pts_ns),
    )
    with sink, pipeline:
        for rendered in pipeline:
            if (frame := rendered.frame) is not None:
                result, watch = rendered.result, rendered.watch
                watch.lap("wait for writer")
                span_ns = frame.duration_ns or FRAME_NS
                sink.write(result.frame, frame.pts_ns, span_ns, result.landmarks)
                watch.lap("write")
                tally.add(watch.times)
                frames += 1
            if stop is not None and stop.is_set():
                break
    times = tally.summary()
    latency = times.get("total") if reader.live else None
    dropped = sum(pipeline.dropped.values())
    return StreamReport(frames, dropped, time.monotonic() - begun_s, times, latency)
