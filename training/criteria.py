"""The eight losses of a picture that a generator made, and their weighted sum.

Source: DiffusionAct: Bounareli et al., "DiffusionAct: Controllable Diffusion Autoencoder for
One-shot Face Reenactment", 2024. Eq. 4-6 are the weighted sums, Eq. 10-17 its eight losses. What
the paper says of each in words is taken as it is; where its form was open, the one taken is that
of the same authors' earlier works, and each function says so. Every loss is a mean, over pixels,
maps, points or angles and over the batch, so that its weight means the same at every size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from diffusionact.training.config import CriteriaRecipe
from diffusionact.training.critics import Critics, Reading

# Pairs of points (68-point layout) across eyes and mouth, whose distances are their openings.
EYE_PAIRS = ((36, 39), (37, 41), (38, 40), (42, 45), (43, 47), (44, 46))
MOUTH_PAIRS = ((48, 54), (49, 59), (50, 58), (51, 57), (52, 56), (53, 55), (60, 64), (61, 67),
               (62, 66), (63, 65))  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """What made pictures are measured by. Pictures are float [B,3,S,S], RGB, -1..1.

    target: what they should be; in the reconstruction half of a batch, the source itself.
    source: whose identity they should have.
    labels: integer [B,S,S], the renderer's regions of the target; None where there are none.
    points: float [B,68,2] px, where the face is in the target, and should be in the result;
    source_points: where it is in the source. They place the crops of published networks; give both
    or neither, so that the crops of an identity are of one make.
    """

    target: Tensor
    source: Tensor
    labels: Tensor | None = None
    points: Tensor | None = None
    source_points: Tensor | None = None


def criteria(
    result: Tensor, goal: Goal, critics: Critics, weights: CriteriaRecipe
) -> dict[str, Tensor]:
    """The losses whose weight is above 0, by name, not yet weighted: scalars.

    result: float [B,3,S,S], RGB, -1..1 or a little beyond, as a sampler gives it.
    Raises: SettingsError: a network that a loss asks is not there.
    """
    asked = frozenset(name for name, weight in asdict(weights).items() if weight > 0)
    with torch.autocast(result.device.type, enabled=False):
        result = result if result.dtype == torch.float64 else result.float()
        goal = _as_made(goal, result.dtype)
        return _losses(result, goal, critics, asked)


def total(parts: Mapping[str, Tensor], weights: CriteriaRecipe) -> Tensor:
    """The weighted sum of the losses: a scalar.

    Source: DiffusionAct, Eq. 4-6.
    """
    known = asdict(weights)
    return torch.stack([known[name] * part for name, part in parts.items()]).sum()


def pixel(result: Tensor, target: Tensor) -> Tensor:
    """The L1 distance of two pictures: mean |x_r - x_t|.

    Source: DiffusionAct, pixel loss.
    """
    return (result - target).abs().mean()


def perceptual(found: Sequence[Tensor], due: Sequence[Tensor]) -> Tensor:
    """The L1 distance of two pictures' maps, mean over the maps: 1/L sum_l mean |f_l - g_l|.

    The mean, so that critics of five maps and of four weigh alike.
    Source: DiffusionAct, perceptual loss; Johnson et al. 2016, with L1 as in reenactment.
    """
    return torch.stack([(f - g).abs().mean() for f, g in zip(found, due, strict=True)]).mean()


def identity(found: Tensor, due: Tensor) -> Tensor:
    """How far two embeddings of length 1 point apart: mean 1 - cos(e_r, e_s), 0..2.

    Source: DiffusionAct, identity loss, between the result and the source.
    """
    return (1 - (found * due).sum(1)).mean()


def style(found: Tensor, due: Tensor) -> Tensor:
    """The L1 distance of two embeddings, each at root mean square 1.

    The scale is taken out, so that the weight means the same for every critic.
    Source: DiffusionAct, style loss, on FaRL's features; their L1 distance as in Barattin et al.,
    "Attribute-preserving Face Dataset Anonymization via Latent Code Optimization", 2023.
    """
    return (_unit_square(found) - _unit_square(due)).abs().mean()


def background(result: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The L1 distance of what is background in the target: mean of m |x_r - x_t|.

    mask: float [B,1,S,S], 0..1. The mean is over all pixels, so that a picture with little
    background has little to say.
    Source: DiffusionAct, background loss, with masks of the target.
    """
    return (mask * (result - target).abs()).mean()


