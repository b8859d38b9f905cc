"""How many steps a live session takes, so that it keeps to a latency or to a rate.

A frame's time is a part that the steps do not touch, and the steps. Both are measured all the
time; a number of steps is given up soon after the goal is missed for good, and taken up again only
when there was room for long. An attempt that fails is not repeated soon: nothing swings.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from diffusionact.errors import SettingsError

log = logging.getLogger("diffusionact")

NS = 1_000_000_000
WINDOW_NS = 1 * NS  # over which frames are judged
LEAST_FRAMES = 6
MOST_FRAMES = 256
USUAL = 0.75  # of the frames must keep to the goal: a single spike moves nothing
ROOM = 0.85  # of the goal, what more steps may be expected to take
# Of a step's time, what one more adds: the next frame waits while this one is rendered, which is of
# its latency and not of the renderer's work.
LATENCY_COST, BUSY_COST = 1.5, 1.0
UP_AFTER_NS, LONGEST_NS = 3 * NS, 60 * NS  # of room, before more steps; doubled by each failure
FAILED_WITHIN_NS = 30 * NS  # of taking more steps


@dataclass(frozen=True)
class Goal:
    """latency_ms: from capture to display; or fps: new faces a second. One of the two."""

    latency_ms: float | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if (self.latency_ms is None) == (self.fps is None):
            raise SettingsError("wanted --latency or --fps, one of them")
        if not (self.latency_ms or self.fps or 0.0) > 0.0:
            raise SettingsError("--latency and --fps: wanted a number above 0")

    @property
    def time_ms(self) -> float:
        """What a frame may take: until it is shown, or in the renderer."""
        return 1000.0 / self.fps if self.fps is not None else float(self.latency_ms or 0.0)

    def __str__(self) -> str:
        return f"{self.fps:g} fps" if self.fps is not None else f"{self.latency_ms:g} ms"


@dataclass(frozen=True)
class Change:
    """One decision. at_s: since the first frame; time_ms: what was measured before it."""

    at_s: float
    steps: int
    time_ms: float


def control_for(goal: Goal | None, choices: Sequence[int], steps: int) -> StepControl | None:
    """Return what keeps to a goal; None without one.

    choices: counts that are prepared; steps: the one in use.
    Raises: SettingsError where there is nothing to choose from.
    """
    if goal is not None and len(choices) < 2:
        raise SettingsError(
            f"a goal of {goal} needs several counts of steps to choose from; this bundle's "
            f"manifest lists {tuple(choices)}: leave the goal out"
        )
    return None if goal is None else StepControl(goal, choices, steps)


class StepControl:
    """The number of steps for the next frame, from the times of those before."""

    def __init__(self, goal: Goal, choices: Sequence[int], steps: int) -> None:
        """choices: counts that are prepared; steps: the one in use."""
        self._goal, self._choices, self.steps = goal, sorted(choices), steps
        self._cost = BUSY_COST if goal.fps is not None else LATENCY_COST
        self.changes: deque[Change] = deque(maxlen=1000)
        self._frames: deque[tuple[int, float, float]] = deque(maxlen=MOST_FRAMES)
        self._first_ns: int | None = None
        self._room_since_ns: int | None = None
        self._up_after_ns = UP_AFTER_NS
        self._went_up_ns: int | None = None
        self._warned_ns: int | None = None

    def observe(self, now_ns: int, steps: int, time_ns: int, render_ns: int) -> int:
        """Return the number of steps to take from now on.

        now_ns: the monotonic clock; steps: that this frame took, in render_ns of its time_ns:
        the latency, or what the renderer was busy.
        """
        if self._first_ns is None:
            self._first_ns = now_ns
        if steps == self.steps:  # not a frame that was under way when it changed
            self._frames.append((now_ns, time_ns / 1e6, render_ns / 1e6 / steps))
        while len(self._frames) > LEAST_FRAMES and now_ns - self._frames[0][0] > WINDOW_NS:
            self._frames.popleft()
        if len(self._frames) >= LEAST_FRAMES:
            self._decide(now_ns)
        return self.steps

    def _decide(self, now_ns: int) -> None:
        usual_ms = _at(USUAL, [frame[1] for frame in self._frames])
        one_ms = _at(USUAL, [frame[2] for frame in self._frames])
        full_ns = now_ns - self._frames[0][0]
        if usual_ms > self._goal.time_ms:
            self._room_since_ns = None
            if full_ns >= WINDOW_NS // 2:
                self._fewer(now_ns, usual_ms, one_ms)
            return
        more = [count for count in self._choices if count > self.steps]
        if not more:
            return
        expected_ms = usual_ms + self._cost * (more[0] - self.steps) * one_ms
        if expected_ms > ROOM * self._goal.time_ms:
            self._room_since_ns = None
        elif self._room_since_ns is None:
            self._room_since_ns = now_ns
        elif now_ns - self._room_since_ns >= self._up_after_ns:
            self._went_up_ns = now_ns
            self._change(now_ns, more[0], usual_ms)

    def _fewer(self, now_ns: int, usual_ms: float, one_ms: float) -> None:
        fewer = [count for count in self._choices if count < self.steps]
        if not fewer:
            if self._warned_ns is None or now_ns - self._warned_ns > LONGEST_NS:
                log.warning(
                    "%.0f ms a frame with %d steps, the fewest: the goal of %s is out of reach",
                    usual_ms, self.steps, self._goal,
                )  # fmt: skip
            self._warned_ns = now_ns  # said again only after a minute without
            return
        if self._went_up_ns is not None:
            failed = now_ns - self._went_up_ns < FAILED_WITHIN_NS
            longer_ns, shorter_ns = 2 * self._up_after_ns, self._up_after_ns // 2
            wait_ns = longer_ns if failed else shorter_ns  # what comes and goes is not forgotten
            self._up_after_ns = min(max(wait_ns, UP_AFTER_NS), LONGEST_NS)
            self._went_up_ns = None
        fits = [c for c in fewer if usual_ms - (self.steps - c) * one_ms <= self._goal.time_ms]
        self._change(now_ns, fits[-1] if fits else fewer[0], usual_ms)

    def _change(self, now_ns: int, steps: int, usual_ms: float) -> None:
        log.info(
            "steps %d -> %d: %.0f ms a frame, the goal is %s",
            self.steps, steps, usual_ms, self._goal,
        )  # fmt: skip
        self.steps = steps
        self.changes.append(Change((now_ns - (self._first_ns or 0)) / NS, steps, usual_ms))
        self._frames.clear()
        self._room_since_ns = None


def _at(share: float, values: list[float]) -> float:
    """The value below which this share lies; NumPy's way takes as long as a small network."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]
