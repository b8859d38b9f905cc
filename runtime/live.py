"""A portrait moved live: one session from a camera to whatever shows it.

Reader, tracker and renderer have threads of their own (`stream.Pipeline`); showing, keys and the
count of what was shown are in the caller's, which for a window should be the program's first.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from diffusionact.errors import NoFace
from diffusionact.landmarks import Landmarks
from diffusionact.runtime.camera import Camera, ClipCamera
from diffusionact.runtime.control import Change, Goal, control_for
from diffusionact.runtime.keys import TerminalKeys
from diffusionact.runtime.media import TrackReader
from diffusionact.runtime.overlay import labelled, overlaid
from diffusionact.runtime.reenactor import Reenactor, Result
from diffusionact.runtime.sinks import SeveralSinks
from diffusionact.runtime.source import Source
from diffusionact.runtime.stream import Pipeline, Rendered, find_with
from diffusionact.runtime.timing import TOTAL, StageTimes, Tally

log = logging.getLogger("diffusionact")

NS = 1_000_000_000
POLL_S = 0.05  # for keys, while no picture comes
RECENT_NS = 1 * NS  # of the figures on the picture
FRESH_STEPS = 2  # renders of each prepared count before the clock starts
QUIT, RECALIBRATE, OVERLAY, NEXT = ("q", "quit", "\x1b"), ("r",), ("o",), ("n", "\t")
KEYS = "keys: r finds the neutral face anew, o figures, n or 1-9 portrait, q quits"


@dataclass(frozen=True)
class LiveSettings:
    """label: the mark that says the picture was generated; overlay: the figures, to begin with;
    goal: of the step control, None leaves the steps alone; seconds: None is until the end."""

    label: bool = True
    overlay: bool = True
    goal: Goal | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class LiveReport:
    """seconds: since the first camera frame was asked for; shown: pictures handed to the display;
    faces: of them, those rendered from a face in a driver frame never shown before;
    latency: from capture to hand-over, None for a clip that is not by the clock; dropped: frames
    that newer ones replaced, by the stage they waited for; times: percentiles a stage, of faces;
    changes: what the step control did; clock_held_ms: how much a clip's clock was put back because it
    could not be read in time, which no latency holds."""

    seconds: float
    shown: int
    faces: int
    latency: StageTimes | None
    dropped: Mapping[str, int]
    times: Mapping[str, StageTimes]
    steps: int
    changes: Sequence[Change]
    clock_held_ms: float = 0.0

    @property
    def faces_per_second(self) -> float:
        return self.faces / self.seconds if self.seconds > 0.0 else 0.0


class LiveSession:
    """One user before one camera, with any number of portraits to choose from."""

    def __init__(
        self,
        act: Reenactor,
        sources: Sequence[Source],
        camera: Camera,
        sinks: SeveralSinks,
        settings: LiveSettings | None = None,
    ) -> None:
        """sources: the first is shown first.

        Raises: SettingsError for a source of other weights, or a goal with one count prepared.
        """
        self._act, self._camera, self._sinks = act, camera, sinks
        self._settings = settings or LiveSettings()
        self._sessions = [act.session(source) for source in sources]
        self._current = self._sessions[0]
        self._orders: deque[str] = deque()  # from the keys' thread to the renderer's
        self._overlay = self._settings.overlay
        self._tally, self._recent = Tally(), deque[tuple[int, int]]()
        self._shown = self._faces = 0
        self._control = control_for(self._settings.goal, act.prepared_steps, act.steps)
        self._steps = act.steps

    def run(self, stop: threading.Event | None = None) -> LiveReport:
        """Return what was done when the camera ends, the time is up, a key says so or `stop` is
        set. Every sink is closed then, a file complete.

        Raises: what camera, tracker and sinks raise; a file is not written then.
        """
        stop = stop or threading.Event()
        with self._sinks, TerminalKeys() as terminal, closing(self._camera):
            self._warm_up()
            log.info("showing in %s; %s", self._sinks.name, KEYS)
            self._current.start()
            pipeline = Pipeline(
                self._camera, find_with(lambda: self._act.tracker), self._render,
                self._camera.close,
            )  # fmt: skip
            begun_ns = time.monotonic_ns()
            with pipeline:
                while not (pipeline.ended or stop.is_set() or self._is_over(begun_ns)):
                    self._press([*self._sinks.keys(), *terminal.pressed()], stop)
                    if (rendered := pipeline.get(POLL_S)) is not None:
                        self._show(rendered, pipeline)
            seconds = (time.monotonic_ns() - begun_ns) / NS
        return self._report(seconds, pipeline)

    def recent(self) -> list[tuple[int, int]]:
        """Return when the faces of the last second were shown, on the monotonic clock, and the
        latency of each, ns; from any thread."""
        return list(self._recent)

    def _warm_up(self) -> None:
        """Run every stage: first calls take much longer, and are nobody's latency."""
        source = self._current.source
        clip = self._camera.clip if isinstance(self._camera, ClipCamera) else None
        if not isinstance(clip, TrackReader):
            for picture in (source.portrait, np.zeros_like(source.portrait)):  # then forget it
                try:
                    self._act.tracker.track(picture)
                except NoFace:
                    pass
        for steps in (*self._act.prepared_steps, self._steps):
            self._act.set_steps(steps)
            for _ in range(FRESH_STEPS):
                resting = self._act.rest(source)
        self._present(resting, [])

    def _render(self, face: Landmarks | None, pts_ns: int) -> Result:
        """One picture; in the renderer's thread, which alone touches sessions and networks."""
        while self._orders:
            self._obey(self._orders.popleft())
        if self._act.steps != self._steps:
            self._act.set_steps(self._steps)
        return self._act.reenact(face, self._current, pts_ns)

    def _obey(self, order: str) -> None:
        if order in RECALIBRATE:
            self._current.forget()
            self._current.retargeter.recalibrate()
            return
        place = self._sessions.index(self._current)
        place = place + 1 if order in NEXT else int(order) - 1
        other = self._sessions[place % len(self._sessions)]
        if other is not self._current:
            other.forget()
            other.retargeter.follow_on(self._current.retargeter)
            self._current = other

    def _press(self, keys: Sequence[str], stop: threading.Event) -> None:
        for key in keys:
            if key in QUIT:
                stop.set()
            elif key in OVERLAY:
                self._overlay = not self._overlay
            elif key in (*RECALIBRATE, *NEXT):
                self._orders.append(key)
            elif key.isdecimal() and 1 <= int(key) <= len(self._sessions):
                self._orders.append(key)

    def _show(self, rendered: Rendered, pipeline: Pipeline) -> None:
        wants = self._overlay and self._sinks.wants_overlay
        lines = self._lines(rendered, pipeline) if wants else []
        watch = rendered.watch
        watch.lap("wait for display")
        shown_ns = self._present(rendered.result, lines)
        watch.lap("show", shown_ns)
        self._shown += 1
        if not rendered.is_new_face:
            return
        self._faces += 1
        self._tally.add(watch.times)
        total_ns = sum(watch.times.values())
        self._recent.append((shown_ns, total_ns))
        while shown_ns - self._recent[0][0] > RECENT_NS:
            self._recent.popleft()
        if self._control is not None:
            busy_ns = sum(rendered.result.times.values())
            self._steps = self._control.observe(
                shown_ns,
                rendered.result.steps,
                busy_ns if self._settings.goal and self._settings.goal.fps else total_ns,
                rendered.result.times.get("render", 0),
            )

    def _present(self, result: Result, lines: Sequence[str]) -> int:
        picture = labelled(result.frame) if self._settings.label else result.frame
        return self._sinks.show(picture, overlaid(picture, lines) if lines else picture)

    def _lines(self, rendered: Rendered, pipeline: Pipeline) -> list[str]:
        """The figures of the last second, and the session's state where it is not the usual."""
        since_ns = time.monotonic_ns() - RECENT_NS
        recent_ns = [total_ns for shown_ns, total_ns in self.recent() if shown_ns > since_ns]
        latency = ""
        if self._camera.live and recent_ns:
            latency = f"  {np.median(recent_ns) / 1e6:.0f} ms"
        dropped = sum(pipeline.dropped.values())
        lines = [
            f"{len(recent_ns) * NS / RECENT_NS:.0f} fps{latency}  "
            f"{rendered.result.steps} steps  {dropped} dropped"
        ]
        if rendered.frame is None:
            lines.append("the camera is silent")
        elif not rendered.result.seen:
            lines.append("no face in the picture")
        elif self._current.retargeter.calibrating:
            lines.append("look at the camera, at rest")
        return lines

    def _is_over(self, begun_ns: int) -> bool:
        seconds = self._settings.seconds
        return seconds is not None and time.monotonic_ns() - begun_ns >= seconds * NS

    def _report(self, seconds: float, pipeline: Pipeline) -> LiveReport:
        times = self._tally.summary()
        held_ns = tuple(self._camera.held) if isinstance(self._camera, ClipCamera) else ()
        if held_ns:
            log.warning(
                "%s came late: its clock was held for %.0f ms, %d times",
                self._camera.name, sum(held_ns) / 1e6, len(held_ns),
            )  # fmt: skip
        return LiveReport(
            seconds,
            self._shown,
            self._faces,
            times.get(TOTAL) if self._camera.live else None,
            pipeline.dropped,
            times,
            self._steps,
            tuple(self._control.changes) if self._control is not None else (),
            sum(held_ns) / 1e6,
        )
