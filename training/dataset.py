"""What training sees of any set of faces, rendered or real: people, their frames, what is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from diffusionact.errors import SettingsError

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Frames:
    """Frames of a data set; None for what it does not know.

    images: uint8 [B,S,S,3] RGB; points: float32 [B,68,3] px, z NaN where unknown; gaze: float32
    [B,2,2] px; labels: uint8 [B,S,S], the renderer's regions; mask: uint8 [B,S,S], 255 on what is
    not background; parameters: float32 [B,P], all that a rendered picture depends on.
    """

    images: U8
    points: F32
    gaze: F32
    labels: U8 | None = None
    mask: U8 | None = None
    parameters: F32 | None = None


class Dataset(Protocol):
    """Frames by person and number. Who trains holds the last people out for evaluation.

    identities: people; size: side of a picture, px.
    count: how many frames each of these people has, one number where all have as many.
    span: (first, count) of the frames that make pairs with this one, itself among them: those of
    one clip, where dress, light and background are the same.
    pictures: the images of the frames alone.
    known: points, gaze and parameters, as in `Frames`, without the images.
    draw: the condition drawings of the frames, uint8 [B,S,S,3] RGB.
    cross: the drawings of the sources' faces with the drivers' pose, expression and gaze, Eq. 8.
    """

    @property
    def identities(self) -> int: ...
    @property
    def size(self) -> int: ...
    def count(self, identity: Ints) -> int | Ints: ...
    def span(self, identity: Ints, frame: Ints) -> tuple[int | Ints, int | Ints]: ...
    def gather(self, identity: Ints, frame: Ints) -> Frames: ...
    def pictures(self, identity: Ints, frame: Ints) -> U8: ...
    def known(self, identity: Ints, frame: Ints) -> tuple[F32, F32, F32 | None]: ...
    def draw(self, identity: Ints, frame: Ints) -> U8: ...
    def cross(self, source: tuple[Ints, Ints], driver: tuple[Ints, Ints]) -> U8: ...


def training_people(dataset: Dataset, held_out: int) -> int:
    """Returns how many people are left to train on, the first of the data set.

    Raises: SettingsError: none is left, or none is held out.
    """
    if not 0 < held_out < dataset.identities:
        raise SettingsError(
            f"held_out = {held_out}, and the data has {dataset.identities} people: wanted at least "
            "one of them for training and one for evaluation"
        )
    return dataset.identities - held_out
