"""Small drivers and portraits for the tests of media, sound and whole clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from diffusionact.errors import NoFace
from diffusionact.landmarks import Landmarks, sidecar_path
from diffusionact.runtime.media import FRAME_NS, open_reader
from diffusionact.runtime.writer import make_track, open_writer

UInt8Array = npt.NDArray[np.uint8]


def grey(level: int, height: int = 48, width: int = 64) -> UInt8Array:
    return np.full((height, width, 3), level, np.uint8)


def write(
    path: Path,
    images: Sequence[UInt8Array],
    times_ns: Sequence[int],
    face: Landmarks,
    **options: Any,
) -> None:
    with open_writer(path, **options) as writer:
        for image, pts_ns in zip(images, times_ns, strict=True):
            writer.write(image, pts_ns, FRAME_NS, face)


def times_of(path: Path) -> list[int]:
    return [frame.pts_ns for frame in open_reader(path)]


def write_portrait(path: Path, image: UInt8Array, face: Landmarks) -> Path:
    """Write a portrait and its landmarks beside it."""
    cv2.imwrite(str(path), image)
    make_track([face], [0], (image.shape[1], image.shape[0])).save(sidecar_path(path))
    return path


def folder_of(path: Path, count: int) -> Path:
    path.mkdir()
    for i in range(count):
        cv2.imwrite(str(path / f"{i:03d}.png"), np.full((40, 40, 3), i, np.uint8))
    return path


def moving(face: Landmarks, count: int) -> list[Landmarks | None]:
    """The face with a mouth that opens frame by frame."""
    made: list[Landmarks | None] = []
    for i in range(count):
        points = face.points.copy()
        points[[65, 66, 67, 55, 56, 57, 58, 59], 1] += 0.4 * i
        made.append(Landmarks(points, face.gaze))
    return made


class ScriptedTracker:
    """Finds what a script says; a picture's grey level is the script's line."""

    def __init__(self, script: list[Landmarks | None]) -> None:
        self.script = script

    def detect(self, image_bgr: UInt8Array) -> list[Landmarks]:
        return [face for face in self.script[:1] if face is not None]

    def track(self, image_bgr: UInt8Array) -> Landmarks:
        face = self.script[int(image_bgr[0, 0, 0].round())]
        if face is None:
            raise NoFace("scripted")
        return face

    def close(self) -> None:
        pass
