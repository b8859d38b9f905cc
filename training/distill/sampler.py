"""Method "sampler": through the short sampler itself.

From the noise that the student's own inversion left of the source, it walks the very steps of the
runtime; each step's estimate of the picture is held against the true one, and the next step starts
from where this one led. No step is ever asked about noise it will not see, and what the first one
gets wrong the later ones learn to mend. The gradient stays within a step: `x_t` enters the next one
as a given.

The last estimate can also be held against the picture that the teacher renders from the same noise,
and be judged by the eight losses of `criteria`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusionact.schedule import ddim_step, render_run, x0_from_prediction
from diffusionact.training.config import Recipe, StageRecipe
from diffusionact.training.criteria import Goal, criteria
from diffusionact.training.criteria import total as weighted_sum
from diffusionact.training.diffusion import TABLE, render
from diffusionact.training.distill.counts import step_count
from diffusionact.training.distill.segments import in_range
from diffusionact.training.losses import texture_distance, weighted_square
from diffusionact.training.stages.sample import Sample
from diffusionact.training.stages.terms import readings
from diffusionact.training.state import State


def moves(stage: StageRecipe) -> list[str]:
    """The networks that move."""
    return ["unet", "reenactment", "heads"]


def loss(
    state: State, sample: Sample, recipe: Recipe, stage: StageRecipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss and its parts: the error of the picture that each step of one short run
    estimates, what else is asked of the last one, and what z fails to tell."""
    assert sample.source is not None and sample.condition is not None
    z = state.live["reenactment"](sample.source, sample.condition).float()
    student = recipe.student
    steps = student.render[step_count(student, state.progress.step)]
    estimates = rollout(state, sample.eps, z, steps)
    errors = [weighted_square(x_0, sample.target, sample.weight).mean() for x_0 in estimates]
    read, parts = readings(state, sample, recipe, z)
    parts = {"denoising": torch.stack(errors).mean(), "last": errors[-1], **parts}
    total = stage.diffusion * parts["denoising"] + read
    asked, more = last_terms(state, sample, recipe, estimates[-1])
    return total + asked, parts | more


def last_terms(
    state: State, sample: Sample, recipe: Recipe, last: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns what is asked of the last estimate [B,3,S,S] beside its error, weighted, and its
    parts: fine detail, the teacher's picture, the eight losses, where their weights are above 0."""
    student, parts = recipe.student, dict[str, Tensor]()
    total = last.new_zeros(())
    if recipe.loss.texture:
        parts["texture"] = texture_distance(last, sample.target, sample.weight).mean()
        total = total + recipe.loss.texture * parts["texture"]
    if student.teacher:
        taught = teacher_picture(state, sample, student.teacher_steps)
        parts["teacher"] = weighted_square(last, taught, sample.weight).mean()
        total = total + student.teacher * parts["teacher"]
    if student.criteria:
        assert state.critics is not None and sample.source is not None
        goal = Goal(
            sample.target, sample.source,
            labels=None if recipe.critics.bisenet else sample.labels,
            points=sample.keypoints[:, :68], source_points=sample.source_points,
        )  # fmt: skip
        judged = criteria(in_range(last), goal, state.critics, recipe.criteria)
        total = total + student.criteria * weighted_sum(judged, recipe.criteria)
        parts |= judged
    return total, parts


@torch.no_grad()
def teacher_picture(state: State, sample: Sample, steps: int) -> Tensor:
    """Returns the picture [B,3,S,S] that the teacher renders from the same noise in these steps."""
    assert state.teacher is not None
    teacher = state.teacher
    z = teacher.code(sample.source, sample.condition)
    return render(teacher.unet, teacher.prediction, sample.eps, z, steps)


def rollout(state: State, x_T: Tensor, z: Tensor, steps: list[int]) -> list[Tensor]:
    """Returns the picture [B,3,S,S] as each of the timesteps `steps` estimates it, in the order of
    rendering; not clipped, so that a value out of range is still pulled back.

    x_T: float32 [B,3,S,S], where the walk begins; z: float32 [B,E].

    Source: DiffusionAct, Eq. 1-3, without a gradient from one step into the one before.
    """
    kind, x, estimates = state.config.prediction, x_T, list[Tensor]()
    unet = state.live["unet"].eval()  # the student as it will render: without dropout
    run = render_run(kind, steps, TABLE)
    for step in run.steps:
        t = torch.full((len(x),), int(run.timesteps[step.row]), device=x.device)
        prediction = unet(x, t, z).float()
        level, level_to = float(run.alpha_bar[step.row]), float(run.alpha_bar_to[step.row])
        estimates.append(x0_from_prediction(kind, x, prediction, level))
        x = ddim_step(kind, x, prediction.detach(), level, level_to)
    return estimates
