"""The crop that the morphable-model network sees."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.runtime.published.resample import sample_affine

Float32Array: TypeAlias = npt.NDArray[np.float32]
FloatArray: TypeAlias = npt.NDArray[np.floating]

BOX_SCALE, CROP_SCALE = 1.1, 1.25  # of the landmarks' box to a face box, and of that to the crop


def crop_matrix(points: FloatArray, side: int) -> npt.NDArray[np.float64]:
    """Return the map of crop px to image px, [2,3], both pixel indices.

    points: [68,>=2], px. First and last pixel of the crop lie on the ends of the square.
    Source: EMOCA, bounding box of 68 landmarks.
    """
    low, high = points[:, :2].min(axis=0), points[:, :2].max(axis=0)
    width, height = (float(v) for v in high - low)
    size = int((width + height) / 2.0 * BOX_SCALE * CROP_SCALE)
    step = size / (side - 1)
    x, y = (float(v) - size / 2.0 for v in (low + high) / 2.0)
    return np.array([[step, 0.0, x], [0.0, step, y]])


def crop(image: Float32Array, points: FloatArray, side: int) -> Float32Array:
    """Return what the network sees, float32 [1,3,side,side], black beyond the image.

    image: float32 [H,W,3] in [0, 1], RGB; points: [68,>=2], px of it.
    """
    seen = sample_affine(image, crop_matrix(points, side), side)
    return np.ascontiguousarray(seen.transpose(2, 0, 1))[None]
