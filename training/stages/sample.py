"""A batch as tensors, with its noise and timesteps drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffusionact.training.config import Recipe, StageRecipe
from diffusionact.training.data import Batch
from diffusionact.training.diffusion import draw_timesteps, to_batch
from diffusionact.training.losses import head_targets, keypoint_targets, pixel_weights
from diffusionact.training.share import WHOLE, Share


@dataclass(frozen=True)
class Sample:
    """A batch as tensors on the device: pictures float32 [B,3,S,S] in [-1,1], weight [B,1,S,S],
    values float32 [B,K] for the heads, keypoints float32 [B,70,2] px, true_keypoints bool [B] where
    the U-Net sees those instead of what z places, noise eps [B,3,S,S], timesteps t int64 [B];
    labels uint8 [B,S,S], 0 on the target's background; source_points float32 [B,68,2] px."""

    target: Tensor
    source: Tensor | None
    condition: Tensor | None
    weight: Tensor
    values: Tensor
    keypoints: Tensor
    true_keypoints: Tensor
    eps: Tensor
    t: Tensor
    labels: Tensor | None = None
    source_points: Tensor | None = None


def to_sample(
    batch: Batch, recipe: Recipe, stage: StageRecipe, generator: torch.Generator, fraction: float,
    share: Share = WHOLE,
) -> Sample:  # fmt: skip
    """Returns the batch, which is this share of the whole one, on the generator's device, with
    noise and timesteps drawn for all and its own kept; `fraction` of the stage is over."""
    device = generator.device
    target = to_batch(batch.target, device)
    whole = len(target) * share.count
    rows = share.rows(whole)
    eps = torch.randn((whole, *target.shape[1:]), generator=generator, device=device)[rows]
    eps = eps.contiguous(memory_format=torch.channels_last)
    eps[: len(batch.noise)] = torch.from_numpy(batch.noise).to(device, torch.float32)
    values = head_targets(batch.points, batch.gaze, batch.parameters).values
    gaze = torch.from_numpy(np.ascontiguousarray(batch.gaze)).to(device)
    until = stage.true_keypoints_until
    true_share = 1 - fraction / until if until else 0.0
    return Sample(
        target=target,
        source=None if batch.source is None else to_batch(batch.source, device),
        condition=None if batch.condition is None else to_batch(batch.condition, device),
        weight=_weight(batch, gaze, recipe),
        values=torch.from_numpy(values).to(device),
        keypoints=torch.from_numpy(keypoint_targets(batch.points, batch.gaze)).to(device),
        true_keypoints=(torch.rand(whole, generator=generator, device=device) < true_share)[rows],
        eps=eps,
        t=draw_timesteps(whole, stage.timestep_power, generator)[rows],
        labels=_labels(batch, device),
        source_points=_points(batch.source_points, device),
    )


def part_of(sample: Sample, rows: slice) -> Sample:
    """Returns these rows of the sample."""
    fields = {name: value[rows] for name, value in vars(sample).items() if value is not None}
    return replace(sample, **fields)


def _weight(batch: Batch, gaze: torch.Tensor, recipe: Recipe) -> Tensor:
    """Weights of the pixels, [B,1,S,S]; all alike where nobody says what a pixel shows."""
    if batch.labels is None:
        count, height, width, _ = batch.target.shape
        return torch.ones(count, 1, height, width, device=gaze.device)
    return pixel_weights(torch.from_numpy(batch.labels).to(gaze.device), gaze, recipe.loss)


def _labels(batch: Batch, device: torch.device) -> Tensor | None:
    """What the target shows where, 0 its background; None where the data set does not say."""
    if batch.labels is not None:
        return torch.from_numpy(batch.labels).to(device)
    return None if batch.mask is None else torch.from_numpy(batch.mask).to(device) // 128


def _points(points: npt.NDArray[np.float32] | None, device: torch.device) -> Tensor | None:
    return None if points is None else torch.from_numpy(points[..., :2].copy()).to(device)
