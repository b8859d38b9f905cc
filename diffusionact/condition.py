"""The condition picture: landmarks and gaze drawn as coloured lines and discs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.landmarks import Landmarks

UInt8Array: TypeAlias = npt.NDArray[np.uint8]

_FRACTION_BITS = 4  # OpenCV's fixed-point coordinates: 1/16 px
_REACH = 4.0  # points further than this many sides off the canvas are pulled in

# point indices, closed, RGB; drawn in this order
_CURVES: tuple[tuple[npt.NDArray[np.intp], bool, tuple[int, int, int]], ...] = (
    (np.arange(0, 17), False, (255, 255, 255)),
    (np.arange(17, 22), False, (255, 0, 0)),
    (np.arange(22, 27), False, (0, 255, 0)),
    (np.array([27, 28, 29, 30, 30, 33]), False, (0, 0, 255)),
    (np.arange(31, 36), False, (0, 0, 255)),
    (np.arange(36, 42), True, (255, 0, 255)),
    (np.arange(42, 48), True, (0, 255, 255)),
    (np.arange(48, 60), True, (255, 255, 0)),
    (np.arange(60, 68), True, (255, 255, 0)),
)
_GAZE_COLOURS = ((255, 165, 0), (128, 0, 128))


@dataclass(frozen=True)
class Drawing:
    """How the condition is drawn; the defaults are the published ones (for 256 px).

    With `antialias` lines lie at sub-pixel places, so that small motion shows; without it
    coordinates are truncated to whole pixels.
    """

    thickness_px: int = 2
    disc_radius_px: float = 5.0
    antialias: bool = False
    background: int = 1


def draw_condition(
    landmarks: Landmarks, side: int, drawing: Drawing, out: UInt8Array | None = None
) -> UInt8Array:
    """Return the drawing, uint8 [side,side,3], RGB; drawn into `out` when given.

    landmarks: in px of this canvas. A curve or disc with an unknown point is left out; points
    off the canvas are cut at its edge.
    Source: DiffusionAct code, for colours and order.
    """
    import cv2  # only who draws needs it: manifests are read where there is none

    canvas = np.empty((side, side, 3), np.uint8) if out is None else out
    canvas[:] = drawing.background
    bits = _FRACTION_BITS if drawing.antialias else 0
    line = cv2.LINE_AA if drawing.antialias else cv2.LINE_8
    coordinates = np.concatenate([landmarks.points[:, :2], landmarks.gaze])
    known = np.isfinite(coordinates).all(axis=1)
    all_known = bool(known.all())
    fixed = _fixed_point(np.where(known[:, None], coordinates, 0.0), side, bits)
    for indices, closed, colour in _CURVES:
        if all_known or known[indices].all():
            curve = fixed[indices]
            cv2.polylines(canvas, [curve], closed, colour, drawing.thickness_px, line, bits)
    radius = round(drawing.disc_radius_px * (1 << bits))
    for index, colour in enumerate(_GAZE_COLOURS, start=len(landmarks.points)):
        if known[index]:
            centre = (int(fixed[index, 0]), int(fixed[index, 1]))
            cv2.circle(canvas, centre, radius, colour, cv2.FILLED, line, bits)
    return canvas


def _fixed_point(xy: npt.NDArray[np.floating], side: int, bits: int) -> npt.NDArray[np.int32]:
    near = np.clip(xy, -_REACH * side, (1.0 + _REACH) * side)
    scaled = near * (1 << bits)
    return np.asarray(np.rint(scaled) if bits else scaled, np.int32)
