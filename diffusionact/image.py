"""Pictures: uint8 HWC <-> float NCHW in [-1, 1], colour order, resizing without aliasing."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.errors import MediaError

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]
FloatArray: TypeAlias = npt.NDArray[np.floating]

MAX_SUPERSAMPLING = 16  # a 128 px crop of a face 2048 px wide; larger ones alias a little


def to_tensor(image: UInt8Array, out: Float32Array | None = None) -> Float32Array:
    """Return the picture as float32 [1,3,H,W] in [-1, 1]; written to `out` when given.

    image: uint8 [H,W,3], RGB. Colour order is kept.
    """
    if out is None:
        out = np.empty((1, 3, *image.shape[:2]), np.float32)
    np.copyto(out[0], image.transpose(2, 0, 1))
    out /= np.float32(127.5)
    out -= 1.0
    return out


def to_uint8(
    x: Float32Array, out: UInt8Array | None = None, scratch: Float32Array | None = None
) -> UInt8Array:
    """Return the picture as uint8 [H,W,3], clipped and rounded; colour order is kept. Written to
    `out` when given, by way of `scratch`, float32 of x's shape.

    x: float32 [1,3,H,W] or [3,H,W], nominally [-1, 1].
    """
    scaled = np.multiply(x, np.float32(127.5), out=scratch)
    scaled += np.float32(127.5)
    np.clip(np.rint(scaled, out=scaled), 0.0, 255.0, out=scaled)
    planes = scaled.reshape(scaled.shape[-3:])
    picture = np.empty((*planes.shape[1:], 3), np.uint8) if out is None else out
    for channel, plane in enumerate(planes):  # a transposed copy takes three times as long
        np.copyto(picture[..., channel], plane, casting="unsafe")
    return picture


def bgr_to_rgb(image: UInt8Array, out: UInt8Array | None = None) -> UInt8Array:
    """Return uint8 [H,W,3] with the first and last channel swapped, contiguous (both ways);
    written to `out` when given."""
    import cv2  # a thirtieth of the time of a reversed copy; tensors are made where there is none

    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=out), np.uint8)


def check_image(image: UInt8Array, what: str) -> None:
    """Return nothing when `image` is uint8 [H,W,3] and not empty.

    Raises: MediaError naming `what`, with the shape and type seen.
    """
    if not isinstance(image, np.ndarray):
        raise MediaError(f"{what}: not an array but {type(image).__name__}; is the file missing?")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise MediaError(f"{what}: {image.dtype} {list(image.shape)}; wanted uint8 [H,W,3], BGR")


def resize_area(image: UInt8Array, width: int, height: int) -> UInt8Array:
    """Return the picture at width x height px: averaged when it shrinks, bilinear when it grows."""
    import cv2  # as above

    shrinks = width <= image.shape[1] and height <= image.shape[0]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (width, height), interpolation=method), np.uint8)


def warp_crop(image: UInt8Array, matrix: FloatArray, side: int) -> UInt8Array:
    """Return the side x side px crop that `matrix` cuts out, averaged where it shrinks.

    image: uint8 [H,W,3], any colour order; matrix: [2,3], image px -> crop px, a similarity
    over pixel indices (the centre of the first pixel is 0, 0). Beyond the picture: mirrored.
    """
    scale = math.hypot(matrix[0, 0], matrix[1, 0])
    factor = min(max(math.ceil(1.0 / scale - 1e-6), 1), MAX_SUPERSAMPLING)
    import cv2  # as above

    fine = np.asarray(matrix, np.float64) * factor
    fine[:, 2] += (factor - 1) / 2.0
    size = side * factor
    warped = cv2.warpAffine(
        image, fine, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    )
    if factor > 1:
        warped = cv2.resize(warped, (side, side), interpolation=cv2.INTER_AREA)
    return np.asarray(warped, np.uint8)
