"""Arrays that are handed out and come back by themselves when nobody holds them any more."""

from __future__ import annotations

import sys
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

UInt8Array: TypeAlias = npt.NDArray[np.uint8]


class Pool:
    """Pictures of one size: a steady stream of them allocates nothing.

    A picture is free when the pool alone refers to it; a view of it, a tuple or another thread
    counts as a holder, an address that was copied out of it does not. So that a listener who keeps
    them all makes no endless list, pictures beyond `LIMIT` are not taken back.
    """

    LIMIT = 8

    def __init__(self) -> None:
        self._kept: list[UInt8Array] = []
        self._alone = _holders([np.empty(1, np.uint8)], 0)  # differs between Python's versions

    def take(self, shape: tuple[int, ...]) -> UInt8Array:
        """Return uint8 `shape` that nobody else holds, its content what it was before."""
        if self._kept and self._kept[0].shape != shape:
            self._kept.clear()
        for i in range(len(self._kept)):
            if _holders(self._kept, i) == self._alone:
                return self._kept[i]
        made = np.empty(shape, np.uint8)
        if len(self._kept) < self.LIMIT:
            self._kept.append(made)
        return made


def _holders(arrays: list[UInt8Array], i: int) -> int:
    return sys.getrefcount(arrays[i])
