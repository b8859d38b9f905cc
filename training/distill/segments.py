"""A student's steps with the teacher's finer ones inside them, in both directions, and the
equations that lead from one end of a step to the other.

Notation: x_t = alpha_t x_0 + sigma_t eps, alpha_t^2 the schedule's alpha_bar, sigma_t^2 the rest;
a student's step goes from t to s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from diffusionact.errors import SettingsError
from diffusionact.schedule import (
    TOTAL_STEPS,
    Prediction,
    add_noise,
    ddim_update,
    eps_from_x0,
    inversion_run,
    render_run,
    timesteps,
    x0_from_prediction,
)
from diffusionact.training.diffusion import TABLE


@dataclass(frozen=True)
class Place:
    """Where each sample of a batch is: the timestep t int64 [B] at which a network is asked, and
    float64 [B,1,1,1] alpha_bar of `level` there, of `level_to` where the teacher's step leads, and
    of `end` where the student's does; `first`, bool [B,1,1,1], where the whole run begins."""

    t: Tensor
    level: Tensor
    level_to: Tensor
    end: Tensor
    first: Tensor


@dataclass(frozen=True)
class Segments:
    """A student's m steps in the order of execution, each as N of the teacher's: t int64 [m,N],
    level and level_to float64 [m,N]. One that has fewer begins with steps that lead nowhere."""

    up: bool  # inversion; otherwise rendering
    t: Tensor
    level: Tensor
    level_to: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """m and N."""
        return self.t.shape[0], self.t.shape[1]

    def at(self, step: Tensor, finer: Tensor | int) -> Place:
        """Returns the places of the teacher's step `finer` in the student's `step`, int64 [B]."""
        step = step.to(self.t.device)

        def column(values: Tensor) -> Tensor:
            return values.view(-1, 1, 1, 1)

        t = self.t[step, finer]
        first = (step == 0) & (t == self.t[0, 0])
        return Place(
            t, column(self.level[step, finer]), column(self.level_to[step, finer]),
            column(self.level_to[step, -1]), column(first),
        )  # fmt: skip

    def to(self, device: torch.device) -> Segments:
        """Returns the tables on a device."""
        return Segments(self.up, self.t.to(device), self.level.to(device), self.level_to.to(device))


def divided(steps: Sequence[int], substeps: int, *, up: bool) -> list[int]:
    """Returns the timesteps of a teacher that takes `substeps` in each of these steps, ascending;
    fewer where there is no room for different ones."""
    beyond = [*steps[1:], TOTAL_STEPS] if up else [0, *steps[:-1]]
    found = {
        round(at)
        for start, end in zip(steps, beyond, strict=True)
        for at in np.linspace(start, end, substeps, endpoint=False)
    }
    return sorted(found)


def segments(steps: Sequence[int], finer: Sequence[int], *, up: bool) -> Segments:
    """Returns the student's steps at timesteps `steps` as those of a teacher at `finer`.

    Raises: SettingsError where the teacher does not call at all of the student's timesteps, or
    begins elsewhere.
    """
    at = timesteps(list(finer))
    run = (inversion_run if up else render_run)("x0", at, TABLE)
    rows = [step.row for step in run.steps]
    begins = [place for place, row in enumerate(rows) if at[row] in steps]
    if len(begins) != len(steps) or begins[0] != 0:
        raise SettingsError(
            f"steps at {list(steps)} are no part of those at {list(finer)}: the finer ones must "
            "call at every one of them, and begin with the same; change one of the two lists"
        )
    parts = [rows[a:b] for a, b in zip(begins, [*begins[1:], len(rows)], strict=True)]
    longest = max(len(part) for part in parts)
    still = [longest - len(part) for part in parts]
    index = np.array([[part[0]] * n + part for part, n in zip(parts, still, strict=True)])
    level, level_to = run.alpha_bar[index], run.alpha_bar_to[index]
    waits = np.arange(longest) < np.array(still)[:, None]
    level_to = np.where(waits, level, level_to)
    tables = (torch.from_numpy(table) for table in (at[index], level, level_to))
    return Segments(up, *tables)


def start_state(picture: Tensor, eps: Tensor, place: Place, *, up: bool) -> Tensor:
    """Returns what a network meets at the place, [B,3,S,S]: the picture under noise, and at the
    first step of a run what the run begins with: the noise alone, or going up the picture alone."""
    x: Tensor = add_noise(picture, eps, place.level)
    return torch.where(place.first, picture if up else eps, x)


@dataclass(frozen=True)
class Denoiser:
    """A U-Net under its code z [B,E], asked for the picture instead of what it predicts."""

    unet: nn.Module
    kind: Prediction
    z: Tensor

    def estimate(self, x: Tensor, place: Place) -> Tensor:
        """Returns the picture [B,3,S,S] that it sees in x at t, not clipped."""
        prediction = self.unet(x, place.t, self.z).to(x.dtype)
        x_0: Tensor = x0_from_prediction(self.kind, x, prediction, place.level)
        return x_0

    @torch.no_grad()
    def move(self, x: Tensor, place: Place, level_to: Tensor) -> Tensor:
        """Returns x moved to the level, as the sampler moves it, without a gradient."""
        return moved(x, self.estimate(x, place).clip(-1.0, 1.0), place.level, level_to)


def moved(x: Tensor, x_0: Tensor, level: Tensor, level_to: Tensor) -> Tensor:
    """Returns x [B,3,S,S] at another noise level, where x_0 is the picture in it.

    Source: DDIM, Eq. 12 with sigma = 0.
    """
    to: Tensor = ddim_update(x_0, eps_from_x0(x, x_0, level), level_to)
    return to


def in_range(x_0: Tensor) -> Tensor:
    """Returns the estimate as the sampler takes it, in [-1,1], with the gradient of one that was
    not clipped: what lies outside is still pulled back, and not beyond what a picture can be."""
    return x_0 + (x_0.clip(-1.0, 1.0) - x_0).detach()


def reach(level: Tensor, level_to: Tensor) -> Tensor:
    """Returns how far a step from t to s moves x for each unit of x_0: alpha_s - alpha_t
    sigma_s / sigma_t, in the shape of the levels; negative towards more noise.

    Source: DDIM, Eq. 12, collected by x_0.
    """
    return level_to.sqrt() - level.sqrt() * ((1 - level_to) / (1 - level)).sqrt()


def one_step_target(x: Tensor, x_s: Tensor, level: Tensor, level_to: Tensor) -> Tensor:
    """Returns the x_0 [B,3,S,S] that a network has to see in x for one step to reach x_s:
    (x_s - sigma_s / sigma_t x) / (alpha_s - sigma_s / sigma_t alpha_t).

    Source: Progressive Distillation (Salimans & Ho), Algorithm 2.
    """
    kept = ((1 - level_to) / (1 - level)).sqrt()
    wide = (x_s.double() - kept * x.double()) / reach(level, level_to)
    return wide.to(x.dtype)
