"""What training minimises: weighted pixel errors, and heads that read the scene out of z."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusionact.training.config import LossRecipe
from diffusionact.training.gather import gathered

F32 = npt.NDArray[np.float32]

# Pairs of points (68-point layout) whose distance is an opening: lids, inner lips, brow to lid.
OPENINGS = ((37, 41), (38, 40), (43, 47), (44, 46), (61, 67), (62, 66), (63, 65), (60, 64),
            (19, 37), (24, 44))  # fmt: skip


def pixel_weights(labels: Tensor, gaze: Tensor, recipe: LossRecipe) -> Tensor:
    """Returns weights: float32 [B,1,S,S], mean 1 per image, heavy on eyes, mouth and brows.

    labels: uint8 [B,S,S], the renderer's regions; gaze: float32 [B,2,2] px. Regions are grown by
    one pixel, so that their outlines count as well.
    """
    table = torch.tensor(recipe.regions(), device=labels.device)
    weight = functional.max_pool2d(table[labels.long()][:, None], 3, stride=1, padding=1)
    side = torch.arange(labels.shape[-1], device=labels.device, dtype=gaze.dtype)
    offsets = side[None, None, None] - gaze[..., None]  # [B, eye, xy, S]
    bump = torch.exp(-0.5 * (offsets / recipe.gaze_sigma_px) ** 2)
    bumps = torch.einsum("bey,bex->byx", bump[:, :, 1], bump[:, :, 0])
    weight = weight + recipe.gaze * bumps[:, None]
    return weight / weight.mean(dim=(1, 2, 3), keepdim=True)


def weighted_square(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Returns the squared error per image: float32 [B], mean over colours and weighted pixels."""
    return (weight * (prediction.float() - target) ** 2).mean(dim=(1, 2, 3))


TEXTURE_WINDOWS = (3, 7)  # px


