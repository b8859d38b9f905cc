"""Progress on stderr: a bar on a terminal, plain lines elsewhere, silence when asked."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeAlias

# done so far, and the total where it is known; called after every unit of work.
ProgressCallback: TypeAlias = Callable[[int, "int | None"], None]
# the name of a stage, then the same; stages follow one another.
StageCallback: TypeAlias = Callable[[str, int, "int | None"], None]
# the same, and the seconds that are left of all stages where they can be told.
TimedCallback: TypeAlias = Callable[[str, int, "int | None", "float | None"], None]

LINE_INTERVAL_S = 5.0  # between plain lines: a log of minutes stays readable
RECENT = 50  # units of work that tell how fast the next ones go
TIMED_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"


class TimeLeft:
    """Work in stages, told to a `TimedCallback` with the time that is left of all of them.

    A unit of a stage takes as long as the last ones did, one of a stage to come what was
    `expect`ed of it; all stages are of as many units as the one at work.
    """

    def __init__(
        self, report: TimedCallback | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._report = report
        self._clock = clock
        self._to_come_s: dict[str, float | None] = {}

    @property
    def wanted(self) -> bool:
        """Whether anybody is told."""
        return self._report is not None

    def expect(self, stage: str, each_s: float | None) -> None:
        """Return nothing; the stage is still to come; each_s: of a unit, None where not known."""
        self._to_come_s[stage] = each_s

    def stage(self, name: str, done: int = 0, total: int | None = None) -> ProgressCallback:
        """Return the callback of a stage that begins now; done: what it need not do again."""
        self._to_come_s.pop(name, None)
        marks = deque([(self._clock(), done)], maxlen=RECENT + 1)

        def show(done: int, total: int | None = None) -> None:
            if self._report is None:
                return
            if done > marks[-1][1]:
                marks.append((self._clock(), done))
            self._report(name, done, total, self._left_s(marks, total))

        show(done, total)
        return show

    def _left_s(self, marks: deque[tuple[float, int]], total: int | None) -> float | None:
        (since_s, first), (now_s, done) = marks[0], marks[-1]
        if total is None:
            return None
        own_s = (now_s - since_s) / max(done - first, 1) * (total - done)
        to_come_s = 0.0
        for each_s in self._to_come_s.values():
            if each_s is None:
                return None
            to_come_s += each_s * total
        return own_s + to_come_s if done > first or done == total else None


def duration(seconds: float) -> str:
    """Return a time in words, in the two units that matter."""
    minutes, whole_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole_s:02d} s" if minutes else f"{whole_s} s"


class Progress:
    """A `ProgressCallback` that prints; use it as a context manager, so that the bar is closed."""

    def __init__(self, title: str, unit: str = "frame", quiet: bool = False, done: int = 0) -> None:
        """done: what was done before it began, and says nothing of the speed."""
        self._title = title
        self._unit = unit
        self._quiet = quiet
        self._bar: Any = None
        self._started_s = self._printed_s = time.monotonic()
        self._first = done
        self._state: tuple[int, int | None, float | None] = (0, None, None)

    def __call__(self, done: int, total: int | None = None, left_s: float | None = None) -> None:
        """Return nothing; shows `done` of `total`; left_s: until the end of all, where it is
        another than that of this bar."""
        if self._quiet:
            return
        self._state = (done, total, left_s)
        if sys.stderr.isatty():
            self._show_bar(done, total, left_s)
        elif time.monotonic() - self._printed_s >= LINE_INTERVAL_S:
            self._show_line(done, total, left_s)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self._state[0]:
            self._show_line(*self._state)

    def _show_bar(self, done: int, total: int | None, left_s: float | None) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(
                desc=self._title,
                unit=self._unit,
                total=total,
                initial=self._first,
                file=sys.stderr,
            )
        self._bar.total = total
        if left_s is not None:
            self._bar.bar_format = TIMED_BAR
            self._bar.set_postfix_str(f"{duration(left_s)} left", refresh=False)
        self._bar.update(done - self._bar.n)

    def _show_line(self, done: int, total: int | None, left_s: float | None) -> None:
        self._printed_s = time.monotonic()
        words = [f"{self._title}: {done}{f' of {total}' if total else ''} {self._unit}s"]
        if done > self._first:
            rate = (done - self._first) / max(self._printed_s - self._started_s, 1e-9)
            words.append(f"{rate:.1f} a second")
        if left_s:
            words.append(f"{duration(left_s)} left")
        print(", ".join(words), file=sys.stderr)


class StageProgress:
    """A `StageCallback`, and a `TimedCallback`, that prints one bar after another; use it as a
    context manager."""

    def __init__(
        self, unit: str = "frame", quiet: bool = False, units: Mapping[str, str] | None = None
    ) -> None:
        """units: of the stages that have another one."""
        self._unit = unit
        self._units = units or {}
        self._quiet = quiet
        self._stage = ""
        self._bar: Progress | None = None

    def __call__(
        self, stage: str, done: int, total: int | None = None, left_s: float | None = None
    ) -> None:
        """Return nothing; shows `done` of `total` of a stage, and what is left of all of them."""
        if self._bar is None or stage != self._stage:
            self.__exit__(None, None, None)
            self._stage, self._bar = (
                stage,
                Progress(stage, self._units.get(stage, self._unit), self._quiet, done),
            )
        self._bar(done, total, left_s)

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)
