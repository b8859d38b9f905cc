"""The objectives: what the scene looks like as a code, the autoencoder, the reenactment encoder."""

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
    keypoint_distance,
    keypoint_targets,
    pixel_weights,
    weighted_square,
)
from diffusionact.training.state import State


def trained(stage: StageRecipe) -> list[str]:
    """The networks that a stage moves; of the U-Net, stage scene moves its keypoints only."""
    if stage.kind == "autoencoder":
        return ["unet", "encoder", "heads"]
    follows = stage.kind == "reenact" and stage.encoder_lr == 0
    return ["unet", "reenactment", "heads", *([] if follows else ["encoder"])]


@dataclass(frozen=True)
class Sample:
    """A batch as tensors on the device: pictures float32 [B,3,S,S] in [-1,1], weight [B,1,S,S],
    values float32 [B,K] for the heads, keypoints float32 [B,70,2] px, true_keypoints bool [B] where
    the U-Net sees those instead of what z places, noise eps [B,3,S,S], timesteps t int64 [B]."""

    target: Tensor
    source: Tensor | None
    condition: Tensor | None
    weight: Tensor
    values: Tensor
    keypoints: Tensor
    true_keypoints: Tensor
    eps: Tensor
    t: Tensor


def to_sample(
    batch: Batch, recipe: Recipe, stage: StageRecipe, generator: torch.Generator, fraction: float
) -> Sample:
    """Returns the batch on the generator's device, with noise and timesteps drawn; `fraction` of
    the stage is over."""
    device = generator.device
    target = to_batch(batch.target, device)
    eps = torch.randn(target.shape, generator=generator, device=device)
    eps = eps.contiguous(memory_format=torch.channels_last)
    eps[: len(batch.noise)] = torch.from_numpy(batch.noise).to(device, torch.float32)
    values = head_targets(batch.points, batch.gaze, batch.parameters).values
    gaze = torch.from_numpy(np.ascontiguousarray(batch.gaze)).to(device)
    count = len(target)
    until = stage.true_keypoints_until
    true_share = 1 - fraction / until if until else 0.0
    return Sample(
        target=target,
        source=None if batch.source is None else to_batch(batch.source, device),
        condition=None if batch.condition is None else to_batch(batch.condition, device),
        weight=pixel_weights(torch.from_numpy(batch.labels).to(device), gaze, recipe.loss),
        values=torch.from_numpy(values).to(device),
        keypoints=torch.from_numpy(keypoint_targets(batch.points, batch.gaze)).to(device),
        true_keypoints=torch.rand(count, generator=generator, device=device) < true_share,
        eps=eps,
        t=draw_timesteps(count, stage.timestep_power, generator),
    )


def stage_loss(
    state: State, sample: Sample, recipe: Recipe, stage: StageRecipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of the stage and its parts."""
    if stage.kind == "scene":
        return scene_loss(state, sample, recipe, stage)
    if stage.kind == "autoencoder":
        return autoencoder_loss(state, sample, recipe)
    return reenact_loss(state, sample, recipe, stage)


def scene_loss(
    state: State, sample: Sample, recipe: Recipe, stage: StageRecipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss and its parts: both encoders learn to read the rendered scene, without a
    decoder, which takes three times as long; z_r stays by z_t."""
    z_t = state.live["encoder"](sample.target).float()
    z_r = state.live["reenactment"](sample.source, sample.condition).float()
    parts = {"code": code_distance(z_r, z_t.detach()).mean()}
    read, parts_read = _readings(state, sample, recipe, z_t)
    again, parts_again = _readings(state, sample, recipe, z_r)
    for name in parts_read:
        parts[f"{name} of z_t"], parts[f"{name} of z_r"] = parts_read[name], parts_again[name]
    return stage.code * parts["code"] + read + again, parts


def autoencoder_loss(
    state: State, sample: Sample, recipe: Recipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss and its parts: the denoising error under z of the picture itself, and what
    z fails to tell of the scene. Source: DiffAE, Eq. 6."""
    z = state.live["encoder"](sample.target).float()
    denoising = _denoising(state, sample, z)
    read, parts = _readings(state, sample, recipe, z)
    return denoising + read, {"denoising": denoising, **parts}


def reenact_loss(
    state: State, sample: Sample, recipe: Recipe, stage: StageRecipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss and its parts for a batch of even length: the samples in even places are
    decoded from z_r, the others from z_t, so that the decoder learns z_r without forgetting z_t;
    z_r is held against its z_t. Source: DiffusionAct, the reenactment encoder's pre-training."""
    assert sample.source is not None and sample.condition is not None
    z_r = state.live["reenactment"](sample.source[0::2], sample.condition[0::2]).float()
    encoder = state.live["encoder"] if stage.encoder_lr > 0 else state.ema["encoder"]
    with torch.no_grad():
        wanted = encoder(sample.target[0::2]).float()
    with torch.set_grad_enabled(stage.encoder_lr > 0):
        z_t = encoder(sample.target[1::2]).float()
    z = torch.stack([z_r, z_t], dim=1).flatten(0, 1)
    code = code_distance(z_r, wanted).mean()
    read, parts = _readings(state, sample, recipe, z)
    denoising = _denoising(state, sample, z)
    loss = stage.code * code + read + stage.diffusion * denoising
    return loss, {"denoising": denoising, **parts, "code": code}


def _readings(
    state: State, sample: Sample, recipe: Recipe, z: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted error of what the heads and the U-Net's keypoints read from z, and its parts."""
    heads = state.heads.loss(z, sample.values).mean()
    if not state.config.keypoints:
        return recipe.loss.heads * heads, {"heads": heads}
    keypoints = keypoint_distance(state.unet.keypoints(z), sample.keypoints).mean()
    loss = recipe.loss.heads * heads + recipe.loss.keypoints * keypoints
    return loss, {"heads": heads, "keypoints": keypoints}


def _denoising(state: State, sample: Sample, z: Tensor) -> Tensor:
    x_t, wanted = noised(state.config.prediction, sample.target, sample.eps, sample.t)
    keypoints = None
    if state.config.keypoints and bool(sample.true_keypoints.any()):
        keypoints = torch.where(
            sample.true_keypoints[:, None, None], sample.keypoints, state.unet.keypoints(z)
        )
    prediction = state.live["unet"](x_t, sample.t, z, keypoints)
    return weighted_square(prediction, wanted, sample.weight).mean()
