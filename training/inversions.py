"""A ring of inverted sources: the noise that the runtime starts from, for training.

At run time the frame is decoded from the source's x_T, which still holds traces of the source.
A decoder that has only seen Gaussian noise lets them shine through. Training on this noise, with
another frame of the same person as the target, teaches it to take the picture from z alone.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
F16 = npt.NDArray[np.float16]


class InversionCache:
    """The newest `capacity` inversions, each with the identity and frame it was made from. The
    training thread adds while the batch thread picks."""

    def __init__(self, capacity: int, size: int) -> None:
        self._noise = np.empty((capacity, 3, size, size), np.float16)
        self._identity = np.zeros(capacity, np.int64)
        self._frame = np.zeros(capacity, np.int64)
        self._added = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return min(self._added, len(self._noise))

    def add(self, noise: npt.NDArray[np.floating], identity: Ints, frame: Ints) -> None:
        """Stores noise [n,3,S,S] over the oldest entries."""
        with self._lock:
            slots = (self._added + np.arange(len(noise))) % len(self._noise)
            self._noise[slots] = noise
            self._identity[slots], self._frame[slots] = identity, frame
            self._added += len(noise)

    def pick(self, rng: np.random.Generator, count: int) -> tuple[F16, Ints, Ints]:
        """Returns noise float16 [count,3,S,S] of random entries, their identities and frames."""
        with self._lock:
            slots = rng.integers(max(len(self), 1), size=count)
            return self._noise[slots], self._identity[slots], self._frame[slots]
