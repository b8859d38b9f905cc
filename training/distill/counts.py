"""Which step counts a student practises, and when."""

from __future__ import annotations

from diffusionact.schedule import Prediction, inversion_timesteps
from diffusionact.training.config import Recipe, StudentRecipe

GOLDEN_RATIO = 0.6180339887498949


def step_count(student: StudentRecipe, step: int) -> str:
    """Returns which of the student's step counts training step `step` practises: each in its share
    of all steps, evenly spread, and the same in every process, because they wait for each other."""
    return list(student.render)[turn(student.shares, step)]


def turn(shares: list[float], step: int) -> int:
    """Returns whose turn step `step` is, if each has its share of all steps, evenly spread."""
    place = step * GOLDEN_RATIO % 1.0 * sum(shares)
    for index, share in enumerate(shares):
        place -= share
        if place < 0:
            return index
    return len(shares) - 1


def inversion_steps(recipe: Recipe, kind: Prediction) -> list[int]:
    """Returns the timesteps at which the student inverts, ascending."""
    steps = recipe.inversions.steps
    return inversion_timesteps(kind, steps).tolist() if isinstance(steps, int) else list(steps)
