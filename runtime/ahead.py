"""Reading ahead and writing behind: a neighbour thread does the one while this thread works.

Every item is kept and in order; an error in either thread ends both and is raised here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

from diffusionact.runtime.handover import Slot, Workers

T = TypeVar("T")


def read_ahead(items: Iterable[T]) -> Generator[tuple[T, int], None, None]:
    """Yield each item, and the nanoseconds spent on making it, while the next one is being made.

    Close the iterator (`contextlib.closing`) when it is left before its end: that ends the thread.
    """
    made: Slot[tuple[T, int]] = Slot(newest_wins=False)
    workers = Workers()
    workers.start("read ahead", lambda: _make(items, made), made.close)
    try:
        while (pair := made.get()) is not None:
            yield pair
    except BaseException:
        made.close()
        with contextlib.suppress(Exception):  # the caller's reason to leave comes first
            workers.join()
        raise
    workers.join()


def write_behind(items: Iterable[T], write: Callable[[T], None]) -> None:
    """Return nothing; every item has been written, each while the next one was being made.

    After an error in `items` what it gave before is still written.
    """
    made: Slot[T] = Slot(newest_wins=False)
    workers = Workers()
    workers.start("write behind", lambda: _take(made, write), made.close)
    try:
        for item in items:
            if not made.put(item):
                break
    except BaseException:
        made.close()
        with contextlib.suppress(Exception):  # what happened first is what is told
            workers.join()
        raise
    made.close()
    workers.join()


def _make(items: Iterable[T], made: Slot[tuple[T, int]]) -> None:
    begun_ns = time.monotonic_ns()
    for item in items:
        if not made.put((item, time.monotonic_ns() - begun_ns)):
            return
        begun_ns = time.monotonic_ns()


def _take(made: Slot[T], write: Callable[[T], None]) -> None:
    while (item := made.get()) is not None:
        write(item)
