"""The rendered benchmark: people that no model was trained on, with exact ground truth.

Each person has a source and a target picture. The first of a series ship with the package as they were
rendered, losslessly, so that the benchmark needs no renderer; more of the same series are rendered
where numba is installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from diffusionact.errors import BundleError, MediaError
from diffusionact.evaluation import metrics
from diffusionact.evaluation.compared import Image
from diffusionact.evaluation.expression import ExpressionFit
from diffusionact.evaluation.reading import Reading
from diffusionact.landmarks import Landmarks, load_npz, save_npz
from diffusionact.morphable import Morphable, pose, project, rotation

FloatArray: TypeAlias = npt.NDArray[np.floating]

SEED = 2026  # of the series that ships: that of the model card, not of the training pool
SIZE = 128
FACE_LABELS = (1, 2, 3, 4, 7)  # skin, eyes, mouth, brows, glasses
EYE_LABEL = 2  # the renderer's class of the eyeball, its lids and lashes
MIN_EYE_OPENING = 0.15  # aspect ratio below which the lids hide the iris
NECK_PIVOT = np.array([0.0, 1.0, 0.45])  # head units, where a head turns
EYEBALL = (0.20, 0.16)  # head units the iris moves sideways and up per sine of the gaze


@dataclass(frozen=True)
class Shot:
    """One picture and all that is in it.

    image: uint8 [S,S,3] BGR; landmarks: px, exact; pose: [3] degrees; expression: [E] 0..1;
    gaze_deg: [2]; shift: [3] head units; labels: uint8 [S,S], the renderer's classes.
    """

    image: Image
    landmarks: Landmarks
    pose: FloatArray
    expression: FloatArray
    gaze_deg: FloatArray
    shift: FloatArray
    labels: npt.NDArray[np.uint8]

    @property
    def face(self) -> npt.NDArray[np.bool_]:
        """Where the face is, bool [S,S]."""
        return np.isin(self.labels, FACE_LABELS)

    def reading(self, fit: ExpressionFit) -> Reading:
        """What an eye that never errs reads. The expression is the fit's, to the exact landmarks:
        what it cannot tell from shape, it cannot tell in a result either."""
        points = np.asarray(self.landmarks.points[:, :2], np.float64)
        gaze = visible_gaze(self.landmarks.gaze[None], points[None], self.labels[None])[0]
        return Reading(points, gaze, np.asarray(self.pose, np.float64), fit(points))


@dataclass(frozen=True)
class Person:
    """shape: [I] identity coefficients; irises: [2,3] head units, unposed; units, centre: of the
    camera; source, target: two moments."""

    name: str
    shape: FloatArray
    irises: FloatArray
    units: float
    centre: FloatArray
    source: Shot
    target: Shot


def moved_landmarks(person: Person, motion: Shot, face: Morphable) -> Landmarks:
    """Return the exact landmarks of a person with the pose, expression and gaze of another, px.

    Source: DiffusionAct, Eq. 8: the source's shape, all else of the target.
    """
    head = face.shape(np.asarray(person.shape, np.float64), np.asarray(motion.expression))
    yaw, pitch = np.deg2rad(np.asarray(motion.gaze_deg, np.float64))
    look = [EYEBALL[0] * np.sin(yaw) * np.cos(pitch), EYEBALL[1] * np.sin(pitch), 0.0]
    points = np.concatenate([face.landmarks(head), person.irises + np.array(look)])
    turn = rotation(np.asarray(motion.pose, np.float64))
    posed = pose(points, turn, NECK_PIVOT, np.asarray(motion.shift, np.float64))
    side = len(person.source.image)
    scale = side / person.units
    seen = np.asarray(project(posed, scale, side / 2 - scale * np.asarray(person.centre)))
    return Landmarks(seen[:68].astype(np.float32), seen[68:, :2].astype(np.float32))


def visible_gaze(gaze: FloatArray, points: FloatArray, labels: npt.NDArray[np.uint8]) -> FloatArray:
    """Return gaze points float32 [N,2,2] with those set to NaN that the picture does not show:
    lids closed, or the eye behind the nose, hair or a frame.

    gaze: [N,2,2] px; points: [N,68,>=2] px; labels: uint8 [N,S,S], the renderer's classes
    """
    place = np.clip(np.rint(gaze), 0, labels.shape[-1] - 1).astype(int)
    at = labels[np.arange(len(labels))[:, None], place[..., 1], place[..., 0]]
    shown = (at == EYE_LABEL) & (metrics.eye_opening(points) >= MIN_EYE_OPENING)
    return np.where(shown[..., None], gaze, np.nan).astype(np.float32)


_SHOT_ARRAYS = ("pose", "expression", "gaze_deg", "shift")


def save_people(path: Path, people: Sequence[Person]) -> None:
    """Return nothing; writes the people, their pictures without loss."""
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "names": np.array([person.name for person in people]),
        "shape": np.stack([person.shape for person in people]),
        "irises": np.stack([person.irises for person in people]),
        "units": np.array([person.units for person in people]),
        "centre": np.stack([person.centre for person in people]),
    }
    for moment in ("source", "target"):
        shots: list[Shot] = [getattr(person, moment) for person in people]
        for name in _SHOT_ARRAYS:
            arrays[f"{moment}.{name}"] = np.stack([getattr(shot, name) for shot in shots])
        arrays[f"{moment}.points"] = np.stack([shot.landmarks.points for shot in shots])
        arrays[f"{moment}.gaze"] = np.stack([shot.landmarks.gaze for shot in shots])
        pictures = [_encoded(".webp", shot.image, cv2.IMWRITE_WEBP_QUALITY, 101) for shot in shots]
        masks = [_encoded(".png", s.labels, cv2.IMWRITE_PNG_COMPRESSION, 9) for s in shots]
        for name, blobs in (("images", pictures), ("labels", masks)):
            arrays[f"{moment}.{name}"] = np.concatenate(blobs)
            arrays[f"{moment}.{name}_ends"] = np.cumsum([len(blob) for blob in blobs])
    save_npz(path, **arrays)


def load_people(path: Path) -> list[Person]:
    """Return the people of a file that `save_people` wrote. Raises: BundleError."""
    try:
        arrays = load_npz(path, "set of rendered people")
        shots = {moment: _shots(arrays, moment) for moment in ("source", "target")}
        return [
            Person(
                str(name),
                np.asarray(arrays["shape"])[i],
                np.asarray(arrays["irises"])[i],
                float(np.asarray(arrays["units"])[i]),
                np.asarray(arrays["centre"])[i],
                shots["source"][i],
                shots["target"][i],
            )
            for i, name in enumerate(arrays["names"])
        ]
    except (MediaError, KeyError, IndexError, cv2.error) as error:
        raise BundleError(
            f"{path}: not the rendered benchmark ({error}); reinstall the package"
        ) from error


def _shots(arrays: Any, moment: str) -> list[Shot]:
    images = _decoded(arrays, f"{moment}.images", cv2.IMREAD_COLOR)
    labels = _decoded(arrays, f"{moment}.labels", cv2.IMREAD_GRAYSCALE)
    columns: Iterable[Any] = zip(
        *(arrays[f"{moment}.{name}"] for name in ("points", "gaze", *_SHOT_ARRAYS)), strict=True
    )
    return [
        Shot(image, Landmarks(points, gaze), angles, expression, gaze_deg, shift, mask)
        for image, mask, (points, gaze, angles, expression, gaze_deg, shift) in zip(
            images, labels, columns, strict=True
        )
    ]


def _encoded(suffix: str, image: npt.NDArray[np.uint8], *how: int) -> npt.NDArray[np.uint8]:
    return np.asarray(cv2.imencode(suffix, image, how)[1], np.uint8).ravel()


def _decoded(arrays: Any, name: str, how: int) -> list[npt.NDArray[np.uint8]]:
    blobs = np.split(arrays[name], arrays[f"{name}_ends"][:-1])
    return [np.asarray(cv2.imdecode(blob, how), np.uint8) for blob in blobs]
