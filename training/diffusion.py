"""The diffusion process on torch tensors: noising, and both directions of the sampler.

The equations themselves live in `diffusionact.schedule`; here they meet a network and a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusionact.schedule import (
    TOTAL_STEPS,
    Prediction,
    Run,
    Step,
    add_noise,
    alpha_bars,
    ddim_step,
    inversion_run,
    inversion_timesteps,
    prediction_target,
    render_run,
    timesteps,
    x0_from_prediction,
)

TABLE = alpha_bars()


def to_batch(images: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    """Returns float32 [B,3,S,S] in [-1,1], channels last in memory, of uint8 [B,S,S,3] RGB."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device, non_blocking=True)
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_pixels(batch: Tensor) -> npt.NDArray[np.uint8]:
    """Returns uint8 [B,S,S,3] RGB of a batch [B,3,S,S] in [-1,1]."""
    pixels = batch.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).cpu().numpy())


def draw_timesteps(count: int, power: float, generator: torch.Generator) -> Tensor:
    """Returns int64 [count] in 0..999, t = floor(1000 u^power): denser at high noise for
    power < 1, where z has to carry the picture."""
    u = torch.rand(count, generator=generator, device=generator.device)
    return (TOTAL_STEPS * u**power).long().clamp(max=TOTAL_STEPS - 1)


def noised(kind: Prediction, x_0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (x_t, what the network should predict), each [B,3,S,S], at timesteps t [B].

    Source: DDPM, Eq. 4.
    """
    table = torch.from_numpy(TABLE).to(x_0.device, torch.float32)
    level = table[t].view(-1, 1, 1, 1)
    return add_noise(x_0, eps, level), prediction_target(kind, x_0, eps, level)


def invert(
    unet: nn.Module, kind: Prediction, x_0: Tensor, z: Tensor, steps: int | Sequence[int]
) -> Tensor:
    """Returns x_T [B,3,S,S], the noise that leads to x_0 under z, in so many steps or at these
    timesteps. Source: DiffusionAct, Eq. 2."""
    at = inversion_timesteps(kind, steps) if isinstance(steps, int) else timesteps(steps)
    return _walk(unet, inversion_run(kind, at, TABLE), x_0, z)


def render(
    unet: nn.Module,
    kind: Prediction,
    x_T: Tensor,
    z: Tensor,
    steps: int | Sequence[int],
    *,
    recompute: bool = False,
) -> Tensor:
    """Returns the pictures [B,3,S,S] in [-1,1] that noise x_T becomes under z, in so many steps
    or at these timesteps; differentiable towards z, x_T and the weights. With `recompute`, the
    backward pass runs each step again and holds the activations of one step instead of all.

    Source: DiffusionAct, Eq. 3.
    """
    run = render_run(kind, timesteps(steps), TABLE)
    return _walk(unet, run, x_T, z, recompute=recompute)


def _walk(unet: nn.Module, run: Run, x: Tensor, z: Tensor, *, recompute: bool = False) -> Tensor:
    def move(x: Tensor, z: Tensor, step: Step) -> Tensor:
        t = torch.full((len(x),), int(run.timesteps[step.row]), device=x.device)
        prediction = unet(x, t, z).to(x.dtype)
        level, level_to = float(run.alpha_bar[step.row]), float(run.alpha_bar_to[step.row])
        moved: Tensor = ddim_step(run.prediction, x, prediction, level, level_to)
        return moved

    for step in run.steps:
        x = checkpoint(move, x, z, step, use_reentrant=False) if recompute else move(x, z, step)
    return x


def from_z_alone(unet: nn.Module, kind: Prediction, noise: Tensor, z: Tensor) -> Tensor:
    """Returns the estimate of the picture [B,3,S,S] from pure noise at the last timestep, where
    nothing but z can tell what it shows."""
    last = TOTAL_STEPS - 1
    t = torch.full((len(noise),), last, device=noise.device)
    prediction = unet(noise, t, z).float()
    estimate: Tensor = x0_from_prediction(kind, noise, prediction, float(TABLE[last]))
    return estimate.clamp(-1, 1)
