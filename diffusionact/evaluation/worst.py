"""The worst frames of a run, as pictures beside what they should be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from diffusionact.errors import MediaError
from diffusionact.evaluation.compared import Clip, Image
from diffusionact.files import write_whole
from diffusionact.image import resize_area

KEPT, EACH_CLIP = 12, 2
SIDE_PX = 160
INDEX = "worst.json"
BY = ("lpips", "perceptual_rendered", "l1")  # the first that a frame has


@dataclass(frozen=True)
class Case:
    """One of them. file: source, wanted, result and twice their difference, side by side."""

    file: str
    clip: str
    frame: str
    by: str
    value: float
    number: int


class Worst:
    """The worst frames so far; a clip has at most two among them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cases = read_worst(folder)
        self._number = max((case.number for case in self._cases), default=0)

    def offer(
        self, row: Mapping[str, Any], clip: Clip, reference: Image | None, result: Image | None
    ) -> None:
        """Return nothing; the frame is kept if it is among the worst."""
        by = next((name for name in BY if row.get(name) is not None), None)
        if by is None or reference is None or result is None:
            return
        if any((case.clip, case.frame) == (row["clip"], row["frame"]) for case in self._cases):
            return
        self._number += 1
        name = f"{self._number:08d}.jpg"
        case = Case(name, row["clip"], row["frame"], by, row[by], self._number)
        cases = sorted([*self._cases, case], key=lambda each: -each.value)
        kept: list[Case] = []
        for each in cases:
            alike = sum(other.clip == each.clip for other in kept)
            if alike < EACH_CLIP and len(kept) < KEPT:
                kept.append(each)
        if case in kept:
            self._folder.mkdir(parents=True, exist_ok=True)
            strip = _strip(_source(clip), reference, result)
            _, data = cv2.imencode(".jpg", strip, [cv2.IMWRITE_JPEG_QUALITY, 88])
            write_whole(self._folder / name, data.tobytes())
        for each in set(self._cases) - set(kept):
            (self._folder / each.file).unlink(missing_ok=True)
        if kept != self._cases:
            self._cases = kept
            lines = json.dumps([asdict(each) for each in kept], indent=1)
            write_whole(self._folder / INDEX, lines + "\n")


def read_worst(folder: Path) -> list[Case]:
    """Return the worst frames of a run, the worst first; none where none were kept."""
    try:
        return [Case(**values) for values in json.loads((folder / INDEX).read_bytes())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise MediaError(f"{folder / INDEX}: cannot be read ({error})") from error


def _source(clip: Clip) -> Image | None:
    try:
        return None if clip.source is None else clip.source()
    except MediaError:
        return None


def _strip(source: Image | None, reference: Image, result: Image) -> Image:
    if result.shape != reference.shape:
        result = resize_area(result, reference.shape[1], reference.shape[0])
    difference = np.abs(result.astype(np.int16) - reference).clip(0, 127).astype(np.uint8) * 2
    parts = [part for part in (source, reference, result, difference) if part is not None]
    sized = [resize_area(p, round(SIDE_PX * p.shape[1] / p.shape[0]), SIDE_PX) for p in parts]
    return np.concatenate(sized, axis=1)
