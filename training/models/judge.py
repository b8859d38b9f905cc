"""The judge: reads landmarks, gaze and pose off a rendered face, to measure generated ones.

It is trained on true renders, looks at pictures only, and never gives a gradient to a generator:
a model that learns from its judge is no longer measured by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusionact.errors import SettingsError
from diffusionact.training.models.face_reader import (
    LANDMARKS,
    NOT_A_READER,
    Eye,
    Residual,
    conv_norm,
    doubled,
    read_eyes,
    read_file,
    refused,
    save_reader,
    shape_of,
    soft_argmax,
)


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
        self.stem = nn.Sequential(conv_norm(12, c1 // 2), conv_norm(c1 // 2, c1, stride=2))
        self.quarter = nn.Sequential(Residual(c1), Residual(c1))
        self.eighth = nn.Sequential(conv_norm(c1, c2, stride=2), Residual(c2))
        self.sixteenth = nn.Sequential(conv_norm(c2, c3, stride=2), Residual(c3))
        self.lateral = nn.ModuleList(nn.Conv2d(c, c1, 1) for c in config.channels)
        self.heat = nn.Sequential(conv_norm(c1, c1), nn.Conv2d(c1, LANDMARKS, 1))
        self.eye = Eye(config.eye_channels)
        self.pose = nn.Sequential(
            nn.Linear(c3 + 2 * LANDMARKS, 96), nn.ReLU(), nn.Linear(96, 3)
        )  # fmt: skip

    def forward(self, image: Tensor, eye_shift_px: Tensor | None = None) -> Prediction:
        """What N pictures show.

        image: float32 [N,3,S,S], [-1,1], RGB
        eye_shift_px: float32 [N,2,2], moves the windows of the eyes (training only)
        """
        quarter, eighth, sixteenth = self.features(image)
        up = doubled(self.lateral[2](sixteenth)) + self.lateral[1](eighth)
        up = F.relu(doubled(up) + self.lateral[0](quarter))
        coarse = self._to_px(soft_argmax(self.heat(up)))
        sizes = self.config
        points, gaze = read_eyes(
            self.eye, image, coarse, sizes.eye_px, sizes.eye_cells, eye_shift_px
        )
        features = torch.cat([sixteenth.mean((2, 3)).float(), shape_of(points.detach())], dim=1)
        return Prediction(coarse, points, gaze, 30 * self.pose(features).float())

    def features(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The maps [N,C,S/4,S/4], [N,C,S/8,S/8] and [N,C,S/16,S/16] of pictures
        [N,3,S,S]."""
        quarter = self.quarter(self.stem(F.pixel_unshuffle(image, 2)))
        eighth = self.eighth(quarter)
        return quarter, eighth, self.sixteenth(eighth)

    def _to_px(self, place: Tensor) -> Tensor:
        return place * self.config.image_size - 0.5

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


def save_judge(path: str | Path, judge: Judge, notes: dict[str, Any]) -> None:
    """Writes a judge's weights in half precision, with its sizes and notes on its training."""
    save_reader(path, judge, judge.config, notes)


def load_judge(path: str | Path) -> tuple[Judge, dict[str, Any]]:
    """A judge ready to read, and the notes on its training.

    Raises: SettingsError when the file is missing or is no judge.
    """
    try:
        weights, sizes, notes = read_file(path)
        judge = Judge(JudgeConfig(**sizes))
        judge.load_state_dict(weights)
    except NOT_A_READER as error:
        command = "`python -m diffusionact.training.judges training/recipes/judge128.toml`"
        raise refused(path, "judge", f"train one with {command}", error) from error
    return judge.eval(), notes
