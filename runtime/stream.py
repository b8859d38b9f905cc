"""Frames from a reader to a sink while they come: reading, tracking, rendering and showing overlap."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType

from diffusionact.errors import NoFace
from diffusionact.landmarks import Landmarks
from diffusionact.runtime.handover import Slot, Workers
from diffusionact.runtime.media import FRAME_NS, Frame, Reader, TrackReader
from diffusionact.runtime.pacing import Pacing
from diffusionact.runtime.reenactor import Reenactor, Result
from diffusionact.runtime.source import Source
from diffusionact.runtime.timing import StageTimes, StopWatch, Tally
from diffusionact.runtime.tracker import Tracker
from diffusionact.runtime.writer import Writer

# Of silence from a camera (webcams in the dark send 5 a second), then the portrait is moved without
# it, towards rest, at this period.
SILENT_S, IDLE_S = 0.4, 0.08
END_S = 5.0  # that a reader gets to end: a driver of a camera may sit in a call of its own


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
        self._pacing, self._left_out = Pacing(), 0
        self._workers = Workers()

    @property
    def dropped(self) -> Mapping[str, int]:
        """Return how many made way for newer ones before each stage."""
        return {
            "track": self._frames.dropped + self._left_out,
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
        wait_s = SILENT_S if self._reader.live else None
        wanted = True
        while wanted and not self._frames.ended:
            if (item := self._frames.get(wait_s)) is not None:
                wait_s = SILENT_S if self._reader.live else None
                frame, watch = item
                watch.lap("wait for tracker")
                if self._reader.live and self._pacing.leaves_out(frame.pts_ns, time.monotonic_ns()):
                    self._left_out += 1
                    continue
                with self._pacing.tracking():
                    face = self._find(frame)
                watch.lap("track")
                wanted = self._faces.put(_Tracked(frame, face, frame.pts_ns, watch))
            elif wait_s is not None and not self._frames.ended:
                now_ns = time.monotonic_ns()
                wanted = self._faces.offer(_Tracked(None, None, now_ns, StopWatch(now_ns)))
                wait_s = IDLE_S

    def _draw(self) -> None:
        while (tracked := self._faces.get()) is not None:
            watch = tracked.watch
            watch.lap("wait for renderer")
            with self._pacing.rendering():
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
