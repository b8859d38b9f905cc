"""Clips and a reader of faces whose truth is known, for the tests of prepared data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffusionact.errors import MediaError
from diffusionact.evaluation.layouts import Footage
from diffusionact.landmarks import Landmarks
from diffusionact.morphable import rendered_face, rotation
from diffusionact.training.prepare_clip import Request

U8 = npt.NDArray[np.uint8]
HEIGHT, WIDTH = 120, 160


def posed(shape_seed: int, yaw_deg: float, jaw: float = 0.0, units_px: float = 25.0) -> Landmarks:
    """A face of our model in the middle of a picture, depth included."""
    model = rendered_face()
    expression = np.zeros(len(model.expression_basis))
    expression[0] = jaw
    shape = 0.5 * np.random.default_rng(shape_seed).standard_normal(len(model.identity_basis))
    head = np.asarray(model.landmarks(model.shape(shape, expression)))
    points = units_px * head @ rotation(np.array([yaw_deg, 0.0, 0.0])).T
    points += [WIDTH / 2, HEIGHT / 2 - 10, 0.0]
    gaze = np.stack([points[36:42, :2].mean(axis=0), points[42:48, :2].mean(axis=0)])
    return Landmarks(points.astype(np.float32), gaze.astype(np.float32))


def scene(person: int, frame: int) -> U8:
    """A picture with detail, of its own for each person, that moves a little from frame to frame."""
    noise = np.random.default_rng(person).integers(-30, 30, (HEIGHT // 4, WIDTH // 4, 3))
    noise += 70 + 60 * (person % 3)
    image = np.kron(noise, np.ones((4, 4, 1))).astype(np.uint8)
    return np.roll(image, frame, axis=1)


Shot = tuple[U8 | None, list[Landmarks]]


@dataclass
class ScriptedReader:
    """Reads clips that were never files: name -> (picture, faces) of each frame. promised: lengths
    that the headers say, where another than the truth, or None."""

    clips: dict[str, list[Shot]]
    promised: dict[str, int | None] = field(default_factory=dict)
    closed: int = 0
    shown: list[str] = field(default_factory=list)
    _faces: list[Landmarks] = field(default_factory=list)

    def length(self, path: Path) -> int | None:
        return self.promised.get(path.name, len(self.clips.get(path.name, ())))

    def pictures(self, path: Path) -> Iterator[tuple[U8 | None, int]]:
        if path.name not in self.clips:
            raise MediaError(f"{path}: cannot be read")
        self.shown.append(path.name)
        for number, (image, faces) in enumerate(self.clips[path.name]):
            self._faces = faces
            yield image, 40_000_000 * number

    def faces(self, image_bgr: U8) -> list[Landmarks]:
        return self._faces

    def drawn(self, face: Landmarks) -> Landmarks | None:
        return None

    def mask(self, crop: U8) -> U8 | None:
        return None

    def close(self) -> None:
        self.closed += 1


def request(**changes: Any) -> Request:
    """A request of small shards that keeps all frames of the clips here."""
    values = {
        "size": 64, "frames_per_clip": 16, "clips_per_shard": 2, "least_side_px": 20.0,
        "least_sharpness": 2.0, "rotate": True, "scale": 1.0,
        "drawing": {"thickness_px": 1, "disc_radius_px": 1.5, "antialias": True, "background": 1},
        "tracker": "scripted", "mask": "hull",
    }  # fmt: skip
    return Request(**{**values, **changes})


def talking(person: int, count: int, yaw_deg: float = 0.0) -> list[Shot]:
    """A person who opens the mouth and turns from frame to frame."""
    return [
        (scene(person, i), [posed(person, yaw_deg + 2.0 * i, 0.5 * i / count)])
        for i in range(count)
    ]


def people(frames: tuple[int, ...] = (5, 3, 4, 2)) -> tuple[ScriptedReader, list[Footage]]:
    """Three people, the first of whom has two clips."""
    who = (0, 0, 1, 2)
    names = [f"id{person}-{i}" for i, person in enumerate(who)]
    reader = ScriptedReader(
        {name: talking(p, n) for name, p, n in zip(names, who, frames, strict=True)}
    )
    clips = [
        Footage(name, f"id{p}", Path("/nowhere") / name) for name, p in zip(names, who, strict=True)
    ]
    return reader, clips
