"""Rendered drivers of a known motion, and what a face shows: for the tests of retargeting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from diffusionact.landmarks import Landmarks, Track
from diffusionact.morphable import angles, rendered_face, rotation
from diffusionact.runtime.headpose import Head, take_apart
from diffusionact.runtime.neutral import lid_openings, lip_gap, mouth_width
from diffusionact.runtime.retarget import Retargeter, RetargetSettings, iris_place

FloatArray = npt.NDArray[np.float64]

SIDE_PX, FPS = 128, 30
JAW_OPEN, SMILING, BLINK_A, BLINK_B = 0, 1, 10, 11  # in the face model's expressions


def rendered_driver(
    turn_deg: Sequence[float] = (0, 0, 0),
    expression: dict[int, float] | None = None,
    iris: Sequence[float] = (0, 0),
    scale_px: float = 50.0,
    depth: bool = True,
) -> Landmarks:
    """The mean face with a pose, an expression and irises moved in head units."""
    face = rendered_face()
    numbers = np.zeros(len(face.expression_basis))
    for index, value in (expression or {}).items():
        numbers[index] = value
    shape = face.template + np.tensordot(numbers, face.expression_basis, 1)
    eyes = np.stack([shape[36:42].mean(axis=0), shape[42:48].mean(axis=0)])
    eyes[:, :2] += iris
    turn = rotation(np.array(turn_deg, np.float64))
    made = Head(shape, eyes, scale_px, turn, np.array([200.0, 150.0, 0.0])).landmarks()
    if not depth:
        made.points[:, 2] = np.nan
    return made


def resting_source() -> Landmarks:
    """The mean face in a crop."""
    return rendered_driver(scale_px=SIDE_PX / 3.7).transformed(
        np.array([[1.0, 0.0, SIDE_PX / 2 - 200.0], [0.0, 1.0, SIDE_PX / 2 - 150.0]])
    )


def measured(face: Landmarks) -> dict[str, float]:
    """Pose in degrees, mouth and lids as ratios, gaze in half eye widths."""
    head = take_apart(face, rendered_face().template)
    yaw, pitch, roll = angles(head.rotation)
    gaze_x, gaze_y = iris_place(head)
    return {
        "yaw": yaw, "pitch": pitch, "roll": roll,
        "mouth": lip_gap(head.points) * mouth_width(head.points),
        "width": mouth_width(head.points), "lids": float(lid_openings(head.points).mean()),
        "gaze_x": gaze_x, "gaze_y": gaze_y,
    }  # fmt: skip


def squint(shut: float) -> dict[int, float]:
    return {BLINK_A: float(shut), BLINK_B: float(shut)}


def retargeted(
    source: Landmarks, faces: Sequence[Landmarks | None], fps: float = FPS, **settings: object
) -> list[Landmarks]:
    retargeter = Retargeter(source, RetargetSettings(**settings))  # type: ignore[arg-type]
    retargeter.calibrate(faces)
    return [retargeter.target(face, round(i * 1e9 / fps)) for i, face in enumerate(faces)]


def faces_of(path: Path) -> list[Landmarks | None]:
    track = Track.load(path)
    return [track[i] for i in range(len(track))]
