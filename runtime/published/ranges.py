"""Ranges of values in the authors' pipeline, with the surprises that they hold."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]

_WIDTH = np.float32(2.0 + 1e-5)  # of the range -1..1, as the authors divide by it
_LEAST_RANGE = np.float32(1e-5)


def to_signed(image: UInt8Array) -> Float32Array:
    """Return float32 of the same shape in [-1, 1]. image: uint8. Source: torchvision, ToTensor
    and Normalize: v / 255, less 0.5, over 0.5."""
    unit = image.astype(np.float32) / np.float32(255.0)
    return np.asarray((unit - np.float32(0.5)) / np.float32(0.5), np.float32)


def to_unit(x: Float32Array) -> Float32Array:
    """Return float32 in [0, 1): what the face networks see. x: float32 in [-1, 1], clipped."""
    return np.asarray((np.clip(x, -1.0, 1.0) + np.float32(1.0)) / _WIDTH, np.float32)


def truncated_uint8(x: Float32Array) -> UInt8Array:
    """Return uint8, cut off rather than rounded: 63 of 256 grey levels come back one lower.

    x: float32 in [-1, 1].
    """
    unit = (np.clip(x, -1.0, 1.0) + np.float32(1.0)) / np.float32(2.0)
    return np.asarray(unit * np.float32(255.0)).astype(np.uint8)


def stretched_uint8(x: Float32Array) -> UInt8Array:
    """Return uint8 [H,W,3]: the least value of the picture becomes black, the greatest white.

    x: float32 [1,3,H,W] or [3,H,W]. Source: torchvision, save_image with normalize.
    """
    chw = x[0] if x.ndim == 4 else x
    low, high = chw.min(), chw.max()
    unit = (chw - low) / max(high - low, _LEAST_RANGE)
    scaled = np.clip(unit * np.float32(255.0) + np.float32(0.5), 0.0, 255.0)
    return np.ascontiguousarray(scaled.transpose(1, 2, 0)).astype(np.uint8)
