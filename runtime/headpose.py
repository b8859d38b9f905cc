"""The rigid part of a face's motion: where the head is, and the face as it would look upright.

Head units and axes are those of `diffusionact.morphable`; its mean face is the frame in which
faces of different people and pictures are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.landmarks import EYE_A, EYE_B, Float32Array, Landmarks, fit_similarity

FloatArray: TypeAlias = npt.NDArray[np.float64]

# Points that expressions hardly move: ears, bridge and base of the nose, corners of the eyes.
RIGID = np.array([0, 1, 15, 16, *range(27, 36), 36, 39, 42, 45])


@dataclass(frozen=True)
class Head:
    """A face taken apart: picture = scale * points @ rotation.T + translation.

    points: float64 [68,3], head units, unposed; gaze: float64 [2,3], the irises likewise;
    scale: px per head unit; rotation: [3,3]; translation: [3], px.
    """

    points: FloatArray
    gaze: FloatArray
    scale: float
    rotation: FloatArray
    translation: FloatArray

    def at(self, point: FloatArray) -> FloatArray:
        """Where a point of the head's own frame, [..., 3], lies in the picture, px."""
        return self.scale * point @ self.rotation.T + self.translation

    def landmarks(self) -> Landmarks:
        """The face put together again, px."""
        points = self.at(self.points).astype(np.float32)
        return Landmarks(points, self.at(self.gaze)[:, :2].astype(np.float32))


def take_apart(face: Landmarks, reference: FloatArray) -> Head:
    """Return head pose and unposed face.

    face: px; depths that are NaN are taken from the reference. reference: [68,3], head units, the
    mean face or the same person's neutral one.
    Source: Umeyama 1991 on the points of `RIGID`.
    """
    points = np.asarray(face.points, np.float64)
    if not np.isfinite(points[:, 2]).all():
        points = lift(points[:, :2], reference)
    scale, rotation, translation = fit_similarity(reference[RIGID], points[RIGID])
    unposed = (points - translation) @ rotation / scale
    # The irises have no depth of their own: they lie on the plane through their eye's corners
    # and lids, and seen along z only one point of that plane matches.
    depths = np.array([unposed[eye, 2].mean() for eye in (EYE_A, EYE_B)])
    seen = (face.gaze - translation[:2]) / scale - depths[:, None] * rotation[:2, 2]
    flat = np.linalg.solve(rotation[:2, :2], seen.T).T
    gaze = np.concatenate([flat, depths[:, None]], axis=1)
    return Head(unposed, gaze, scale, rotation, translation)


def lift(points: FloatArray | Float32Array, reference: FloatArray) -> FloatArray:
    """Return flat points [68,2] px with the depths of a posed reference face, [68,3] px.

    Source: scaled orthography; the linear camera is brought to the nearest rotation by its SVD.
    """
    shape = reference - reference[RIGID].mean(axis=0)
    flat = points - points[RIGID].mean(axis=0)
    linear = np.linalg.lstsq(shape[RIGID], flat[RIGID], rcond=None)[0].T
    u, spread, vt = np.linalg.svd(linear, full_matrices=False)
    rows = u @ vt
    depth = shape @ np.cross(rows[0], rows[1]) * spread.mean()
    return np.concatenate([points, depth[:, None]], axis=1)
