"""Method "consistency": every point of the teacher's path learns to leap to the end of its segment,
down to the picture and up to the noise, and the leaps down and up undo each other.

The student's timesteps cut the path from noise to picture into segments. f(x_t, t, s) is one step
of the sampler from t to the end s of t's segment. With theta the student, theta~ its average, and
x_t' where one of the teacher's steps leads from x_t:

    consistency     d( f_theta(x_t, t, s),  f_theta~(x_t', t', s) ),     x_t' itself where t' = s
    preservation    d( g_theta(f_theta~(x_t, t, s), s, t),  x_t )

where g leads the other way; both are asked of rendering and of inversion. d is the squared error,
in units of the picture that the step from the segment's beginning would have to see otherwise.

A segment that rendering and inversion have in common can be preserved. At the ends they have none:
inversion takes the clean picture for its first timestep, rendering the pure noise for its last.

Source: Invertible Consistency Distillation (Starodubcev et al.), Eq. 2-5; Consistency Models (Song
et al.), Algorithm 2. Inversion is their forward, rendering their reverse process.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from diffusionact.schedule import TOTAL_STEPS, add_noise
from diffusionact.training.config import Recipe, StageRecipe
from diffusionact.training.diffusion import TABLE, invert
from diffusionact.training.distill.counts import inversion_steps, step_count
from diffusionact.training.distill.segments import (
    Denoiser,
    Place,
    Segments,
    divided,
    in_range,
    moved,
    reach,
    segments,
    start_state,
)
from diffusionact.training.distill.sides import Side, inverter, moves, side, student_code
from diffusionact.training.losses import weighted_square
from diffusionact.training.stages.sample import Sample
from diffusionact.training.state import State

__all__ = ["leap_error", "loss", "moves", "preservation", "shared"]


def loss(
    state: State, sample: Sample, recipe: Recipe, stage: StageRecipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss and its parts: consistency of rendering and of inversion, and how well each
    is undone by the other. Source: Invertible Consistency Distillation, Eq. 5."""
    assert state.teacher is not None
    student, kind, teacher = recipe.student, state.config.prediction, state.teacher
    z, z_teacher = student_code(state, sample), teacher.code(sample.source, sample.condition)
    steps = student.render[step_count(student, state.progress.step)]
    back = inversion_steps(recipe, kind)
    taught = [Denoiser(unet, teacher.prediction, z_teacher)
              for unet in (teacher.unet, teacher.inverter)]  # fmt: skip
    down = side(state, "unet", z, taught[0], tables(tuple(steps), student.substeps, up=False))
    up = side(state, inverter(stage), z, taught[1], tables(tuple(back), student.substeps, up=True))
    with torch.no_grad():
        own = invert(up.average.unet, kind, sample.target, z, back)
    spread = (sample.t.double() + 0.5) / TOTAL_STEPS
    parts = {
        "render": leap_error(down, sample.target, sample.eps, 1 - spread, sample.weight),
        "invert": leap_error(up, sample.target, own, spread, sample.weight),
    }
    total = parts["render"] + student.inversion * parts["invert"]
    pairs = shared(steps, back) if student.preserve else []
    if pairs:
        low, high = ends(pairs, spread)
        kept = preservation(up, down, sample.target, own, (low, high), sample.weight)
        total = total + student.preserve * (kept[0] + student.inversion * kept[1])
        parts |= {"render preserves": kept[0], "invert preserves": kept[1]}
    return stage.diffusion * total, parts


@lru_cache(maxsize=32)
def tables(steps: tuple[int, ...], substeps: int, *, up: bool) -> Segments:
    """Returns the segments of the student's timesteps, each as so many of the teacher's steps."""
    return segments(steps, divided(steps, substeps, up=up), up=up)


def leap_error(side: Side, picture: Tensor, eps: Tensor, spread: Tensor, weight: Tensor) -> Tensor:
    """Returns d(f_theta(x_t, t, s), f_theta~(x_t', t', s)), the mean over the batch.

    spread: [B] in 0..1, which of all the teacher's steps each sample takes, first to last.
    Source: Consistency Models, Algorithm 2, with the boundaries of Invertible Consistency
    Distillation, Eq. 3.
    """
    count, length = side.segments.shape
    index = (spread * (count * length)).long().clamp(0, count * length - 1)
    step, finer = index // length, index % length
    here = side.segments.at(step, finer)
    after = side.segments.at(step, (finer + 1).clamp(max=length - 1))
    x = start_state(picture, eps, here, up=side.segments.up)
    x_s = moved(x, in_range(side.live.estimate(x, here)), here.level, here.end)
    with torch.no_grad():
        nearer = side.teacher.move(x, here, here.level_to)
        leapt = side.average.move(nearer, after, after.end)
        arrived = (finer == length - 1).view(-1, 1, 1, 1)
        wanted = torch.where(arrived, nearer, leapt)
    begin = side.segments.at(step, 0)
    return distance(x_s, wanted, reach(begin.level, begin.end), weight)


def distance(x: Tensor, wanted: Tensor, unit: Tensor, weight: Tensor) -> Tensor:
    """Returns the weighted squared error of x [B,3,S,S] in units [B,1,1,1] of x_0."""
    unit = unit.to(x.dtype)
    return weighted_square(x / unit, wanted / unit, weight).mean()


def shared(steps: list[int], back: list[int]) -> list[tuple[int, int]]:
    """Returns the segments (lower, upper timestep) that rendering and inversion have in common."""
    return [pair for pair in zip(steps[:-1], steps[1:], strict=True)
            if pair in zip(back[:-1], back[1:], strict=True)]  # fmt: skip


def ends(pairs: list[tuple[int, int]], spread: Tensor) -> tuple[Place, Place]:
    """Returns the lower and the upper end of the common segment that each sample is to keep; each
    leads to the other."""
    device = spread.device
    table = torch.tensor(pairs, device=device)
    chosen = table[(spread * len(pairs)).long().clamp(0, len(pairs) - 1)]
    levels = torch.from_numpy(TABLE).to(device)[chosen][..., None, None, None]
    never = torch.zeros_like(levels[:, 0], dtype=torch.bool)

    def place(here: int) -> Place:
        level, other = levels[:, here], levels[:, 1 - here]
        return Place(chosen[:, here], level, other, other, never)

    return place(0), place(1)


def preservation(
    up: Side, down: Side, picture: Tensor, eps: Tensor, segment: tuple[Place, Place], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns how far rendering is from undoing a step of inversion, and inversion from undoing a
    step of rendering; the step that is to be undone is the average's, and takes no gradient.

    Source: Invertible Consistency Distillation, Eq. 4: the second is its forward, the first its
    reverse preservation loss.
    """
    low, high = segment

    def undone(first: Denoiser, second: Denoiser, begin: Place, end: Place) -> Tensor:
        x: Tensor = add_noise(picture, eps, begin.level)
        there = first.move(x, begin, end.level)
        again = moved(there, in_range(second.estimate(there, end)), end.level, begin.level)
        return distance(again, x, reach(end.level, begin.level), weight)

    return undone(up.average, down.live, low, high), undone(down.average, up.live, high, low)
