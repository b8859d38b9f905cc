"""How far a stage is, and what that makes of the learning rate."""

from __future__ import annotations

import math
import time

from diffusionact.training.config import StageRecipe
from diffusionact.training.state import State


class Clock:
    """Seconds of training, those of earlier calls included."""

    def __init__(self, before: float) -> None:
        self._start = time.monotonic() - before

    def seconds(self) -> float:
        return time.monotonic() - self._start


def fraction(stage: StageRecipe, state: State) -> float:
    """Returns how much of the stage is over: 0..1 by images or by time, whichever is more."""
    by_images = state.progress.images / stage.images
    by_time = state.progress.seconds / (60 * stage.minutes) if stage.minutes else 0.0
    return min(1.0, max(by_images, by_time))


def rate(stage: StageRecipe, state: State) -> float:
    """Returns the factor on the learning rate: a linear warm-up, then half a cosine down to 0, or
    1 to the end."""
    warm = min(1.0, (state.progress.step + 1) / max(stage.warmup_steps, 1))
    if stage.constant_lr:
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * fraction(stage, state)))
