"""What was read off a face."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """One face.

    points: [68,2] px; gaze: [2,2] px, NaN for an eye that cannot be seen; pose: [3] yaw, pitch,
    roll in degrees; expression: [E] coefficients, None where nothing reads them.
    """

    points: FloatArray
    gaze: FloatArray
    pose: FloatArray
    expression: FloatArray | None = None
