"""Few-step students: a teacher's networks taught to render, and to invert, in 4, 2 or 1 steps.

A method is a module with `moves`, the networks that move, and `loss`, as of any stage.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusionact.errors import SettingsError
from diffusionact.manifest import Sampling
from diffusionact.schedule import Prediction
from diffusionact.training.config import Recipe, StageRecipe
from diffusionact.training.critics import open_critics
from diffusionact.training.distill import consistency, progressive, sampler
from diffusionact.training.distill.counts import inversion_steps
from diffusionact.training.distill.progressive import round_of
from diffusionact.training.distill.sides import moves
from diffusionact.training.sheets import Pairs, runtime_pictures
from diffusionact.training.stages.sample import Sample
from diffusionact.training.state import State
from diffusionact.training.teacher import open_teacher, teacher_sha256
from diffusionact.training.weights import Student

PAIRS = True
NOISE = "ring"
CRITICS = False


class Method(Protocol):
    """What a method's module offers."""

    def moves(self, stage: StageRecipe) -> list[str]:
        """The networks that move; the semantic encoder stays the teacher's."""
        ...

    def loss(
        self, state: State, sample: Sample, recipe: Recipe, stage: StageRecipe
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a batch and its parts."""
        ...


METHODS: dict[str, Method] = {
    "sampler": sampler,
    "consistency": consistency,
    "progressive": progressive,
}


def trained(stage: StageRecipe) -> list[str]:
    """The networks that the stage's method moves."""
    return METHODS[stage.method].moves(stage)


def check_students(recipe: Recipe, kind: Prediction) -> None:
    """Finds out before a run what would end it late.

    Raises: SettingsError if the teacher's file, which the student's weights will name, is not
    there, if the student would begin from random weights, or if the timesteps of a progressive
    round are no part of those of the round before.
    """
    if recipe.stages[0].kind == "student" and not recipe.start:
        raise SettingsError(
            "no start, and the first stage makes a student: it would begin from random weights; "
            f"name its teacher's: start = {recipe.student.of!r}"
        )
    for index, stage in enumerate(recipe.stages):
        if stage.kind == "student":
            teacher_sha256(recipe.student.of)
            if stage.method == "progressive":
                round_of(recipe, index, kind)


def begin(state: State, recipe: Recipe, stage: StageRecipe) -> None:
    """Makes the frozen networks ready that the stage learns from; at a resumption, too.

    Raises: SettingsError if the teacher's file is not there or does not fit.
    """
    student, device = recipe.student, next(state.live.parameters()).device
    state.invert = None  # a student inverts by itself
    if stage.method == "progressive" and state.progress.step == 0:
        state.keep_before(moves(stage))
    if stage.method == "consistency" or (stage.method == "sampler" and student.teacher > 0):
        state.teacher = open_teacher(student.of, state.config.image_size, device)
    if stage.method == "sampler" and student.criteria > 0 and state.critics is None:
        state.critics = open_critics(recipe.critics, recipe.criteria, device, masks=True)


def loss(
    state: State, sample: Sample, recipe: Recipe, stage: StageRecipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of the stage's method and its parts."""
    return METHODS[stage.method].loss(state, sample, recipe, stage)


def described(recipe: Recipe, kind: Prediction) -> Student | None:
    """Returns what the weights of a run say of its student; None where the last stage makes none.

    Raises: SettingsError if the teacher's file is gone.
    """
    if recipe.stages[-1].kind != "student":
        return None
    student, back = recipe.student, tuple(inversion_steps(recipe, kind))
    lists = {count: tuple(steps) for count, steps in student.render.items()}
    counts = tuple(sorted(int(count) for count in lists))
    return Student(
        teacher_sha256(student.of),
        render=Sampling(student.steps, counts, lists),
        invert=Sampling(len(back), (len(back),), {str(len(back)): back}),
    )


def pictures(
    state: State, pairs: Pairs, device: torch.device, recipe: Recipe
) -> dict[str, NDArray[np.uint8]]:
    """The rows of its sample sheet, each uint8 [N,S,S,3] RGB."""
    return runtime_pictures(state, pairs, device, recipe, recipe.student.render)