def shape(found: Tensor, due: Tensor) -> Tensor:
    """The L1 distance of landmarks [B,68,2] px, and of the openings of eyes and mouth.

    Source: DiffusionAct, shape loss; its three terms as in Bounareli et al., "Finding Directions
    in GAN's Latent Space for Neural Face Reenactment", 2022.
    """
    points = (found - due).abs().mean()
    return points + _openings(found, due, EYE_PAIRS) + _openings(found, due, MOUTH_PAIRS)


def gaze(found: Tensor, due: Tensor) -> Tensor:
    """The L1 distance of two gaze directions [B,2], radians.

    Source: DiffusionAct, gaze loss.
    """
    return (found - due).abs().mean()


def head_pose(found: Tensor, due: Tensor) -> Tensor:
    """The L1 distance of Euler angles [B,3], degrees, the short way round.

    Source: DiffusionAct, head pose loss.
    """
    apart = (found - due).abs() % 360
    return torch.minimum(apart, 360 - apart).mean()


def _openings(found: Tensor, due: Tensor, pairs: tuple[tuple[int, int], ...]) -> Tensor:
    """The L1 distance of |p_i - p_j|, axis by axis, mean over the pairs."""
    first, second = (list(ends) for ends in zip(*pairs, strict=True))
    gaps = [(points[:, first] - points[:, second]).abs() for points in (found, due)]
    return (gaps[0] - gaps[1]).abs().mean()


def _unit_square(rows: Tensor) -> Tensor:
    """The rows [B,E] at root mean square 1."""
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit: Tensor = rows / length.clamp_min(1e-12)
    return unit * math.sqrt(rows.shape[1])


def _losses(
    result: Tensor, goal: Goal, critics: Critics, asked: frozenset[str]
) -> dict[str, Tensor]:
    """Each network sees each picture once; identity is the source's, all else the target's."""
    parts: dict[str, Tensor] = {}
    if "pixel" in asked:
        parts["pixel"] = pixel(result, goal.target)
    with torch.no_grad():
        due = critics.read(goal.target, goal.points, asked - {"identity"})
        source = critics.read(goal.source, goal.source_points, asked & {"identity"})
        if "background" in asked:
            mask = critics.background(goal.target, goal.labels)
    if "background" in asked:
        parts["background"] = background(result, goal.target, mask)
    made = critics.read(result, goal.points, asked)
    if made.identity is not None and source.identity is not None:
        parts["identity"] = identity(made.identity, source.identity)
    parts |= _of_readings(made, due)
    assert set(parts) == asked, f"no loss for {set(asked) ^ set(parts)}"  # one that was added
    return parts


def _of_readings(made: Reading, due: Reading) -> dict[str, Tensor]:
    """The losses of what was read of the result and of the target, all but identity."""
    parts: dict[str, Tensor] = {}
    if made.features is not None and due.features is not None:
        parts["perceptual"] = perceptual(made.features, due.features)
    if made.style is not None and due.style is not None:
        parts["style"] = style(made.style, due.style)
    if made.landmarks is not None and due.landmarks is not None:
        parts["shape"] = shape(made.landmarks, due.landmarks)
    if made.gaze is not None and due.gaze is not None:
        parts["gaze"] = gaze(made.gaze, due.gaze)
    if made.head_pose is not None and due.head_pose is not None:
        parts["head_pose"] = head_pose(made.head_pose, due.head_pose)
    return parts


def _as_made(goal: Goal, dtype: torch.dtype) -> Goal:
    """The goal with pictures of that dtype."""
    return replace(goal, target=goal.target.to(dtype), source=goal.source.to(dtype))
