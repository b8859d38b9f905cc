"""Pictures from strangers: their size is read from their first bytes before anything is decoded.

JPEG and PNG only: the page turns whatever a user has into one of them, upright and without
metadata.
"""

from __future__ import annotations

from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

UInt8Array: TypeAlias = npt.NDArray[np.uint8]

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
JPEG = b"\xff\xd8\xff"
JPEG_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # starts of a frame, as cameras and browsers code it
# What may stand before: tables and metadata. A reader that steps over anything else may be led
# past the frame that the decoder finds: other codings, the scan itself, markers of no meaning.
JPEG_BEFORE = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})
JPEG_SCAN = b"\xff\xda"
MOST_SCANS = 64  # the usual ten, with room: each costs a pass over the whole picture
LEAST_SIDE = 32
FRAME_SIDE, PORTRAIT_SIDE = 1280, 2048
JPEG_QUALITY = 88


class BadPicture(Exception):
    """Bytes that are no picture, or one of a size that nobody needs."""


def decode(encoded: bytes, most_side: int) -> UInt8Array:
    """Return uint8 [H,W,3] BGR of a JPEG or PNG with sides of 32 to `most_side` px.

    Raises: BadPicture.
    """
    width, height = size_of(encoded)
    if not (LEAST_SIDE <= width <= most_side and LEAST_SIDE <= height <= most_side):
        raise BadPicture(f"{width} x {height} px; wanted sides of {LEAST_SIDE} to {most_side}")
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None or image.shape[:2] != (height, width):
        raise BadPicture("a JPEG or PNG that cannot be decoded")
    return np.asarray(image, np.uint8)


def size_of(encoded: bytes) -> tuple[int, int]:
    """Return the width and height that a JPEG or PNG says it has. Raises: BadPicture."""
    if encoded.startswith(PNG) and len(encoded) >= len(PNG) + 8:
        at = len(PNG)
        return (
            int.from_bytes(encoded[at : at + 4], "big"),
            int.from_bytes(encoded[at + 4 : at + 8], "big"),
        )
    if encoded.startswith(JPEG):
        if encoded.count(JPEG_SCAN) > MOST_SCANS:
            raise BadPicture(f"a JPEG of more than {MOST_SCANS} scans")
        return _jpeg_size(encoded)
    raise BadPicture("neither a JPEG nor a PNG")


def _jpeg_size(encoded: bytes) -> tuple[int, int]:
    at = 2
    while at + 9 <= len(encoded) and encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if marker in JPEG_FRAMES:
            height = int.from_bytes(encoded[at + 5 : at + 7], "big")
            return int.from_bytes(encoded[at + 7 : at + 9], "big"), height
        if marker not in JPEG_BEFORE:
            break
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    raise BadPicture("a JPEG without a size")


def encode(image_bgr: UInt8Array) -> bytes:
    """Return the JPEG of uint8 [H,W,3] BGR."""
    done, encoded = cv2.imencode(".jpg", image_bgr, (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY))
    if not done:
        raise RuntimeError(f"OpenCV made no JPEG of {image_bgr.shape}")
    return encoded.tobytes()
