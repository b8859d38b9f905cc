"""Parts of the networks that read a face off a picture (judge, guide): heat maps, windows around
the eyes, and the file that holds such a network."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from diffusionact.errors import SettingsError

LANDMARKS, EYE_LANDMARKS = 68, 6
EYE_STARTS = (36, 42)
MIRROR = (1.0, -1.0)  # the second eye is read mirrored, as if it were the first
MIRRORED_EYE = (3, 2, 1, 0, 5, 4)  # where each point of an eye lies when the eye is mirrored


class Residual(nn.Module):
    """Two normed 3x3 convolutions, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv_norm(channels, channels)
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class Eye(nn.Module):
    """Heat maps of six lid points and the iris over the window of an eye, at its full grid."""

    def __init__(self, channels: tuple[int, int]) -> None:
        super().__init__()
        c1, c2 = channels
        self.fine = nn.Sequential(conv_norm(3, c1), conv_norm(c1, c1))
        self.middle = nn.Sequential(conv_norm(c1, c2, stride=2), Residual(c2))
        self.coarse = nn.Sequential(conv_norm(c2, c2, stride=2), Residual(c2))
        self.up_half = nn.Conv2d(c2, c2, 1)
        self.up_fine = nn.Conv2d(c2, c1, 1)
        self.heat = nn.Sequential(conv_norm(c1, c1), nn.Conv2d(c1, EYE_LANDMARKS + 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        half = self.middle(fine)
        half = F.relu(half + self.up_half(doubled(self.coarse(half))))
        return self.heat(F.relu(fine + self.up_fine(doubled(half))))  # type: ignore[no-any-return]


def conv_norm(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def doubled(x: Tensor) -> Tensor:
    """x [N,C,H,W] at twice the side, nearest."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def soft_argmax(heat: Tensor) -> Tensor:
    """The mean place under the softmax of each map: [N,K,H,W] -> [N,K,2] x, y in 0..1.

    Source: Sun et al. 2018, Integral Human Pose Regression, Eq. 2.
    """
    count, maps, rows, columns = heat.shape
    weight = heat.float().reshape(count, maps, -1).softmax(-1).view(count, maps, rows, columns)
    x = (torch.arange(columns, device=heat.device) + 0.5) / columns
    y = (torch.arange(rows, device=heat.device) + 0.5) / rows
    return torch.stack([(weight.sum(2) * x).sum(-1), (weight.sum(3) * y).sum(-1)], dim=-1)


def window(image: Tensor, centre_px: Tensor, side_px: float, cells: int, mirror: float) -> Tensor:
    """A square of each picture around a point, `cells` samples a side; mirror=-1 flips it."""
    size = image.shape[-1]
    steps = ((torch.arange(cells, device=image.device) + 0.5) / cells - 0.5) * side_px
    x = centre_px[:, None, None, 0] + mirror * steps[None, None, :]
    y = centre_px[:, None, None, 1] + steps[None, :, None]
    square = len(image), cells, cells
    grid = torch.stack([x.expand(square), y.expand(square)], dim=-1)
    grid = (2 * grid + 1) / size - 1
    return F.grid_sample(image, grid, padding_mode="border", align_corners=False)


def shape_of(points: Tensor) -> Tensor:
    """Landmarks free of place and size: [N,68,2] px -> [N,136]."""
    centred = points - points.mean(1, keepdim=True)
    return (centred / centred.pow(2).mean((1, 2), keepdim=True).sqrt().clamp_min(1e-6)).flatten(1)


def read_eyes(
    eye: Eye,
    image: Tensor,
    coarse: Tensor,
    window_px: float,
    cells: int,
    shift_px: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Landmarks [N,68,2] px, the eyes' read in a window around each eye (the second one
    mirrored), and irises [N,2,2] px.

    coarse: float32 [N,68,2] px, where the eyes are about; shift_px: float32 [N,2,2], moves the
    windows (training only)
    """
    eyes = [coarse[:, start : start + EYE_LANDMARKS] for start in EYE_STARTS]
    # A window that moves with its eye shows the same: its place needs no gradient.
    centres = torch.stack([points.mean(1) for points in eyes], dim=1).detach()
    centres = centres if shift_px is None else centres + shift_px
    windows = [window(image, centres[:, i], window_px, cells, MIRROR[i]) for i in (0, 1)]
    mirror = torch.tensor(MIRROR, device=image.device)
    seen = soft_argmax(eye(torch.cat(windows))) - 0.5
    local = torch.stack(seen.chunk(2), dim=1) * window_px  # [N,2,7,2] px from the window's centre
    local = torch.stack([local[..., 0] * mirror[:, None], local[..., 1]], dim=-1)
    found = local + centres[:, :, None]
    second = found[:, 1, MIRRORED_EYE]
    points = torch.cat([coarse[:, :36], found[:, 0, :6], second, coarse[:, 48:]], dim=1)
    return points, found[:, :, 6]


def fold_norms(network: nn.Module) -> None:
    """Nothing; puts every batch norm behind a convolution into its weights. The network computes
    the same as in evaluation, faster, and can no longer be trained."""
    for module in network.modules():
        if not isinstance(module, nn.Sequential):
            continue
        for i, (first, second) in enumerate(zip(list(module), list(module)[1:], strict=False)):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                module[i] = fuse_conv_bn_eval(first.eval(), second.eval())
                module[i + 1] = nn.Identity()


def save_reader(path: str | Path, network: nn.Module, sizes: Any, notes: dict[str, Any]) -> None:
    """Nothing; writes weights in half precision, whole or not at all, with the network's sizes (a
    dataclass) and notes on its training."""
    path = Path(path)
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in network.state_dict().items()
    }
    metadata = {"config": json.dumps(dataclasses.asdict(sizes)), "notes": json.dumps(notes)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".part-{path.name}")
    save_file(weights, temporary, metadata)
    os.replace(temporary, path)


def read_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """The weights of a reader's file as float32, its sizes, and the notes on its training.

    Raises: OSError, SafetensorError, KeyError, ValueError when the file holds no reader.
    """
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}
    sizes: dict[str, Any] = json.loads(metadata["config"])
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
    notes: dict[str, Any] = json.loads(metadata["notes"])
    floats = {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
    return floats, lists, notes


# What reading a file that is none of ours, or of another kind, can raise.
NOT_A_READER = (OSError, SafetensorError, KeyError, TypeError, RuntimeError, ValueError)


def refused(path: str | Path, what: str, command: str, error: Exception) -> SettingsError:
    """The error to raise for a file that is no reader of this kind."""
    return SettingsError(f"{path} is no {what} ({type(error).__name__}: {error}); {command}")
