"""What each published critic is shown of a picture: its crop, size and colours.

Pictures are float [B,3,S,S], RGB, -1..1. All of it passes gradients towards the picture; the
points that place a crop take none. Coordinates are pixel indices, as in `diffusionact.landmarks`.

Source: the crops are those of the published tracker (`runtime.published`), here for torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Eyes, tip of the nose and corners of the mouth in a crop of 112 px.
TEMPLATE = ((35.343697, 51.6963), (76.453766, 51.5014), (56.029396, 71.7366), (39.14085, 92.3655),
            (73.18488, 92.2041))  # fmt: skip
TEMPLATE_SIDE = 112
# Where the template lies in FFHQ's crop, as shares of its side: for pictures without landmarks.
FFHQ_PLACE, FFHQ_SHARE = (32 / 256, 35 / 256), 188 / 256
EMOCA_SIDE, EMOCA_MARGIN = 224, 1.25 * 1.1  # of the landmarks' box
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def imagenet(x: Tensor) -> Tensor:
    """The picture as ImageNet's networks take it: float [B,3,S,S]."""
    return _normalised(x, IMAGENET)


def for_farl(x: Tensor, side: int) -> Tensor:
    """The whole picture as CLIP's encoders take it: float [B,3,side,side]."""
    whole = F.interpolate(x, (side, side), mode="bicubic", align_corners=False, antialias=True)
    return _normalised(whole.clamp(-1, 1), CLIP)


def for_bisenet(x: Tensor, side: int) -> Tensor:
    """The whole picture at the side that the network was trained at: float [B,3,side,side]."""
    whole = F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True)
    return imagenet(whole)


def for_arcface(x: Tensor, points: Tensor | None, side: int) -> Tensor:
    """The face on the five points of the template: float [B,3,side,side], -1..1.

    points: float [B,68,2] px; None: where FFHQ's crop has the face.
    """
    return aligned(x, points, side)


def for_gaze(x: Tensor, points: Tensor | None, side: int) -> Tensor:
    """The same crop as `for_arcface`, ImageNet-normalised."""
    return imagenet(aligned(x, points, side).clamp(-1, 1))


def for_emoca(x: Tensor, points: Tensor | None) -> Tensor:
    """The face with a margin around its landmarks: float [B,3,224,224], 0..1.

    points: float [B,68,2] px; None: the whole picture.
    """
    matrix = _box_matrix(x, points)
    unit = (x.clamp(-1, 1) + 1) / (2 + 1e-5)
    return sampled(unit, matrix, EMOCA_SIDE)


def aligned(x: Tensor, points: Tensor | None, side: int) -> Tensor:
    """The crop in which the five points lie as near as can be to the template's: [B,3,side,side].

    The crop's pixel (j, i) shows the template at 112 ((j, i) + 1/2) / side.
    """
    count, size = len(x), x.shape[-1]
    template = torch.tensor(TEMPLATE, dtype=x.dtype, device=x.device)
    if points is None:
        place = torch.tensor(FFHQ_PLACE, dtype=x.dtype, device=x.device)
        five = (template * (FFHQ_SHARE / TEMPLATE_SIDE) + place) * size
        five = five.expand(count, 5, 2)
    else:
        five = five_points(points.to(x.dtype))
    matrix = similarity(template.expand(count, 5, 2), five)
    linear, cell = matrix[..., :2], TEMPLATE_SIDE / side
    half = torch.full((2, 1), cell / 2, dtype=x.dtype, device=x.device)
    offset = linear @ half + matrix[..., 2:] - 0.5
    return sampled(x, torch.cat([linear * cell, offset], dim=-1), side)


def five_points(points: Tensor) -> Tensor:
    """Both eyes' middles, tip of the nose, corners of the mouth: [B,5,2] from [B,68,2]."""
    eyes = [points[:, 36:42].mean(1), points[:, 42:48].mean(1)]
    return torch.stack([*eyes, points[:, 30], points[:, 48], points[:, 54]], dim=1)


def similarity(source: Tensor, target: Tensor) -> Tensor:
    """The similarity that brings `source` [B,N,2] nearest to `target` [B,N,2]: [B,2,3].

    Source: Umeyama 1991, in the plane, where scale and turn are one complex number.
    """
    mean_a, mean_b = source.mean(1), target.mean(1)
    a, b = source - mean_a[:, None], target - mean_b[:, None]
    size = a.square().sum((1, 2))
    along = (a * b).sum((1, 2)) / size
    across = (a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]).sum(1) / size
    linear = torch.stack(
        [torch.stack([along, -across], -1), torch.stack([across, along], -1)], dim=-2
    )
    offset = mean_b[..., None] - linear @ mean_a[..., None]
    return torch.cat([linear, offset], dim=-1)


def sampled(x: Tensor, matrix: Tensor, side: int) -> Tensor:
    """A crop [B,C,side,side], bilinear, 0 outside the picture.

    matrix: float [B,2,3], crop px -> picture px.
    """
    steps = torch.arange(side, dtype=x.dtype, device=x.device)
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    pixels = torch.stack([columns, rows, torch.ones_like(rows)], dim=-1).flatten(0, 1)
    places = pixels @ matrix.detach().transpose(1, 2)
    grid = 2 * places / (x.shape[-1] - 1) - 1
    return F.grid_sample(
        x, grid.view(len(x), side, side, 2), mode="bilinear", align_corners=True
    )  # fmt: skip


def _box_matrix(x: Tensor, points: Tensor | None) -> Tensor:
    """Crop px -> picture px of EMOCA's square: [B,2,3]."""
    if points is None:
        size = torch.full((len(x),), x.shape[-1] - 1.0, dtype=x.dtype, device=x.device)
        centre = (size / 2)[:, None].expand(-1, 2)
    else:
        lowest, highest = points.to(x.dtype).amin(1), points.to(x.dtype).amax(1)
        size = torch.floor(EMOCA_MARGIN * (highest - lowest).mean(1))
        centre = (highest + lowest) / 2
    cell = (size / (EMOCA_SIDE - 1))[:, None, None]
    linear = cell * torch.eye(2, dtype=x.dtype, device=x.device)
    return torch.cat([linear, (centre - size[:, None] / 2)[..., None]], dim=-1)


def _normalised(x: Tensor, colours: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, deviation = (
        torch.tensor(c, dtype=x.dtype, device=x.device)[:, None, None] for c in colours
    )
    return ((x + 1) / 2 - mean) / deviation
