"""Which part of a batch is whose: of the process, and of the process's turn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """The `index`-th of `count` equal, contiguous parts of every batch.

    All processes draw the same batch from the same random numbers, and each works on its own part:
    so how many they are does not change what is learnt. A part has an even number of samples,
    so that the places of a batch that are even stay even in it.
    """

    index: int = 0
    count: int = 1

    def rows(self, batch: int) -> slice:
        """Returns the places of this part in a batch of so many samples."""
        size = batch // self.count
        return slice(self.index * size, (self.index + 1) * size)


WHOLE = Share()
