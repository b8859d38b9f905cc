"""The terms that several stages share: what z tells of the scene, and the denoising error."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusionact.training.config import Recipe
from diffusionact.training.diffusion import noised
from diffusionact.training.losses import keypoint_distance, weighted_square
from diffusionact.training.stages.sample import Sample
from diffusionact.training.state import State


def readings(
    state: State, sample: Sample, recipe: Recipe, z: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the weighted error of what the heads and the U-Net's keypoints read from z, and its
    parts; what has no weight is not asked."""
    weights, loss, parts = recipe.loss, z.new_zeros(()), dict[str, Tensor]()
    if weights.heads > 0:
        parts["heads"] = state.heads.loss(z, sample.values).mean()
        loss = loss + weights.heads * parts["heads"]
    if state.config.keypoints and weights.keypoints > 0:
        placed = state.unet.keypoints(z)
        parts["keypoints"] = keypoint_distance(placed, sample.keypoints).mean()
        loss = loss + weights.keypoints * parts["keypoints"]
    return loss, parts


def denoising_error(state: State, sample: Sample, z: Tensor) -> Tensor:
    """Returns the weighted square error of the prediction at the sample's noise and timesteps. Where
    the sample says so, the U-Net sees the true keypoints instead of those that z places."""
    x_t, wanted = noised(state.config.prediction, sample.target, sample.eps, sample.t)
    keypoints = None
    if state.config.keypoints and bool(sample.true_keypoints.any()):
        keypoints = torch.where(
            sample.true_keypoints[:, None, None], sample.keypoints, state.unet.keypoints(z)
        )
    prediction = state.live["unet"](x_t, sample.t, z, keypoints)
    return weighted_square(prediction, wanted, sample.weight).mean()
