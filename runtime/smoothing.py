"""The One-Euro filter on a vector: still when the face is still, quick when it moves."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]

SPEED_CUTOFF_HZ = 1.0


class OneEuro:
    """A low-pass whose cut-off grows with the speed of each component.

    cutoff_hz: float64 [D], at rest; beta: float64 [D], Hz per unit and second; quiet: float64
    [D], units a second that noise alone feigns, which open nothing.
    Source: Casiez, Roussel and Vogel 2012; `quiet` is ours.
    """

    def __init__(
        self, cutoff_hz: FloatArray, beta: FloatArray, quiet: FloatArray | float = 0.0
    ) -> None:
        self._cutoff_hz, self._beta, self._quiet = cutoff_hz, beta, quiet
        self.reset()

    def reset(self) -> None:
        """Forget the past: the next value passes as it is."""
        self._value: FloatArray | None = None
        self._speed = np.zeros_like(self._cutoff_hz)

    def __call__(self, value: FloatArray, step_s: float) -> FloatArray:
        """Return the filtered value; step_s: time since the last one, > 0."""
        if self._value is None:
            self._value = value
            return value
        speed = (value - self._value) / step_s
        self._speed = self._speed + _gain(SPEED_CUTOFF_HZ, step_s) * (speed - self._speed)
        moving = np.maximum(np.abs(self._speed) - self._quiet, 0.0)
        cutoff_hz = self._cutoff_hz + self._beta * moving
        self._value = self._value + _gain(cutoff_hz, step_s) * (value - self._value)
        return self._value


def _gain(cutoff_hz: FloatArray | float, step_s: float) -> FloatArray:
    turn = 2.0 * np.pi * step_s * np.asarray(cutoff_hz)
    return np.asarray(turn / (turn + 1.0))
