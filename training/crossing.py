"""Landmarks across people: the source's face with a driver's pose, expression and gaze."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from diffusionact.evaluation.expression import ExpressionFit, FaceFit
from diffusionact.evaluation.rendered import NECK_PIVOT
from diffusionact.landmarks import EYE_A, EYE_B, Landmarks
from diffusionact.morphable import rendered_face

F64 = npt.NDArray[np.float64]


@cache
def face_fit() -> ExpressionFit:
    """Returns the fit of our own face model."""
    return ExpressionFit(rendered_face())


def crossed(source: Landmarks, driver: Landmarks) -> Landmarks:
    """Returns the landmarks to draw, px of the source's crop; crossed(a, a) is a.

    The model's shape, and what it does not explain of the face, are the source's, as are size
    and place of the neck; pose, expression and gaze are the driver's.
    Source: DiffusionAct, Eq. 8.
    """
    fit = face_fit()
    ours, theirs = fit.fit(_flat(source)), fit.fit(_flat(driver))
    moved = FaceFit(
        ours.shape, theirs.expression, theirs.rotation, ours.scale, _offset(ours, theirs)
    )
    rest = (_flat(source) - fit.points(ours)) @ ours.rotation[:2]  # unposed, [68,3]
    flat = fit.points(moved) + rest @ moved.rotation[:2].T
    depth = np.full((len(flat), 1), np.nan)
    points = np.concatenate([flat, depth], axis=1).astype(np.float32)
    return Landmarks(points, _gaze(driver, flat, _flat(driver)))


def _flat(face: Landmarks) -> F64:
    return np.asarray(face.points[:, :2], np.float64)


def _offset(ours: FaceFit, theirs: FaceFit) -> F64:
    """Where the model's origin comes to lie when the head turns about the neck."""
    turned = ours.rotation[:2] - theirs.rotation[:2]
    return np.asarray(ours.offset + ours.scale * turned @ NECK_PIVOT)


def _gaze(driver: Landmarks, points: F64, before: F64) -> npt.NDArray[np.float32]:
    """The irises as far from the middle of their eyes as the driver's, in widths of an eye."""
    made = []
    for iris, eye in zip(np.asarray(driver.gaze, np.float64), (EYE_A, EYE_B), strict=True):
        size = _width(points[eye]) / max(_width(before[eye]), 1e-6)
        made.append(points[eye].mean(axis=0) + size * (iris - before[eye].mean(axis=0)))
    return np.asarray(made, np.float32)


def _width(eye: F64) -> float:
    return float(np.hypot(*(eye[3] - eye[0])))
