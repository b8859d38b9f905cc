"""Our own face model fitted to 68 flat landmarks: shape, expression, pose and camera."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.morphable import Morphable, angles

FloatArray: TypeAlias = npt.NDArray[np.float64]

ROUNDS = 6
# Standard deviations: of an identity and of an expression coefficient, and of a landmark in head
# units, two pixels of a face that fills a picture of 128: what a reader is wrong by, and more, for
# a fit that follows noise tells less of two pictures.
IDENTITY_SPREAD, EXPRESSION_SPREAD, NOISE = 1.0, 0.3, 0.06
RANGE = (0.0, 1.0)  # of an expression coefficient


@dataclass(frozen=True)
class FaceFit:
    """What explains 68 points, all float64.

    shape: [I] and expression: [E], 0..1, coefficients of the model; rotation: [3,3]; scale: px per
    head unit; offset: [2] px: points = scale * (model @ rotation[:2].T) + offset.
    """

    shape: FloatArray
    expression: FloatArray
    rotation: FloatArray
    scale: float
    offset: FloatArray

    @property
    def pose_deg(self) -> FloatArray:
        """Yaw, pitch and roll, [3]."""
        return np.asarray(angles(self.rotation), np.float64)


class ExpressionFit:
    """Pose, shape and expression that explain 68 points best.

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
        """Return the expression coefficients [E], 0..1, as `fit` finds them."""
        return self.fit(points).expression

    def fit(self, points: FloatArray, shape: FloatArray | None = None) -> FaceFit:
        """Return all that explains the points, by alternating camera and shape.

        points: [68,>=2] px; their scale and place do not matter. shape: [I], where it is known,
        say of the same person's other frames.
        Source: DiffusionAct, Eq. 7, under scaled orthography; Gaussian priors.
        """
        flat = np.asarray(points, np.float64)[:, :2]
        first = 0 if shape is None else self._identity  # of the coefficients that are looked for
        numbers = np.zeros(len(self._basis))
        numbers[:first] = 0.0 if shape is None else shape
        for _ in range(ROUNDS):
            camera, scale = _camera(self._shape(numbers), flat)
            seen = (flat - flat.mean(axis=0)) / scale
            moved = self._basis @ camera.T
            moved -= moved.mean(axis=1, keepdims=True)
            rows = moved.reshape(len(moved), -1)
            rest = (seen - _centred(self._mean) @ camera.T).ravel() - numbers[:first] @ rows[:first]
            rows = rows[first:]
            gram = rows @ rows.T + self._prior[first:, first:]
            numbers[first:] = np.linalg.solve(gram, rows @ rest)
            numbers[self._identity :] = np.clip(numbers[self._identity :], *RANGE)
        return self._explained(numbers, camera, scale, flat)

    @property
    def sizes(self) -> tuple[int, int]:
        """How many coefficients shape and expression have."""
        return self._identity, len(self._basis) - self._identity

    def points(self, fit: FaceFit) -> FloatArray:
        """Return what the fit says of the points, [68,2] px."""
        model = self._shape(np.concatenate([fit.shape, fit.expression]))
        return np.asarray(fit.scale * model @ fit.rotation[:2].T + fit.offset)

    def _shape(self, numbers: FloatArray) -> FloatArray:
        return np.asarray(self._mean + np.tensordot(numbers, self._basis, 1))

    def _explained(
        self, numbers: FloatArray, camera: FloatArray, scale: float, flat: FloatArray
    ) -> FaceFit:
        rotation = np.concatenate([camera, np.cross(camera[0], camera[1])[None]])
        middle = self._shape(numbers).mean(axis=0)
        offset = flat.mean(axis=0) - scale * camera @ middle
        split = self._identity
        return FaceFit(numbers[:split].copy(), numbers[split:].copy(), rotation, scale, offset)


def _camera(shape: FloatArray, flat: FloatArray) -> tuple[FloatArray, float]:
    """The first two rows of the rotation [2,3] and the scale, px per head unit."""
    linear = np.linalg.lstsq(_centred(shape), flat - flat.mean(axis=0), rcond=None)[0].T
    u, spread, vt = np.linalg.svd(linear, full_matrices=False)
    return np.asarray(u @ vt), float(spread.mean())


def _centred(points: FloatArray) -> FloatArray:
    return np.asarray(points - points.mean(axis=0))
