"""The crop that the gaze network sees: the face levelled by five points, 2-D only."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.landmarks import EYE_A, EYE_B, MOUTH_CORNERS, fit_similarity
from diffusionact.runtime.published.resample import sample_affine

Float32Array: TypeAlias = npt.NDArray[np.float32]
FloatArray: TypeAlias = npt.NDArray[np.floating]

NOSE_TIP = 30
TEMPLATE_PX = 112
# eyes, tip of the nose, corners of the mouth
TEMPLATE = np.array(
    [[35.343697, 51.6963], [76.453766, 51.5014], [56.029396, 71.7366], [39.14085, 92.3655],
     [73.18488, 92.2041]]
)  # fmt: skip
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


def crop_matrix(points: FloatArray, side: int) -> npt.NDArray[np.float64]:
    """Return the map of crop px to image px, [2,3], both pixel indices.

    points: [68,>=2], px. Source: Umeyama 1991, from the template to five points of the face.
    """
    xy = np.asarray(points, np.float64)[:, :2]
    ends = (xy[NOSE_TIP], *xy[list(MOUTH_CORNERS)])
    five = np.stack([xy[EYE_A].mean(axis=0), xy[EYE_B].mean(axis=0), *ends])
    scale, rotation, translation = fit_similarity(TEMPLATE, five)
    step = TEMPLATE_PX / side
    linear = scale * rotation
    # crop px u is at template (u + 0.5) step; the picture's coordinates count from its corner
    offset = linear @ np.full(2, 0.5 * step) + translation - 0.5
    return np.concatenate([linear * step, offset[:, None]], axis=1)


def crop(image: Float32Array, points: FloatArray, side: int) -> Float32Array:
    """Return what the network sees, float32 [1,3,side,side], normalised; grey beyond the image.

    image: float32 [H,W,3] in [-1, 1], RGB; points: [68,>=2], px of it.
    """
    seen = np.clip(sample_affine(image, crop_matrix(points, side), side), -1.0, 1.0)
    normalised = ((seen + np.float32(1.0)) / np.float32(2.0) - MEAN) / STD
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))[None]
