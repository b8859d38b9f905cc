"""Expression coefficients from 68 flat landmarks: our own face model, fitted to them."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.morphable import Morphable

FloatArray: TypeAlias = npt.NDArray[np.float64]

ROUNDS = 6
# Standard deviations: of an identity and of an expression coefficient, and of a landmark in head
# units, two pixels of a face that fills a picture of 128: what a reader is wrong by, and more, for
# a fit that follows noise tells less of two pictures.
IDENTITY_SPREAD, EXPRESSION_SPREAD, NOISE = 1.0, 0.3, 0.06
RANGE = (0.0, 1.0)  # of an expression coefficient


class ExpressionFit:
    """Pose, shape and expression that explain 68 points best; only the expression is kept.

    Fits of two pictures compare with each other. What shape and expression explain alike goes to
    either, so that a fit has an error of its own, which the row of the true pictures shows.
    """

    def __init__(self, face: Morphable) -> None:
        rows = [face.identity_basis, face.expression_basis]
        self._mean = np.asarray(face.landmarks(face.template), np.float64)
        basis = np.concatenate([face.landmarks(row) for row in rows])
        self._basis = np.asarray(basis, np.float64)  # [I+E,68,3]
        self._identity = len(face.identity_basis)
        spread = np.full(len(basis), IDENTITY_SPREAD)
        spread[self._identity :] = EXPRESSION_SPREAD
        self._prior = np.diag(np.square(NOISE / spread))

    def __call__(self, points: FloatArray) -> FloatArray:
        """Return the coefficients [E], 0..1, by alternating camera and shape.

        points: [68,>=2] px; their scale and place do not matter.
        Source: DiffusionAct, Eq. 7, under scaled orthography; Gaussian priors.
        """
        flat = np.asarray(points, np.float64)[:, :2]
        numbers = np.zeros(len(self._basis))
        for _ in range(ROUNDS):
            shape = self._mean + np.tensordot(numbers, self._basis, 1)
            camera, scale = _camera(shape, flat)
            seen = (flat - flat.mean(axis=0)) / scale
            moved = self._basis @ camera.T
            moved -= moved.mean(axis=1, keepdims=True)
            rows = moved.reshape(len(moved), -1)
            rest = seen - _centred(self._mean) @ camera.T
            gram = rows @ rows.T + self._prior
            numbers = np.linalg.solve(gram, rows @ rest.ravel())
            numbers[self._identity :] = np.clip(numbers[self._identity :], *RANGE)
        return np.asarray(numbers[self._identity :])


def _camera(shape: FloatArray, flat: FloatArray) -> tuple[FloatArray, float]:
    """The first two rows of the rotation [2,3] and the scale, px per head unit."""
    linear = np.linalg.lstsq(_centred(shape), flat - flat.mean(axis=0), rcond=None)[0].T
    u, spread, vt = np.linalg.svd(linear, full_matrices=False)
    return np.asarray(u @ vt), float(spread.mean())


def _centred(points: FloatArray) -> FloatArray:
    return np.asarray(points - points.mean(axis=0))
