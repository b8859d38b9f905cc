"""The face a driver makes when doing nothing: what its motion is measured from."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from diffusionact.errors import NoFace
from diffusionact.landmarks import MOUTH_CORNERS, Landmarks
from diffusionact.morphable import angles, rotation
from diffusionact.runtime.headpose import FloatArray, Head, take_apart

# Upper and lower point of each pair, from one corner to the other.
LID_PAIRS = (((37, 41), (38, 40)), ((43, 47), (44, 46)))
LID_CORNERS = ((36, 39), (42, 45))
INNER_LIPS = ((61, 67), (62, 66), (63, 65))

# What counts as much as what, when the calmest frame is looked for.
POSE_UNIT_DEG, MOUTH_UNIT, LID_UNIT, WIDTH_UNIT = 15.0, 0.08, 0.15, 0.1
CALM_SHARE = 0.08  # of a clip's frames, whose median is the neutral face
CALM_LIVE = 0.5  # of those of a second, which are few


def calmest(faces: Iterable[Landmarks | None], mean_face: FloatArray) -> Head:
    """Return the neutral face of a clip: most frontal, mouth closed, eyes open.

    faces: px, None or no face's points where none was seen; mean_face: [68,3], head units.
    Raises: NoFace when there is none at all.
    """
    heads = [take_apart(face, mean_face) for face in faces if face is not None and face.is_face]
    if not heads:
        raise NoFace("no face in any frame of the driver; wanted at least one that is seen well")
    return calmest_of(heads, CALM_SHARE)


def calmest_of(heads: list[Head], share: float) -> Head:
    """Return the median of the calmest of these faces, one at least, of one person."""
    pose = np.array([angles(head.rotation) for head in heads])
    mouth = np.array([lip_gap(head.points) for head in heads])
    lids = np.array([lid_openings(head.points).mean() for head in heads])
    width = np.array([mouth_width(head.points) for head in heads])
    usual = max(float(np.median(lids)), 1e-3)
    cost = (
        (np.abs(pose).sum(axis=1) / POSE_UNIT_DEG) ** 2
        + ((mouth - mouth.min()) / MOUTH_UNIT) ** 2
        + ((lids / usual - 1.0) / LID_UNIT) ** 2
        + ((width / np.median(width) - 1.0) / WIDTH_UNIT) ** 2
    )
    best = np.argsort(cost, kind="stable")[: max(round(share * len(heads)), 1)]
    return middle([heads[i] for i in best])


def middle(heads: list[Head]) -> Head:
    """Return the median of faces of one person, in pose too."""
    turn = np.median([angles(head.rotation) for head in heads], axis=0)
    return Head(
        np.median([head.points for head in heads], axis=0),
        np.median([head.gaze for head in heads], axis=0),
        float(np.median([head.scale for head in heads])),
        np.asarray(rotation(turn)),
        np.median([head.translation for head in heads], axis=0),
    )


def mouth_width(points: FloatArray) -> float:
    """Distance of the mouth's corners in head units."""
    return float(np.linalg.norm(points[MOUTH_CORNERS[1]] - points[MOUTH_CORNERS[0]]))


def lip_gap(points: FloatArray) -> float:
    """Gap of the inner lips over the mouth's width; below 0 where they cross."""
    gap = np.mean([points[low, 1] - points[up, 1] for up, low in INNER_LIPS])
    return float(gap) / max(mouth_width(points), 1e-6)


def lid_openings(points: FloatArray) -> FloatArray:
    """Gap of the lids over the width of the eye, float64 [2]; 0 when shut."""
    gaps = [np.mean([points[low, 1] - points[up, 1] for up, low in eye]) for eye in LID_PAIRS]
    widths = [np.linalg.norm(points[b, :2] - points[a, :2]) for a, b in LID_CORNERS]
    return np.maximum(np.array(gaps) / np.maximum(widths, 1e-6), 0.0)
