"""Threads that hand one thing at a time to each other, and end together.

Each hand-over holds one item. Live, a newer one takes the place of one that waits, so that delay
never grows; from files every one is kept.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


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

    def offer(self, item: T) -> bool:
        """Put an item if none waits: it displaces nothing. Return as `put` does."""
        with self._changed:
            if self._item is None and not self._closed:
                self._item = item
                self._changed.notify_all()
            return not self._closed

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
