"""A ring of inverted sources: the noise that the runtime starts from, for training.

At run time the frame is decoded from the source's x_T, which still holds traces of the source.
A decoder that has only seen Gaussian noise lets them shine through. Training on this noise, with
another frame of the same person as the target, teaches it to take the picture from z alone.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
F16 = npt.NDArray[np.float16]

AHEAD = 4  # batches are made up to so many steps before they are used (`Prefetcher`)
NEVER = 1 << 62


class InversionCache:
    """The newest `capacity` inversions, each with the identity and frame it was made from. The
    training thread adds while the batch thread, which is ahead of it, picks: batch k sees what was
    added until step k - AHEAD, however the threads take turns, so a resumed run sees the same."""

    def __init__(self, capacity: int, size: int, spare: int = 0) -> None:
        """spare: how many more are held, so that what a batch may still pick is not overwritten:
        at least as many as AHEAD + 1 steps can add."""
        held = capacity + spare
        self._capacity, self._added = capacity, 0
        self._noise = np.empty((held, 3, size, size), np.float16)
        self._identity, self._frame = np.zeros(held, np.int64), np.zeros(held, np.int64)
        self._step = np.zeros(held, np.int64)
        self._ends: list[tuple[int, int]] = []  # (step, how many there were after it), ascending
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return min(self._added, self._capacity)

    @property
    def held(self) -> int:
        """How many it holds, with those that only batches already in the making may pick."""
        return len(self._noise)

    @property
    def added(self) -> int:
        """How many inversions were ever added."""
        return self._added

    def add(
        self,
        noise: npt.NDArray[np.floating],
        identity: Ints,
        frame: Ints,
        step: int | Ints = -AHEAD,
    ) -> None:
        """Stores noise [n,3,S,S], made before training step `step`, over the oldest entries."""
        with self._lock:
            slots = (self._added + np.arange(len(noise))) % len(self._noise)
            self._noise[slots], self._step[slots] = noise, step
            self._identity[slots], self._frame[slots] = identity, frame
            for at in np.broadcast_to(step, len(noise)).tolist():
                self._added += 1
                if self._ends and self._ends[-1][0] == at:
                    self._ends.pop()
                self._ends.append((at, self._added))
            del self._ends[: -2 * len(self._noise)]

    def seen(self, step: int) -> int:
        """Returns how many had been added that the batch of this step may know of."""
        with self._lock:
            return self._seen(step)

    def pick(
        self, rng: np.random.Generator, count: int, step: int = NEVER
    ) -> tuple[F16, Ints, Ints]:
        """Returns noise float16 [count,3,S,S] of random entries that the batch of this step may
        know of, their identities and frames."""
        with self._lock:
            seen = self._seen(step)
            first = max(seen - self._capacity, 0)
            slots = rng.integers(first, max(seen, 1), size=count) % len(self._noise)
            return self._noise[slots], self._identity[slots], self._frame[slots]

    def _seen(self, step: int) -> int:
        place = bisect_right(self._ends, (step - AHEAD, NEVER))
        return self._ends[place - 1][1] if place else 0

    # Checkpoints

    def since(self, first: int) -> dict[str, npt.NDArray[np.generic]]:
        """Returns the entries from number `first` on, as far as they are still held."""
        with self._lock:
            first = max(first, self._added - len(self._noise))
            slots = np.arange(first, self._added) % len(self._noise)
            return {"noise": self._noise[slots], "identity": self._identity[slots],
                    "frame": self._frame[slots], "step": self._step[slots],
                    "first": np.array([first], np.int64)}  # fmt: skip

    def restore(self, entries: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Takes back what `since` gave, later entries after earlier ones."""
        self._added = max(self._added, int(entries["first"][0]))
        names = ("noise", "identity", "frame", "step")
        self.add(*(entries[name] for name in names))  # type: ignore[arg-type]
