"""Method "progressive": N of the teacher's steps become one of the student's, which is the teacher
of the next round.

A stage of this method is a round. It teaches the student to render at the timesteps `render` and
to invert at `invert` (none: the student's own), which must be among those of the round before; the
first round's teacher takes `substeps` within each of its steps. The teacher is what the networks
were when the round began. Of the student's step counts, those of earlier rounds are practised on
in their shares, so that one network knows them all: their target is what the teacher says itself.

Source: Progressive Distillation (Salimans & Ho), Algorithm 2, for DDIM in both directions. The
error of the picture counts alike at all noise levels, as it does in method "sampler".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from diffusionact.schedule import TOTAL_STEPS, Prediction
from diffusionact.training.config import Recipe, StageRecipe
from diffusionact.training.diffusion import invert
from diffusionact.training.distill.counts import inversion_steps, turn
from diffusionact.training.distill.segments import (
    Denoiser,
    Segments,
    divided,
    in_range,
    one_step_target,
    segments,
    start_state,
)
from diffusionact.training.distill.sides import Side, inverter, moves, side, student_code
from diffusionact.training.losses import weighted_square
from diffusionact.training.stages.sample import Sample
from diffusionact.training.state import State

__all__ = ["Round", "loss", "moves", "round_of", "step_error"]

Steps = tuple[int, ...]


@dataclass(frozen=True)
class Round:
    """What a round teaches: lists of timesteps, the student's and with them the teacher's.

    render: the new list first, then those it must not forget; shares: of the training steps.
    """

    render: tuple[tuple[Steps, Steps], ...]
    shares: tuple[float, ...]
    invert: tuple[Steps, Steps]


def round_of(recipe: Recipe, index: int, kind: Prediction) -> Round:
    """Returns the round that stage `index` of the recipe is.

    Raises: SettingsError if its timesteps are no part of the round before.
    """
    student = recipe.student
    rounds = [
        (tuple(stage.render or student.render[str(student.steps)]),
         tuple(stage.invert or inversion_steps(recipe, kind)))
        for stage in recipe.stages[: index + 1]
        if (stage.kind, stage.method) == ("student", "progressive")
    ]  # fmt: skip
    (down, up), earlier = rounds[-1], rounds[:-1]
    if earlier:
        render, back = (down, earlier[-1][0]), (up, earlier[-1][1])
    else:
        render = (down, tuple(divided(down, student.substeps, up=False)))
        back = (up, tuple(divided(up, student.substeps, up=True)))
    known = [steps for steps, _ in earlier if steps != down]
    weights = {tuple(steps): share for steps, share in
               zip(student.render.values(), student.shares, strict=True)}  # fmt: skip
    kept = [steps for steps in dict.fromkeys(known) if steps in weights]
    shares = (weights.get(down, max(student.shares)), *(weights[steps] for steps in kept))
    found = Round((render, *((steps, steps) for steps in kept)), shares, back)
    for lists in found.render:
        tables(*lists, up=False)
    tables(*found.invert, up=True)
    return found


@lru_cache(maxsize=32)
def tables(steps: Steps, finer: Steps, *, up: bool) -> Segments:
    """Returns the student's steps as the teacher's finer ones."""
    return segments(steps, finer, up=up)


def loss(
    state: State, sample: Sample, recipe: Recipe, stage: StageRecipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss and its parts: how far a step of the student's leads from where the
    teacher's lead, in rendering and in inversion."""
    assert state.before is not None
    student, kind, before = recipe.student, state.config.prediction, state.before
    now = round_of(recipe, state.progress.stage, kind)
    z = student_code(state, sample)
    lists = now.render[turn([*now.shares], state.progress.step)]
    down = side(state, "unet", z, Denoiser(before["unet"], kind, z), tables(*lists, up=False))
    name = inverter(stage)
    up = side(state, name, z, Denoiser(before[name], kind, z), tables(*now.invert, up=True))
    with torch.no_grad():
        own = invert(up.average.unet, kind, sample.target, z, [*now.invert[0]])
    spread = (sample.t.double() + 0.5) / TOTAL_STEPS
    parts = {
        "render": step_error(down, sample.target, sample.eps, 1 - spread, sample.weight),
        "invert": step_error(up, sample.target, own, spread, sample.weight),
    }
    total = parts["render"] + student.inversion * parts["invert"]
    return stage.diffusion * total, parts


def step_error(side: Side, picture: Tensor, eps: Tensor, spread: Tensor, weight: Tensor) -> Tensor:
    """Returns the error of the picture that the student sees against the one it has to see for one
    step of it to reach where the teacher's steps lead; the mean over the batch.

    spread: [B] in 0..1, which of its steps each sample takes, first to last.
    Source: Progressive Distillation, Algorithm 2.
    """
    count, length = side.segments.shape
    step = (spread * count).long().clamp(0, count - 1)
    here = side.segments.at(step, 0)
    x = start_state(picture, eps, here, up=side.segments.up)
    with torch.no_grad():
        reached = x
        for finer in range(length):
            place = side.segments.at(step, finer)
            reached = side.teacher.move(reached, place, place.level_to)
        wanted = one_step_target(x, reached, here.level, here.end).clip(-1.0, 1.0)
    return weighted_square(in_range(side.live.estimate(x, here)), wanted, weight).mean()
