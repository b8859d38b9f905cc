"""The authors' aligned crop: the FFHQ recipe, with its mirrored, blurred and greyed surroundings.

The default pipeline cuts with `landmarks.crop_matrix` and `image.warp_crop` instead.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from diffusionact.errors import NoFace
from diffusionact.landmarks import EYE_A, EYE_B, MOUTH_CORNERS

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]
FloatArray: TypeAlias = npt.NDArray[np.floating]

BLUR = 0.01  # of the crop's side, the Gaussian's sigma; DiffAE has 0.02
BORDER, LEAST_BORDER_PX = 0.1, 3
PAD = 0.3
_GAUSSIAN_REACH = 4.0  # sigmas, as SciPy cuts it off


def crop_quad(points: FloatArray) -> tuple[FloatArray, float]:
    """Return the crop's corners [4,2] (UL, LL, LR, UR) and the length of its side, px.

    points: [68,>=2], px; the arithmetic is in their own precision.
    Raises: NoFace when eyes and mouth lie on one point. Source: FFHQ alignment.
    """
    xy = np.asarray(points)[:, :2]
    eye_a, eye_b = xy[EYE_A].mean(axis=0), xy[EYE_B].mean(axis=0)
    eyes, across = (eye_a + eye_b) * 0.5, eye_b - eye_a
    down = (xy[MOUTH_CORNERS[0]] + xy[MOUTH_CORNERS[1]]) * 0.5 - eyes
    x = across - down[::-1] * np.array([-1, 1], xy.dtype)
    half = max(np.hypot(*across) * 2.0, np.hypot(*down) * 1.8)
    length = np.hypot(*x)
    if not (math.isfinite(half) and half > 0.0 and length > 0.0):
        raise NoFace("the landmarks span no face: eyes and mouth lie on one point, or are missing")
    x = x / length * half
    y = x[::-1] * np.array([-1, 1], xy.dtype)
    centre = eyes + down * 0.1
    quad = np.stack([centre - x - y, centre - x + y, centre + x + y, centre + x - y])
    return quad, float(np.hypot(*x) * 2.0)


def crop_ffhq(image: UInt8Array, points: FloatArray, side: int) -> UInt8Array:
    """Return the aligned face, uint8 [side,side,3], in the image's colour order.

    image: uint8 [H,W,3]; points: [68,>=2], px of it, whole numbers in the authors' pipeline.
    Where the crop leaves the image it is mirrored, blurred, and fades to the median colour.
    Raises: NoFace. Source: FFHQ alignment as DiffusionAct changed it.
    """
    quad, size = crop_quad(points)
    border = max(round(size * BORDER), LEAST_BORDER_PX)
    low, high = np.floor(quad.min(axis=0)).astype(int), np.ceil(quad.max(axis=0)).astype(int)
    extent = np.array(image.shape[1::-1])
    first, last = np.maximum(low - border, 0), np.minimum(high + border, extent)
    if (last - first < extent).any():
        image = image[max(first[1], 0) : max(last[1], 0), max(first[0], 0) : max(last[0], 0)]
        if image.size == 0:
            raise NoFace("the face lies outside the picture")
        quad = quad - first.astype(quad.dtype)
        extent = np.array(image.shape[1::-1])
    low, high = np.floor(quad.min(axis=0)).astype(int), np.ceil(quad.max(axis=0)).astype(int)
    pads = np.concatenate([np.maximum(border - low, 0), np.maximum(high - extent + border, 0)])
    if pads.max() > border - 4:
        pads = np.maximum(pads, round(size * PAD))
        image = _surrounded(image, pads, size)
        quad = quad + pads[:2].astype(quad.dtype)
    return quad_transform(image, quad + np.asarray(0.5, quad.dtype), side)


def _surrounded(image: UInt8Array, pads: npt.NDArray[np.int_], size: float) -> UInt8Array:
    """The image with its surroundings, pads: left, top, right, bottom, px."""
    left, top, right, bottom = (int(pad) for pad in pads)
    around = ((top, bottom), (left, right), (0, 0))
    wide = np.pad(image.astype(np.float32), around, "reflect")
    height, width = wide.shape[:2]
    rows, columns = np.arange(height)[:, None], np.arange(width)[None]
    sideways = np.minimum(np.float32(columns) / left, np.float32(width - 1 - columns) / right)
    upright = np.minimum(np.float32(rows) / top, np.float32(height - 1 - rows) / bottom)
    mask = np.maximum(1.0 - sideways, 1.0 - upright)[..., None]
    wide += (_blurred(wide, size * BLUR) - wide) * np.clip(mask * 3.0 + 1.0, 0.0, 1.0)
    wide += (np.median(wide, axis=(0, 1)) - wide) * np.clip(mask, 0.0, 1.0)
    return np.clip(np.rint(wide), 0, 255).astype(np.uint8)


def _blurred(image: Float32Array, sigma: float) -> Float32Array:
    reach = 2 * int(_GAUSSIAN_REACH * sigma + 0.5) + 1
    if reach == 1:
        return image
    blurred = cv2.GaussianBlur(
        image, (reach, reach), sigma, sigmaY=sigma, borderType=cv2.BORDER_REFLECT
    )
    return np.asarray(blurred, np.float32)


def quad_transform(image: UInt8Array, quad: FloatArray, side: int) -> UInt8Array:
    """Return uint8 [side,side,3]: a quadrilateral of the image, bilinear, black outside.

    quad: [4,2], UL, LL, LR, UR, px from the image's corner (the first pixel's centre is 0.5).
    Source: Pillow, Image.transform(QUAD, BILINEAR), which cuts off fractions.
    """
    (x0, y0), lower_left, lower_right, upper_right = (corner for corner in quad.astype(np.float64))
    share = (np.arange(side) + 0.5) / side
    u, v = share[None], share[:, None]
    x, y = (
        start + (right - start) * u + (below - start) * v + (far - below - right + start) * u * v
        for start, below, far, right in zip(
            (x0, y0), lower_left, lower_right, upper_right, strict=True
        )
    )
    height, width = image.shape[:2]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = np.where(inside, x, 0.5) - 0.5, np.where(inside, y, 0.5) - 0.5
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    dx, dy = (x - left)[..., None], (y - top)[..., None]
    columns = np.clip(left, 0, width - 1), np.clip(left + 1, 0, width - 1)
    rows = np.clip(top, 0, height - 1), np.clip(top + 1, 0, height - 1)
    first, second = (
        image[row, columns[0]] * (1.0 - dx) + image[row, columns[1]] * dx for row in rows
    )
    mixed = first + (second - first) * dy
    return np.asarray(np.where(inside[..., None], mixed, 0.0)).astype(np.uint8)
