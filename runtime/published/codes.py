"""What the networks read of a face, and the drawing's landmarks from two faces' codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.errors import SettingsError
from diffusionact.landmarks import Landmarks, gaze_points
from diffusionact.morphable import Flame, flame_pixels

Float32Array: TypeAlias = npt.NDArray[np.float32]

CANVAS_PX = 256  # of the authors' canvas, crop and resized pictures
POSE, CAMERA, GAZE = 6, 3, 2


@dataclass(frozen=True)
class FaceCodes:
    """One face, all float32.

    shape [S] and expression [E]: coefficients of the face model; pose [6]: axis-angle of head and
    jaw, radians; camera [3]: scale, then shift to the right and up, half crops; gaze [2]: pitch and
    yaw, radians, relative to the gaze crop.
    """

    shape: Float32Array
    expression: Float32Array
    pose: Float32Array
    camera: Float32Array
    gaze: Float32Array

    @property
    def vector(self) -> Float32Array:
        """All of it in one row, float32 [S+E+11], as `Landmarks.codes` keeps it."""
        parts = (self.shape, self.expression, self.pose, self.camera, self.gaze)
        return np.concatenate(parts).astype(np.float32)

    @classmethod
    def of_vector(cls, vector: Float32Array, shape_codes: int) -> FaceCodes:
        """Return the codes of a row; shape_codes: how many of them are the shape's.

        Raises: SettingsError when the row is too short.
        """
        expression_codes = len(vector) - shape_codes - POSE - CAMERA - GAZE
        if expression_codes < 0:
            raise SettingsError(
                f"{len(vector)} face codes; wanted {shape_codes} of shape, expression, then "
                f"{POSE + CAMERA + GAZE} of pose, camera and gaze: track the faces again"
            )
        ends = np.cumsum([shape_codes, expression_codes, POSE, CAMERA])
        return cls(*np.split(np.asarray(vector, np.float32), ends))


def drawn_landmarks(face: Flame, shape_of: FaceCodes, motion_of: FaceCodes, side: int) -> Landmarks:
    """Return the landmarks to draw, px of a canvas of this side: one face's shape with the pose,
    expression, camera and gaze of another.

    As published, the pixels are those of the 224 px crop on a canvas of 256: place and size of the
    face in its picture are not in them.
    Source: DiffusionAct, Eq. 7-9; projection of DECA.
    """
    model = face.landmarks(shape_of.shape, motion_of.expression, motion_of.pose)
    points = flame_pixels(model, motion_of.camera) * np.float32(side / CANVAS_PX)
    pitch, yaw = (float(angle) for angle in motion_of.gaze)
    return Landmarks(np.asarray(points, np.float32), gaze_points(points, pitch, yaw))
