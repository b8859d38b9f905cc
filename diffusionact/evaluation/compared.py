"""What is compared: clips of frames, each with what it should be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.evaluation.reading import Reading

Image: TypeAlias = npt.NDArray[np.uint8]
Load: TypeAlias = Callable[[], Image]  # raises MediaError when the picture cannot be decoded


@dataclass(frozen=True)
class Frame:
    """One frame to compare; nothing is decoded or rendered before it is asked for.

    key: its name in the clip. result, reference: uint8 [H,W,3] BGR, None where there is none.
    truth: what the reference shows, where it is known and not to be read off; face: bool [H,W]
    of the reference, where the face is. found: what the result shows, of an answer that is no
    picture only. unpaired: "missing" or "extra", of a frame that one side lacks.
    """

    key: str
    result: Load | None
    reference: Load | None = None
    truth: Reading | None = None
    face: npt.NDArray[np.bool_] | None = None
    found: Reading | None = None
    unpaired: str | None = None


@dataclass(frozen=True)
class Clip:
    """Frames of one person in their order.

    name: one of its own in a run; identity: of the person, over which is resampled; source: the
    picture that was brought to move, None where it is not known; follows: whether neighbouring
    frames are neighbours in time; unusable: why there is nothing to compare, of a clip that cannot
    be read or shows no face at all: it is counted.
    """

    name: str
    identity: str
    frames: Iterable[Frame]
    source: Load | None = None
    follows: bool = True
    unusable: str | None = None
