"""Measures of a whole clip, frame by frame in constant memory.

Each class takes the frames of one clip in their order and gives its value at the end. A frame
that cannot be measured (no face, a damaged file) is told with `gap`: what lies before it is no
neighbour of what comes after.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusionact.evaluation.metrics import interocular_distance

Float = NDArray[np.float64]


class IdentityDrift:
    """How well a clip keeps one identity, from frame to frame and over all of it.

    TL-ID: the mean cosine of the embeddings of neighbouring frames. TG-ID: the mean cosine over
    all pairs of different frames, whatever their order. -1 to 1 (one identity throughout); higher
    is better. Published figures are over those of the real clip, so that 1 is as steady as that:
    divide by the real clip's own values.

    Memory: with unit embeddings e_i the sum of the cosines over all pairs is
    (|sum_i e_i|^2 - n) / 2, so that one sum is kept, not n embeddings.
    Source: Tzaban et al. 2022, Stitch it in Time, section on temporal metrics.
    """

    def __init__(self) -> None:
        self._sum: Float | None = None
        self._count = 0
        self._last: Float | None = None
        self._local = 0.0
        self._pairs = 0

    def add(self, embedding: ArrayLike) -> None:
        """Return nothing; takes the next frame. embedding: [E], not zero."""
        e = np.asarray(embedding, np.float64)
        e = e / np.linalg.norm(e)
        if self._last is not None:
            self._local += float(np.dot(self._last, e))
            self._pairs += 1
        self._last = e
        self._sum = e.copy() if self._sum is None else self._sum + e
        self._count += 1

    def gap(self) -> None:
        """Return nothing; the next frame is no neighbour of the last."""
        self._last = None

    @property
    def tl_id(self) -> float:
        """The mean cosine of neighbours; NaN for fewer than two."""
        return self._local / self._pairs if self._pairs else math.nan

    @property
    def tg_id(self) -> float:
        """The mean cosine of all pairs; NaN for fewer than two frames."""
        n = self._count
        if self._sum is None or n < 2:
            return math.nan
        return (float(np.dot(self._sum, self._sum)) - n) / (n * (n - 1))


class Flicker:
    """Change from frame to frame that the reference does not have, as a fraction of the range.

    mean |(g_t - g_(t-1)) - (r_t - r_(t-1))| / data_range over pixels, colours and neighbours, g
    the clip and r what it should be. 0 (changes as the reference does) to 2; lower is better. A
    constant difference of the pictures, however large, does not count. Source: ours.
    """

    def __init__(self, data_range: float = 255.0) -> None:
        self._range = data_range
        self._last: Float | None = None
        self._total = 0.0
        self._pairs = 0

    def add(self, reference: ArrayLike, image: ArrayLike) -> float:
        """Return this frame's own flicker, NaN where it has no neighbour.

        reference, image: one shape.
        """
        error = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
        last, self._last = self._last, error
        if last is None or last.shape != error.shape:
            return math.nan
        change = float(np.mean(np.abs(error - last))) / self._range
        self._total += change
        self._pairs += 1
        return change

    def gap(self) -> None:
        """Return nothing; the next frame is no neighbour of the last."""
        self._last = None

    @property
    def value(self) -> float:
        """The mean over neighbours; NaN for fewer than two frames."""
        return self._total / self._pairs if self._pairs else math.nan


class Jitter:
    """How restless landmarks are: their mean acceleration over the distance of the eyes.

    mean_k |p_t - 2 p_(t-1) + p_(t-2)| / |p_36 - p_45|, a frame squared; 0 (each point moves evenly)
    upwards; lower is better, and never below the driver's own: compare with the reference's.
    Points that are NaN in any of the three frames are left out. Source: ours.
    """

    def __init__(self) -> None:
        self._last: list[Float] = []
        self._total = 0.0
        self._count = 0

    def add(self, points: ArrayLike) -> None:
        """Return nothing; takes the next frame. points: [68,>=2] px."""
        now = np.asarray(points, np.float64)[:, :2]
        self._last = [*self._last[-2:], now]
        if len(self._last) == 3:
            before, middle, after = self._last
            moved = np.linalg.norm(after - 2 * middle + before, axis=-1)
            moved = moved[np.isfinite(moved)] / float(interocular_distance(middle))
            if moved.size:
                self._total += float(moved.mean())
                self._count += 1

    def gap(self) -> None:
        """Return nothing; the next frame is no neighbour of the last."""
        self._last = []

    @property
    def value(self) -> float:
        """The mean over frames that have two before them; NaN where none has."""
        return self._total / self._count if self._count else math.nan
