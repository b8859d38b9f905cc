"""The judge: reads landmarks, gaze and pose off a rendered face, to measure generated ones.

It is trained on true renders, looks at pictures only, and never gives a gradient to a generator:
a model that learns from its judge is no longer measured by it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusionact.errors import SettingsError

LANDMARKS, EYE_LANDMARKS = 68, 6
EYE_STARTS = (36, 42)
MIRROR = (1.0, -1.0)  # the second eye is read mirrored, as if it were the first
MIRRORED_EYE = (3, 2, 1, 0, 5, 4)  # where each point of an eye lies when the eye is mirrored


@dataclass(frozen=True)
class JudgeConfig:
    """The sizes of a judge."""

    image_size: int = 128
    channels: tuple[int, int, int] = (48, 96, 128)  # at 1/4, 1/8, 1/16 of the picture's side
    eye_channels: tuple[int, int] = (16, 32)
    eye_px: float = 24.0  # side of the window cut out around an eye, pixels of the picture
    eye_cells: int = 32  # samples along that side


class Prediction(NamedTuple):
    """What the judge reads off N pictures: tensors, for training."""

    coarse: Tensor  # [N,68,2] px, every landmark as the whole picture shows it
    points: Tensor  # [N,68,2] px, the eyes' landmarks taken from their own windows
    gaze: Tensor  # [N,2,2] px
    pose: Tensor  # [N,3] yaw, pitch, roll, degrees


@dataclass(frozen=True)
class Reading:
    """What the judge reads off N pictures."""

    points: NDArray[np.float32]  # [N,68,2] px, x right, y down
    gaze: NDArray[np.float32]  # [N,2,2] px, iris of eye 36-41, then of eye 42-47
    pose: NDArray[np.float32]  # [N,3] yaw, pitch, roll, degrees


class Judge(nn.Module):
    """Landmarks by soft-argmax of heat maps, the eyes' again from a window around each eye."""

    def __init__(self, config: JudgeConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or JudgeConfig()
        c1, c2, c3 = config.channels
        self.stem = nn.Sequential(_conv(12, c1 // 2), _conv(c1 // 2, c1, stride=2))
        self.quarter = nn.Sequential(_Residual(c1), _Residual(c1))
        self.eighth = nn.Sequential(_conv(c1, c2, stride=2), _Residual(c2))
        self.sixteenth = nn.Sequential(_conv(c2, c3, stride=2), _Residual(c3))
        self.lateral = nn.ModuleList(nn.Conv2d(c, c1, 1) for c in config.channels)
        self.heat = nn.Sequential(_conv(c1, c1), nn.Conv2d(c1, LANDMARKS, 1))
        self.eye = _Eye(config.eye_channels)
        self.pose = nn.Sequential(
            nn.Linear(c3 + 2 * LANDMARKS, 96), nn.ReLU(), nn.Linear(96, 3)
        )  # fmt: skip

    def forward(self, image: Tensor, eye_shift_px: Tensor | None = None) -> Prediction:
        """What N pictures show.

        image: float32 [N,3,S,S], [-1,1], RGB
        eye_shift_px: float32 [N,2,2], moves the windows of the eyes (training only)
        """
        quarter = self.quarter(self.stem(F.pixel_unshuffle(image, 2)))
        eighth = self.eighth(quarter)
        sixteenth = self.sixteenth(eighth)
        up = _double(self.lateral[2](sixteenth)) + self.lateral[1](eighth)
        up = F.relu(_double(up) + self.lateral[0](quarter))
        coarse = self._to_px(_soft_argmax(self.heat(up)))
        points, gaze = self._eyes(image, coarse.detach(), eye_shift_px)
        features = torch.cat([sixteenth.mean((2, 3)).float(), _shape(points.detach())], dim=1)
        return Prediction(coarse, points, gaze, 30 * self.pose(features).float())

    def _to_px(self, place: Tensor) -> Tensor:
        return place * self.config.image_size - 0.5

    def _eyes(
        self, image: Tensor, coarse: Tensor, shift_px: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Landmarks and irises read in a window around each eye; the second one mirrored."""
        side, cells = self.config.eye_px, self.config.eye_cells
        eyes = [coarse[:, start : start + EYE_LANDMARKS] for start in EYE_STARTS]
        centres = torch.stack([eye.mean(1) for eye in eyes], dim=1)
        centres = centres if shift_px is None else centres + shift_px
        windows = [_window(image, centres[:, i], side, cells, MIRROR[i]) for i in (0, 1)]
        mirror = torch.tensor(MIRROR, device=image.device)
        seen = _soft_argmax(self.eye(torch.cat(windows))) - 0.5
        local = torch.stack(seen.chunk(2), dim=1) * side  # [N,2,7,2] px from the window's centre
        local = torch.stack([local[..., 0] * mirror[:, None], local[..., 1]], dim=-1)
        found = local + centres[:, :, None]
        second = found[:, 1, MIRRORED_EYE]
        points = torch.cat([coarse[:, :36], found[:, 0, :6], second, coarse[:, 48:]], dim=1)
        return points, found[:, :, 6]

    @torch.inference_mode()
    def read(self, images: NDArray[np.uint8], batch: int = 32) -> Reading:
        """What pictures show; sets the network to evaluation.

        images: uint8 [N,S,S,3], RGB
        Raises: SettingsError when the pictures have another size.
        """
        side = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (side, side, 3):
            raise SettingsError(
                f"this judge reads [N,{side},{side},3] pictures, not {images.shape}"
            )
        self.eval()
        parts: list[Prediction] = []
        for start in range(0, len(images), batch):
            part = torch.from_numpy(np.ascontiguousarray(images[start : start + batch]))
            parts.append(self(part.permute(0, 3, 1, 2).float() / 127.5 - 1))
        stacked = [torch.cat(column).float().numpy() for column in zip(*parts, strict=True)]
        return Reading(points=stacked[1], gaze=stacked[2], pose=stacked[3])


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels)
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class _Eye(nn.Module):
    """Heat maps of six lid points and the iris over the window of an eye, at its full grid."""

    def __init__(self, channels: tuple[int, int]) -> None:
        super().__init__()
        c1, c2 = channels
        self.fine = nn.Sequential(_conv(3, c1), _conv(c1, c1))
        self.middle = nn.Sequential(_conv(c1, c2, stride=2), _Residual(c2))
        self.coarse = nn.Sequential(_conv(c2, c2, stride=2), _Residual(c2))
        self.up_half = nn.Conv2d(c2, c2, 1)
        self.up_fine = nn.Conv2d(c2, c1, 1)
        self.heat = nn.Sequential(_conv(c1, c1), nn.Conv2d(c1, EYE_LANDMARKS + 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        half = self.middle(fine)
        half = F.relu(half + self.up_half(_double(self.coarse(half))))
        return self.heat(F.relu(fine + self.up_fine(_double(half))))  # type: ignore[no-any-return]


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _soft_argmax(heat: Tensor) -> Tensor:
    """The mean place under the softmax of each map: [N,K,H,W] -> [N,K,2] x, y in 0..1.

    Source: Sun et al. 2018, Integral Human Pose Regression, Eq. 2.
    """
    count, maps, rows, columns = heat.shape
    weight = heat.float().reshape(count, maps, -1).softmax(-1).view(count, maps, rows, columns)
    x = (torch.arange(columns, device=heat.device) + 0.5) / columns
    y = (torch.arange(rows, device=heat.device) + 0.5) / rows
    return torch.stack([(weight.sum(2) * x).sum(-1), (weight.sum(3) * y).sum(-1)], dim=-1)


def _window(image: Tensor, centre_px: Tensor, side_px: float, cells: int, mirror: float) -> Tensor:
    """A square of each picture around a point, `cells` samples a side; mirror=-1 flips it."""
    size = image.shape[-1]
    steps = ((torch.arange(cells, device=image.device) + 0.5) / cells - 0.5) * side_px
    x = centre_px[:, None, None, 0] + mirror * steps[None, None, :]
    y = centre_px[:, None, None, 1] + steps[None, :, None]
    square = len(image), cells, cells
    grid = torch.stack([x.expand(square), y.expand(square)], dim=-1)
    grid = (2 * grid + 1) / size - 1
    return F.grid_sample(image, grid, padding_mode="border", align_corners=False)


def _shape(points: Tensor) -> Tensor:
    """Landmarks free of place and size: [N,68,2] px -> [N,136]."""
    centred = points - points.mean(1, keepdim=True)
    return (centred / centred.pow(2).mean((1, 2), keepdim=True).sqrt().clamp_min(1e-6)).flatten(1)


def save_judge(path: str | Path, judge: Judge, notes: dict[str, Any]) -> None:
    """Writes a judge's weights in half precision, with its sizes and notes on its training."""
    path = Path(path)
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in judge.state_dict().items()
    }
    metadata = {"config": json.dumps(dataclasses.asdict(judge.config)), "notes": json.dumps(notes)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".part-{path.name}")
    save_file(weights, temporary, metadata)
    os.replace(temporary, path)


def load_judge(path: str | Path) -> tuple[Judge, dict[str, Any]]:
    """A judge ready to read, and the notes on its training.

    Raises: SettingsError when the file is missing or is no judge.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
        sizes: dict[str, Any] = json.loads(metadata["config"])
        lists: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()
        }
        config = JudgeConfig(**lists)
        judge = Judge(config)
        judge.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
        )
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise SettingsError(
            f"{path} is no judge ({type(error).__name__}: {error}); train one with "
            "`python -m diffusionact.training.judges training/recipes/judge128.toml`"
        ) from error
    return judge.eval(), json.loads(metadata["notes"])
