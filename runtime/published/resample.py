"""Sampling as the libraries under the authors' pipeline do it, in NumPy.

OpenCV's own warps round coordinates to 1/32 px, which is more than these stages allow.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]
FloatArray: TypeAlias = npt.NDArray[np.floating]

_FIXED_BITS = 22  # of Pillow's weights for pictures of 8 bits


def sample_affine(image: Float32Array, to_image: FloatArray, side: int) -> Float32Array:
    """Return float32 [side,side,C]: the image at affine places, bilinear, zero outside.

    image: float32 [H,W,C]; to_image: [2,3], output px -> image px, both pixel indices.
    Source: grid_sample with zero padding.
    """
    height, width = image.shape[:2]
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    matrix = np.asarray(to_image, np.float64)
    index = np.arange(side)
    rows = index[:, None]
    x = np.clip(matrix[0, 0] * index + matrix[0, 1] * rows + matrix[0, 2], -1.0, width) + 1.0
    y = np.clip(matrix[1, 0] * index + matrix[1, 1] * rows + matrix[1, 2], -1.0, height) + 1.0
    left, top = np.minimum(x.astype(np.intp), width), np.minimum(y.astype(np.intp), height)
    dx, dy = ((x - left)[..., None]).astype(np.float32), ((y - top)[..., None]).astype(np.float32)
    upper = padded[top, left] * (1 - dx) + padded[top, left + 1] * dx
    lower = padded[top + 1, left] * (1 - dx) + padded[top + 1, left + 1] * dx
    return np.asarray(upper * (1 - dy) + lower * dy, np.float32)


def resize_linear(image: Float32Array, side: int, antialias: bool) -> Float32Array:
    """Return float32 [side,side,C], bilinear; with `antialias` averaged where it shrinks.

    image: float32 [H,W,C]. Source: torch's interpolate, align_corners false.
    """
    down = _weights(image.shape[0], side, antialias).astype(np.float32)
    across = _weights(image.shape[1], side, antialias).astype(np.float32)
    narrow = np.einsum("xw,hwc->hxc", across, image, optimize=True)
    return np.asarray(np.einsum("yh,hxc->yxc", down, narrow, optimize=True), np.float32)


def resize_pillow(image: UInt8Array, width: int, height: int) -> UInt8Array:
    """Return uint8 [height,width,C], bilinear, averaged where it shrinks, to Pillow's last bit.

    image: uint8 [H,W,C]. Source: Pillow, Image.resize(BILINEAR): columns first, each pass rounded.
    """
    narrow = _pillow_pass(image, width, axis=1)
    return _pillow_pass(narrow, height, axis=0)


def _pillow_pass(image: UInt8Array, size: int, axis: int) -> UInt8Array:
    length = image.shape[axis]
    if length == size:
        return image
    fixed = np.floor(_weights(length, size, True) * (1 << _FIXED_BITS) + 0.5)
    lines = np.moveaxis(image, axis, 0).reshape(length, -1).astype(np.float64)
    # float64 holds these integers exactly, and has a fast product.
    total = fixed @ lines + (1 << (_FIXED_BITS - 1))
    summed = np.clip(np.floor(total / (1 << _FIXED_BITS)), 0, 255).astype(np.uint8)
    shape = np.moveaxis(image, axis, 0).shape[1:]
    return np.ascontiguousarray(np.moveaxis(summed.reshape(size, *shape), 0, axis))


@lru_cache(maxsize=16)
def _weights(length: int, size: int, antialias: bool) -> npt.NDArray[np.float64]:
    """What each of `size` outputs takes of `length` inputs, [size,length], rows of sum 1."""
    step = length / size
    support = max(step, 1.0) if antialias else 1.0
    centre = (np.arange(size) + 0.5) * step
    if not antialias:  # what lies beyond the edge is the edge
        centre = np.clip(centre, 0.5, length - 0.5)
    distance = np.abs(np.arange(length) + 0.5 - centre[:, None]) / support
    weights = np.maximum(1.0 - distance, 0.0)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))
