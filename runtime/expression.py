"""How a driver's expression is written down and put on another face.

`ModelExpression` for networks that saw only the expressions of one face model: the driver's
motion is written in that model's coefficients, so that what the networks are asked for is always
like what they were trained on. `FreeExpression` for all others: the motion of each point.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from diffusionact.morphable import Morphable
from diffusionact.runtime.headpose import FloatArray
from diffusionact.runtime.neutral import INNER_LIPS

CHIN, BROWS, MOUTH = np.arange(3, 14), np.arange(17, 27), np.arange(48, 68)
EXPRESSIVE = np.concatenate([CHIN, BROWS, MOUTH])  # the lids go by ratio, the rest is rigid
WEIGHTS = np.concatenate([np.full(11, 0.3), np.full(10, 0.8), np.full(12, 1.0), np.full(8, 1.5)])
PARTING_WEIGHT = 4.0
COEFFICIENT_RANGE = (-0.25, 1.0)
RIDGE, IDENTITY_RIDGE = 0.02, 0.02  # prior against noise, in squared head units
DOUBT = 0.25  # of a coefficient: what another tracker's idea of a mean face can feign
SWEEPS = 12


class Expression(Protocol):
    """size: numbers it takes; fit: [68,3] offsets from neutral, head units -> numbers;
    offsets: numbers -> [68,3] offsets."""

    @property
    def size(self) -> int: ...
    def fit(self, offsets: FloatArray, mouth_scale: float) -> FloatArray: ...
    def offsets(self, numbers: FloatArray) -> FloatArray: ...
    def without_expression(self, points: FloatArray) -> FloatArray: ...


class ModelExpression:
    """Coefficients of a face model's expressions, each held in its range."""

    def __init__(self, face: Morphable, source_points: FloatArray) -> None:
        """source_points: [68,3], the portrait unposed, head units."""
        basis = np.stack([face.landmarks(row) for row in face.expression_basis])
        moves = np.abs(basis[:, EXPRESSIVE]).max(axis=(1, 2))
        self._basis = basis[moves > 0.1 * moves.max()]  # without blinks
        self.size = len(self._basis)
        self._rows = np.stack([_weighed(offsets) for offsets in self._basis])
        self._gram = self._rows @ self._rows.T + RIDGE * np.eye(self.size)
        identity = np.stack([face.landmarks(row) for row in face.identity_basis])
        self._mean = face.landmarks(face.template)
        self._identity_rows = identity.reshape(len(identity), -1)
        # A portrait that smiles has that much less smile left.
        self._most = COEFFICIENT_RANGE[1] - self._worn(source_points)

    def fit(self, offsets: FloatArray, mouth_scale: float) -> FloatArray:
        """Coefficients that come nearest to the offsets. Source: DiffusionAct, Eq. 7, solved by
        coordinate descent within the bounds."""
        scaled = offsets.copy()
        scaled[MOUTH] *= mouth_scale
        return _bounded_least_squares(self._gram, self._rows @ _weighed(scaled), self._most)

    def offsets(self, numbers: FloatArray) -> FloatArray:
        """What the coefficients do to the 68 points."""
        return np.asarray(np.tensordot(numbers, self._basis, 1))

    def without_expression(self, points: FloatArray) -> FloatArray:
        """The face with its expression taken out, [68,3], where no neutral frame is known: what
        identity explains stays, what only expression explains goes."""
        return np.asarray(points - self.offsets(self._worn(points)), np.float64)

    def _worn(self, points: FloatArray) -> FloatArray:
        """The coefficients of the expression that a face surely wears, 0..1."""
        both = np.concatenate([self._identity_rows, self._basis.reshape(self.size, -1)])
        gram = both @ both.T + IDENTITY_RIDGE * np.eye(len(both))
        numbers = np.linalg.solve(gram, both @ (points - self._mean).ravel())[-self.size :]
        return np.asarray(np.clip((numbers - DOUBT) / (1.0 - DOUBT), 0.0, 1.0))


class FreeExpression:
    """The offsets themselves; of the jaw line only the chin follows the mouth."""

    size = 3 * len(EXPRESSIVE)
    _chin_share = np.clip(1.0 - (np.abs(CHIN - 8) / 5.0) ** 2, 0.0, 1.0)

    def fit(self, offsets: FloatArray, mouth_scale: float) -> FloatArray:
        kept: FloatArray = offsets[EXPRESSIVE].copy()
        kept[: len(CHIN)] *= self._chin_share[:, None] * (0.0, 1.0, 1.0)
        kept[len(CHIN) + len(BROWS) :] *= mouth_scale
        return kept.ravel()

    def offsets(self, numbers: FloatArray) -> FloatArray:
        offsets = np.zeros((68, 3))
        offsets[EXPRESSIVE] = numbers.reshape(-1, 3)
        return offsets

    def without_expression(self, points: FloatArray) -> FloatArray:
        return points


def _weighed(offsets: FloatArray) -> FloatArray:
    """What a fit compares, [M]: the points, and above all how far the lips part."""
    upper, lower = np.array(INNER_LIPS).T
    parting = PARTING_WEIGHT * (offsets[lower, 1] - offsets[upper, 1])
    return np.concatenate([(offsets[EXPRESSIVE] * WEIGHTS[:, None]).ravel(), parting])


def _bounded_least_squares(gram: FloatArray, right: FloatArray, most: FloatArray) -> FloatArray:
    """Coordinate descent from the clipped free solution; the order of the sweeps is fixed."""
    low, highest = COEFFICIENT_RANGE[0], most.tolist()
    start = np.clip(np.linalg.solve(gram, right), low, most)
    # Lists: at this size NumPy's calls cost more than the arithmetic.
    numbers, rows = start.tolist(), gram.tolist()
    residual = (right - gram @ start).tolist()
    for _ in range(SWEEPS):
        for i, row in enumerate(rows):
            moved = min(max(numbers[i] + residual[i] / row[i], low), highest[i])
            step, numbers[i] = moved - numbers[i], moved
            if step:
                residual = [r - step * g for r, g in zip(residual, row, strict=True)]
    return np.array(numbers)