def texture_distance(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Returns how far the local strength of fine detail is from the target's: float32 [B].

    A squared error alone prefers a smooth guess to detail a pixel off its place. This one asks for
    as much detail as the target has around every pixel, wherever exactly it lies: the L1 distance
    of the root mean square of the Laplacian in small windows.

    x, target: float32 [B,3,S,S] in [-1,1]; weight: float32 [B,1,S,S], mean 1.
    """
    fine, fine_target = laplacian(x.float()), laplacian(target)
    distance = torch.zeros(len(x), device=x.device)
    for side in TEXTURE_WINDOWS:
        strength, wanted = (
            functional.avg_pool2d(f.square(), side, 1, side // 2, count_include_pad=False)
            .add(1e-4).sqrt() for f in (fine, fine_target)
        )  # fmt: skip
        distance = distance + (weight * (strength - wanted).abs()).mean(dim=(1, 2, 3))
    return distance / len(TEXTURE_WINDOWS)


def laplacian(x: Tensor) -> Tensor:
    """Returns each pixel less the mean of its four neighbours, borders repeated: [B,C,S,S]."""
    padded = functional.pad(x, (1, 1, 1, 1), mode="replicate")
    vertical = padded[:, :, :-2, 1:-1] + padded[:, :, 2:, 1:-1]
    horizontal = padded[:, :, 1:-1, :-2] + padded[:, :, 1:-1, 2:]
    return x - 0.25 * (vertical + horizontal)


@dataclass(frozen=True)
class HeadTargets:
    """values: float32 [B,K], the groups side by side; sizes: the length of each group."""

    values: F32
    sizes: tuple[int, ...]


# The groups count alike, whatever their lengths; gaze and openings are small in the picture and
# decide whether a face lives, so they count more.
GROUP_WEIGHTS = (1.0, 1.0, 1.0, 1.5, 1.5)


def head_targets(points: F32, gaze: F32, parameters: F32 | None) -> HeadTargets:
    """Returns what the heads read from z: parameters, landmarks, gaze points, gaze relative to
    its eye, openings of eyes and mouth. Not standardised; lengths in px.

    points: float32 [B,68,>=2] px; gaze: float32 [B,2,2] px; parameters: float32 [B,P], None where
    nobody knows what a picture depends on: then the first group is empty.
    """
    xy = points[..., :2]
    eyes = np.stack([xy[:, 36:42].mean(1), xy[:, 42:48].mean(1)], axis=1)
    first, second = np.array(OPENINGS).T
    openings = np.linalg.norm(xy[:, first] - xy[:, second], axis=-1)
    count = len(points)
    known = np.empty((count, 0), np.float32) if parameters is None else parameters
    groups = [known, xy.reshape(count, -1), gaze.reshape(count, -1),
              (gaze - eyes).reshape(count, -1), openings]  # fmt: skip
    values = np.concatenate(groups, axis=1).astype(np.float32)
    return HeadTargets(values, tuple(group.shape[1] for group in groups))


class Heads(nn.Module):
    """One linear layer on z for all targets; the L1 error of standardised values is its loss.
    Linear, so that the scene lies along straight directions of z."""

    mean: Tensor
    scale: Tensor
    weight: Tensor

    def __init__(self, embed: int, targets: HeadTargets) -> None:
        """`targets` of a large sample set the mean and scale of each value."""
        super().__init__()
        count = targets.values.shape[1]
        self.linear = nn.Linear(embed, count)
        mean, deviation = targets.values.mean(0), targets.values.std(0)
        self.register_buffer("mean", torch.from_numpy(mean))
        # A value that never varies has nothing to teach; its scale must not blow up its noise.
        self.register_buffer("scale", torch.from_numpy(1 / np.maximum(deviation, 1e-2)))
        self.register_buffer("weight", torch.from_numpy(group_weights(targets.sizes)))

    def loss(self, z: Tensor, values: Tensor) -> Tensor:
        """Returns the weighted L1 error per sample: float32 [B]. values: float32 [B,K]."""
        wanted = (values - self.mean) * self.scale
        error: Tensor = (self.linear(z).float() - wanted).abs()
        return (error * self.weight).sum(dim=1)


def group_weights(sizes: Sequence[int]) -> F32:
    """Returns one weight per value: float32 [K], summing to 1."""
    rows = [np.full(n, w / max(n, 1)) for n, w in zip(sizes, GROUP_WEIGHTS, strict=True)]
    weights = np.concatenate(rows)
    return np.asarray(weights / weights.sum(), np.float32)


# Eyelids and irises (68-point layout, then the two gaze points): a pixel there is a lot.
KEYPOINT_WEIGHTS = np.ones(70, np.float32)
KEYPOINT_WEIGHTS[36:48], KEYPOINT_WEIGHTS[68:] = 3.0, 4.0
KEYPOINT_WEIGHTS /= KEYPOINT_WEIGHTS.mean()


def keypoint_targets(points: F32, gaze: F32) -> F32:
    """Returns what a U-Net with 70 keypoints places: float32 [B,70,2] px, landmarks, then gaze.

    points: float32 [B,68,>=2] px; gaze: float32 [B,2,2] px.
    """
    return np.concatenate([points[..., :2], gaze], axis=1).astype(np.float32)


def keypoint_distance(placed: Tensor, wanted: Tensor) -> Tensor:
    """Returns the weighted L1 error per sample in px: float32 [B]. placed, wanted: [B,70,2]."""
    weight = torch.from_numpy(KEYPOINT_WEIGHTS).to(placed.device)
    error: Tensor = (placed - wanted).abs().mean(dim=2) * weight
    return error.mean(dim=1)


def code_distance(z: Tensor, wanted: Tensor) -> Tensor:
    """Returns |z - wanted| in standard deviations of the wanted codes [B,E] over the batch, all
    processes' parts of it, mean over the code: float32 [B].

    Source: DiffusionAct, the pre-training of the reenactment encoder.
    """
    deviation = gathered(wanted).std(dim=0).clamp(min=1e-3)
    return ((z.float() - wanted) / deviation).abs().mean(dim=1)
