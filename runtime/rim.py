"""The tone of a crop, matched to the portrait around it, so that its edge does not show.

A model of few steps gets colours a little wrong, all over the crop; where it is put back, a square
shows. At the rim the right colours are known: the portrait's own. What the rim lacks of them is
added there, and spread inside as smoothly as can be.

Source: Perez et al. 2003, Poisson image editing, equation 4 (the membrane), on a coarse grid.
"""

from __future__ import annotations

from functools import cache
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]
IntArray: TypeAlias = npt.NDArray[np.intp]

CELLS = 16  # a side of the grid; its outermost are the rim
# Grey levels: a difference of tone counts less the larger it is, and from here on not at all: it
# is something else, such as hair that has moved.
LARGEST = 48.0


class RimMatch:
    """The match to one portrait; its arrays are made once."""

    def __init__(self, reference: UInt8Array) -> None:
        """reference: uint8 [S,S,3], the portrait's own crop."""
        side = len(reference)
        cells = min(CELLS, side)
        on_rim, spread = _membrane(cells)
        self._pixels, self._begins = _pixels_of(on_rim, cells, side)
        self._reference = reference.reshape(-1, 3)[self._pixels].T.astype(np.float32)  # [3,P]
        self._seen = np.empty((len(self._pixels), 3), np.uint8)
        self._off, self._weight = np.empty_like(self._reference), np.empty_like(self._reference)
        self._sums = np.empty((3, len(on_rim)), np.float32)
        counts = np.diff(self._begins, append=len(self._pixels))
        self._spread = spread / counts.astype(np.float32)  # of sums: each cell counts by its mean
        self._coarse = np.empty((cells, cells, 3), np.float32)
        self._tone = np.empty((side, side, 3), np.float32)
        self._matched = np.empty_like(reference)

    def matched(self, crop: UInt8Array) -> UInt8Array:
        """Return the crop in the portrait's tone, valid until the next call.

        crop: uint8 [S,S,3], in the reference's colour order.
        """
        off, weight, coarse = self._off, self._weight, self._coarse
        np.take(crop.reshape(-1, 3), self._pixels, axis=0, out=self._seen, mode="clip")
        np.copyto(off, self._seen.T)
        np.subtract(self._reference, off, out=off)
        np.multiply(off, off, out=weight)
        weight *= -1.0 / LARGEST**2
        weight += 1.0
        np.maximum(weight, 0.0, out=weight)
        off *= weight
        np.add.reduceat(off, self._begins, axis=1, out=self._sums)
        np.matmul(self._spread, self._sums.T, out=coarse.reshape(-1, 3))
        cv2.resize(coarse, crop.shape[1::-1], dst=self._tone, interpolation=cv2.INTER_LINEAR)
        return np.asarray(cv2.add(crop, self._tone, dst=self._matched, dtype=cv2.CV_8U), np.uint8)


def _pixels_of(on_rim: IntArray, cells: int, side: int) -> tuple[IntArray, IntArray]:
    """Return the pixels in the grid's cells `on_rim`, cell by cell, and where each cell begins."""
    along = np.arange(side) * cells // side
    cell = (along[:, None] * cells + along).ravel()
    pixels = np.argsort(cell, kind="stable")
    pixels = pixels[np.isin(cell[pixels], on_rim)]
    return pixels, np.flatnonzero(np.diff(cell[pixels], prepend=-1))


@cache
def _membrane(cells: int) -> tuple[IntArray, Float32Array]:
    """Return which of the grid's cells are its rim [R], and the weights [cells*cells,R] that make
    each cell the mean of its neighbours, the rim being what it is."""
    inside = np.zeros((cells, cells), bool)
    inside[1:-1, 1:-1] = True
    on_rim, within = np.flatnonzero(~inside), np.flatnonzero(inside)
    laplace = np.zeros((cells * cells, cells * cells))
    for step in (1, -1, cells, -cells):
        laplace[within, within + step] = -1.0
    laplace[within, within] = 4.0
    spread = np.zeros((cells * cells, len(on_rim)))
    spread[on_rim, np.arange(len(on_rim))] = 1.0
    if len(within):
        known = -laplace[np.ix_(within, on_rim)]
        spread[within] = np.linalg.solve(laplace[np.ix_(within, within)], known)
    return on_rim, spread.astype(np.float32)
