"""Small videos for the tests of media and sound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffusionact.landmarks import Landmarks
from diffusionact.runtime.media import FRAME_NS, open_reader
from diffusionact.runtime.writer import open_writer

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
