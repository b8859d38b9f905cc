"""Few-step students: a teacher's networks taught to render, and to invert, in 4, 2 or 1 steps.

A method is a module with `MOVES`, the networks that move, and `loss`, as of any stage.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusionact.training.config import Recipe, StageRecipe
from diffusionact.training.distill import sampler
from diffusionact.training.sheets import Pairs, student_pictures
from diffusionact.training.stages.sample import Sample
from diffusionact.training.state import State

PAIRS = True
NOISE = "ring"
CRITICS = False


class Method(Protocol):
    """What a method's module offers."""

    MOVES: tuple[str, ...]

    def loss(
        self, state: State, sample: Sample, recipe: Recipe, stage: StageRecipe
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a batch and its parts."""
        ...


METHODS: dict[str, Method] = {"sampler": sampler}


def trained(stage: StageRecipe) -> list[str]:
    """The networks that move; the semantic encoder stays the teacher's."""
    return [*METHODS[stage.method].MOVES]


def loss(
    state: State, sample: Sample, recipe: Recipe, stage: StageRecipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of the stage's method and its parts."""
    return METHODS[stage.method].loss(state, sample, recipe, stage)


def pictures(
    state: State, pairs: Pairs, device: torch.device, recipe: Recipe
) -> dict[str, NDArray[np.uint8]]:
    """The rows of its sample sheet, each uint8 [N,S,S,3] RGB."""
    return student_pictures(state, pairs, device, recipe)
