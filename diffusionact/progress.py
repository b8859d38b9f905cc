"""Progress on stderr: a bar on a terminal, plain lines elsewhere, silence when asked."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeAlias

# done so far, and the total where it is known; called after every unit of work.
ProgressCallback: TypeAlias = Callable[[int, "int | None"], None]
# the name of a stage, then the same; stages follow one another.
StageCallback: TypeAlias = Callable[[str, int, "int | None"], None]

LINE_INTERVAL_S = 5.0  # between plain lines: a log of minutes stays readable


class Progress:
    """A `ProgressCallback` that prints; use it as a context manager, so that the bar is closed."""

    def __init__(self, title: str, unit: str = "frame", quiet: bool = False) -> None:
        self._title = title
        self._unit = unit
        self._quiet = quiet
        self._bar: Any = None
        self._started_s = self._printed_s = time.monotonic()
        self._state: tuple[int, int | None] = (0, None)

    def __call__(self, done: int, total: int | None = None) -> None:
        """Return nothing; shows `done` of `total`."""
        if self._quiet:
            return
        self._state = (done, total)
        if sys.stderr.isatty():
            self._show_bar(done, total)
        elif time.monotonic() - self._printed_s >= LINE_INTERVAL_S:
            self._show_line(done, total)

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

    def _show_bar(self, done: int, total: int | None) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(desc=self._title, unit=self._unit, total=total, file=sys.stderr)
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def _show_line(self, done: int, total: int | None) -> None:
        self._printed_s = time.monotonic()
        rate = done / max(self._printed_s - self._started_s, 1e-9)
        of = f" of {total}" if total else ""
        print(f"{self._title}: {done}{of} {self._unit}s, {rate:.1f} a second", file=sys.stderr)


class StageProgress:
    """A `StageCallback` that prints one bar after another; use it as a context manager."""

    def __init__(self, unit: str = "frame", quiet: bool = False) -> None:
        self._unit = unit
        self._quiet = quiet
        self._stage = ""
        self._bar: Progress | None = None

    def __call__(self, stage: str, done: int, total: int | None = None) -> None:
        """Return nothing; shows `done` of `total` of a stage."""
        if self._bar is None or stage != self._stage:
            self.__exit__(None, None, None)
            self._stage, self._bar = stage, Progress(stage, self._unit, self._quiet)
        self._bar(done, total)

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
