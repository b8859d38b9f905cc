"""The two objectives: the autoencoder from scratch, then the reenactment encoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusionact.training.config import Recipe, StageRecipe
from diffusionact.training.data import Batch
from diffusionact.training.diffusion import draw_timesteps, noised, to_batch
from diffusionact.training.losses import (
    code_distance,
    head_targets,
    pixel_weights,
    weighted_square,
)
from diffusionact.training.state import State


def trained(stage: StageRecipe) -> list[str]:
    """The networks that a stage moves."""
    if stage.kind == "autoencoder":
        return ["unet", "encoder", "heads"]
    return ["unet", "reenactment", "heads", *(["encoder"] if stage.encoder_lr > 0 else [])]


@dataclass(frozen=True)
class Sample:
    """A batch as tensors on the device: pictures float32 [B,3,S,S] in [-1,1], weight [B,1,S,S],
    values float32 [B,K] for the heads, noise eps [B,3,S,S], timesteps t int64 [B]."""

    target: Tensor
    source: Tensor | None
    condition: Tensor | None
    weight: Tensor
    values: Tensor
    eps: Tensor
    t: Tensor


def to_sample(
    batch: Batch, recipe: Recipe, stage: StageRecipe, generator: torch.Generator
) -> Sample:
    """Returns the batch on the generator's device, with noise and timesteps drawn."""
    device = generator.device
    target = to_batch(batch.target, device)
    eps = torch.randn(target.shape, generator=generator, device=device)
    eps = eps.contiguous(memory_format=torch.channels_last)
    eps[: len(batch.noise)] = torch.from_numpy(batch.noise).to(device, torch.float32)
    values = head_targets(batch.points, batch.gaze, batch.parameters).values
    gaze = torch.from_numpy(np.ascontiguousarray(batch.gaze)).to(device)
    return Sample(
        target=target,
        source=None if batch.source is None else to_batch(batch.source, device),
        condition=None if batch.condition is None else to_batch(batch.condition, device),
        weight=pixel_weights(torch.from_numpy(batch.labels).to(device), gaze, recipe.loss),
        values=torch.from_numpy(values).to(device),
        eps=eps,
        t=draw_timesteps(len(target), stage.timestep_power, generator),
    )


def autoencoder_loss(
    state: State, sample: Sample, recipe: Recipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss and its parts: the denoising error under z of the picture itself, and the
    heads' error. Source: DiffAE, Eq. 6."""
    z = state.live["encoder"](sample.target).float()
    denoising = _denoising(state, sample, z)
    heads = state.heads.loss(z, sample.values).mean()
    loss = denoising + recipe.loss.heads * heads
    return loss, {"denoising": denoising, "heads": heads}


def reenact_loss(
    state: State, sample: Sample, recipe: Recipe, stage: StageRecipe, deviation: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss and its parts: z_r against the target's z_t, the heads' error, and the
    denoising error, half of the batch under z_r and half under z_t, so that the decoder learns
    z_r without forgetting z_t. Source: DiffusionAct, the reenactment encoder's pre-training."""
    if stage.encoder_lr > 0:
        z_t = state.live["encoder"](sample.target).float()
    else:
        with torch.no_grad():
            z_t = state.ema["encoder"](sample.target).float()
    z_r = state.live["reenactment"](sample.source, sample.condition).float()
    code = code_distance(z_r, z_t.detach(), deviation).mean()
    heads = state.heads.loss(z_r, sample.values).mean()
    if stage.encoder_lr > 0:
        heads = heads + state.heads.loss(z_t, sample.values).mean()
    even = (torch.arange(len(z_t), device=z_t.device) % 2 == 0)[:, None]
    denoising = _denoising(state, sample, torch.where(even, z_r, z_t))
    loss = stage.code * code + recipe.loss.heads * heads + stage.diffusion * denoising
    return loss, {"denoising": denoising, "heads": heads, "code": code}


def _denoising(state: State, sample: Sample, z: Tensor) -> Tensor:
    x_t, wanted = noised(state.config.prediction, sample.target, sample.eps, sample.t)
    prediction = state.live["unet"](x_t, sample.t, z)
    return weighted_square(prediction, wanted, sample.weight).mean()
