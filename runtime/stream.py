"""Frames from a reader to a sink while they come: reading, rendering and writing overlap.

Each hand-over holds one frame. Live, a newer frame takes the place of one that waits, so that
delay never grows; from files every frame is kept. The only threads of the package are here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from diffusionact.runtime.media import FRAME_NS, Frame, Reader, TrackReader
from diffusionact.runtime.reenactor import Reenactor, Result
from diffusionact.runtime.source import Source
from diffusionact.runtime.timing import StageTimes, summarise
from diffusionact.runtime.writer import Writer

T = TypeVar("T")


@dataclass(frozen=True)
class StreamReport:
    """frames: written; dropped: replaced by newer ones; seconds: spent; times: percentiles a
    stage; latency: from capture until the sink has the frame, of a live reader."""

    frames: int
    dropped: int
    seconds: float
    times: Mapping[str, StageTimes]
    latency: StageTimes | None


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

    def get(self) -> T | None:
        """Return the next item, or None when the slot is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._item is not None or self._closed)
            item, self._item = self._item, None
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """End the hand-over: what waits can still be taken, nothing more be put."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


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
    if isinstance(reader, TrackReader):
        act.start_session(source, reader.track)
    else:
        act.retargeter(source).calibrate()
    frames: Slot[Frame] = Slot(newest_wins=reader.live)
    results: Slot[tuple[Frame, Result]] = Slot(newest_wins=False)
    log = _Log([], [])
    workers = Workers()
    with sink:
        workers.start("reader", lambda: _read(reader, frames, stop), frames.close)
        workers.start("sink", lambda: _write(results, sink, log), frames.close, results.close)
        try:
            while (frame := frames.get()) is not None:
                driver = frame.landmarks if frame.image_bgr is None else frame.image_bgr
                if not results.put((frame, act.reenact(driver, source, frame.pts_ns))):
                    break
        finally:
            frames.close()
            results.close()
            workers.join()
    latency = summarise([{"latency": ns} for ns in log.latency_ns]) if reader.live else {}
    return StreamReport(
        len(log.times),
        frames.dropped,
        time.monotonic() - begun_s,
        summarise(log.times),
        latency.get("latency"),
    )


@dataclass(frozen=True)
class _Log:
    times: list[Mapping[str, int]]
    latency_ns: list[int]


def _read(reader: Reader, frames: Slot[Frame], stop: threading.Event | None) -> None:
    for frame in reader:
        if (stop is not None and stop.is_set()) or not frames.put(frame):
            return


def _write(results: Slot[tuple[Frame, Result]], sink: Writer, log: _Log) -> None:
    while (pair := results.get()) is not None:
        frame, result = pair
        begun_ns = time.monotonic_ns()
        sink.write(result.frame, frame.pts_ns, frame.duration_ns or FRAME_NS, result.landmarks)
        done_ns = time.monotonic_ns()
        log.times.append({**result.times, "write": done_ns - begun_ns})
        log.latency_ns.append(done_ns - frame.pts_ns)


class Workers:
    """Threads whose first error is raised by `join`."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def start(self, name: str, work: Callable[[], None], *at_end: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._guard, args=(work, at_end), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()
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
