"""The guide: one small network that tells a generator how far its face is from the one wanted.

It reads features, identity, landmarks, gaze and pose off a rendered face, and every reading has a
gradient towards the picture. It is not the judge: other architecture, widths, seed and training
run, so that a model that learned from its guide can still be measured by the judge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusionact.training.models.face_reader import (
    LANDMARKS,
    NOT_A_READER,
    Eye,
    Residual,
    conv_norm,
    doubled,
    fold_norms,
    read_eyes,
    read_file,
    refused,
    save_reader,
    shape_of,
    soft_argmax,
)

PLACE_CHANNELS = 32  # of the map that identity is read from, which keeps where things are
IDENTITY_CELLS = 4  # side of that map
POSE_UNIT_DEG = 20.0
GAZE_UNIT_RAD = math.radians(20)
FLAT = 1e-3  # a channel that varies less on rendered faces is not blown up


@dataclass(frozen=True)
class GuideConfig:
    """The sizes of a guide. Its grids have S/b, S/2b, S/4b and S/8b cells, b the block size."""

    image_size: int = 128
    block_size: int = 2
    channels: tuple[int, int, int, int] = (20, 40, 80, 112)
    eye_channels: tuple[int, int] = (12, 24)
    eye_px: float = 26.0  # side of the window cut out around an eye, pixels of the picture
    eye_cells: int = 24  # samples along that side
    embed: int = 128  # length of the identity


class Seen(NamedTuple):
    """What the guide reads off N pictures. S is their side, C and G a map's channels and grid."""

    maps: tuple[Tensor, ...]  # [N,C,G,G], finest first, as the convolutions give them
    coarse: Tensor  # [N,68,2] px, every landmark as the whole picture shows it
    points: Tensor  # [N,68,2] px, the eyes' landmarks taken from their own windows
    irises: Tensor  # [N,2,2] px
    gaze: Tensor  # [N,2] yaw, pitch of the eyes in the head, radians
    pose: Tensor  # [N,3] yaw, pitch, roll, degrees
    person: Tensor  # [N,E] what identity is the direction of


class Guide(nn.Module):
    """A pyramid of four grids; points by soft-argmax of heat maps on the second."""

    def __init__(self, config: GuideConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GuideConfig()
        c0, c1, c2, c3 = config.channels
        self.levels = nn.ModuleList([
            conv_norm(3 * config.block_size**2, c0),
            nn.Sequential(conv_norm(c0, c1, stride=2), Residual(c1)),
            nn.Sequential(conv_norm(c1, c2, stride=2), Residual(c2)),
            nn.Sequential(conv_norm(c2, c3, stride=2), Residual(c3)),
        ])  # fmt: skip
        self.lateral = nn.ModuleList(nn.Conv2d(c, c1, 1) for c in (c1, c2, c3))
        self.heat = nn.Sequential(conv_norm(c1, c1), nn.Conv2d(c1, LANDMARKS, 1))
        self.eye = Eye(config.eye_channels)
        self.pose_of = _two_layers(c3 + 2 * LANDMARKS, 64, 3)
        self.gaze_of = _two_layers(2 * LANDMARKS + 4 + 3, 64, 2)
        self.place = nn.Conv2d(c3, PLACE_CHANNELS, 1)
        self.person_of = nn.Linear(PLACE_CHANNELS * IDENTITY_CELLS**2 + c3, config.embed)
        total = sum(config.channels)
        self.register_buffer("gain", torch.ones(total))
        self.register_buffer("style_mean", torch.zeros(2 * total))
        self.register_buffer("style_gain", torch.ones(2 * total))
        self.gain: Tensor
        self.style_mean: Tensor
        self.style_gain: Tensor

    # What critics ask; each computes only what it needs, `forward` everything at once.

    def features(self, image: Tensor) -> list[Tensor]:
        """Maps [N,C,G,G], finest first, each channel of root mean square 1 over rendered faces."""
        return self.scaled(self._maps(image))

    def identity(self, image: Tensor) -> Tensor:
        """Who it is, whatever the pose, expression and room: [N,E] of unit length."""
        return F.normalize(self._person(self._maps(image)[3]), dim=1)

    def style(self, image: Tensor) -> Tensor:
        """How it looks, wherever things are: [N,2C] of unit length, the mean and deviation of
        every channel of all maps, standardised over rendered faces."""
        return self.style_of(self._maps(image))

    def landmarks(self, image: Tensor) -> Tensor:
        """The 68 landmarks [N,68,2], px."""
        return self._points(image, self._maps(image))[1]

    def gaze(self, image: Tensor) -> Tensor:
        """Where the eyes look in the head, [N,2] yaw and pitch in radians."""
        return self(image).gaze  # type: ignore[no-any-return]

    def head_pose(self, image: Tensor) -> Tensor:
        """Yaw, pitch and roll of the head [N,3], degrees."""
        maps = self._maps(image)
        return self._pose(maps[3], self._points(image, maps)[1])

    def forward(self, image: Tensor, eye_shift_px: Tensor | None = None) -> Seen:
        """All that N pictures show.

        image: float32 [N,3,S,S], [-1,1], RGB
        eye_shift_px: float32 [N,2,2], moves the windows of the eyes (training only)
        """
        maps = self._maps(image)
        coarse, points, irises = self._points(image, maps, eye_shift_px)
        pose = self._pose(maps[3], points)
        gaze = self._gaze(points, irises, pose)
        return Seen(maps, coarse, points, irises, gaze, pose, self._person(maps[3]))

    def scaled(self, maps: tuple[Tensor, ...]) -> list[Tensor]:
        """The maps with each channel brought to root mean square 1 over rendered faces."""
        gains = torch.split(self.gain, list(self.config.channels))
        return [m.float() * g[:, None, None] for m, g in zip(maps, gains, strict=True)]

    def style_of(self, maps: tuple[Tensor, ...]) -> Tensor:
        """The style [N,2C] of the maps that `forward` gives."""
        rows = (self._statistics(maps) - self.style_mean) * self.style_gain
        return F.normalize(rows, dim=1)

    @torch.no_grad()
    def calibrate(self, image: Tensor) -> None:
        """Nothing; sets the scale of features and style by rendered faces [N,3,S,S]."""
        self.eval()
        maps = self._maps(image)
        self.gain.copy_(torch.cat([_gain(m.float().square().mean((0, 2, 3))) for m in maps]))
        rows = self._statistics(maps)
        self.style_mean.copy_(rows.mean(0))
        self.style_gain.copy_(_gain(rows.var(0)))

    def _maps(self, image: Tensor) -> tuple[Tensor, ...]:
        x, maps = F.pixel_unshuffle(image, self.config.block_size), []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return tuple(maps)

    def _points(
        self, image: Tensor, maps: tuple[Tensor, ...], eye_shift_px: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Coarse landmarks, landmarks and irises, px."""
        _, fine, middle, deep = maps
        up = doubled(self.lateral[2](deep)) + self.lateral[1](middle)
        up = F.relu(doubled(up) + self.lateral[0](fine))
        sizes = self.config
        coarse = soft_argmax(self.heat(up)) * sizes.image_size - 0.5
        points, irises = read_eyes(
            self.eye, image, coarse, sizes.eye_px, sizes.eye_cells, eye_shift_px
        )
        return coarse, points, irises

    def _pose(self, deep: Tensor, points: Tensor) -> Tensor:
        rows = torch.cat([deep.mean((2, 3)).float(), shape_of(points)], dim=1)
        return POSE_UNIT_DEG * _exact(self.pose_of, rows)

    def _gaze(self, points: Tensor, irises: Tensor, pose: Tensor) -> Tensor:
        """From where the irises lie in the eyes, seen through the shape and pose of the face."""
        centres = torch.stack([points[:, 36:42].mean(1), points[:, 42:48].mean(1)], dim=1)
        offsets = (irises - centres).flatten(1) / (self.config.eye_px / 8)
        rows = torch.cat([shape_of(points), offsets, pose / POSE_UNIT_DEG], dim=1)
        return GAZE_UNIT_RAD * _exact(self.gaze_of, rows)

    def _person(self, deep: Tensor) -> Tensor:
        place = F.adaptive_avg_pool2d(self.place(deep), IDENTITY_CELLS).flatten(1)
        rows = torch.cat([place, deep.mean((2, 3))], dim=1)
        return self.person_of(rows).float()  # type: ignore[no-any-return]

    def _statistics(self, maps: tuple[Tensor, ...]) -> Tensor:
        values = [m.float() for m in maps]
        means = [m.mean((2, 3)) for m in values]
        deviations = [(m.var((2, 3)) + FLAT**2).sqrt() for m in values]
        return torch.cat([*means, *deviations], dim=1)


def _two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def _exact(layers: nn.Sequential, rows: Tensor) -> Tensor:
    """layers(rows) in float32: coordinates rounded to bfloat16 lose a tenth of a pixel."""
    with torch.autocast(rows.device.type, enabled=False):
        return layers(rows.float())  # type: ignore[no-any-return]


def _gain(square: Tensor) -> Tensor:
    return 1 / square.sqrt().clamp_min(FLAT)


def save_guide(path: str | Path, guide: Guide, notes: dict[str, Any]) -> None:
    """Nothing; writes a guide's weights in half precision, with its sizes and notes."""
    save_reader(path, guide, guide.config, notes)


def load_guide(path: str | Path) -> Guide:
    """A frozen guide: in evaluation, norms folded into the weights, no gradient into itself.

    Raises: SettingsError when the file is missing or is no guide.
    """
    guide = open_guide(path)[0]
    fold_norms(guide)
    return guide.requires_grad_(False)


def open_guide(path: str | Path) -> tuple[Guide, dict[str, Any]]:
    """A guide as it was trained, and the notes on its training.

    Raises: SettingsError when the file is missing or is no guide.
    """
    try:
        weights, sizes, notes = read_file(path)
        guide = Guide(GuideConfig(**sizes))
        guide.load_state_dict(weights)
    except NOT_A_READER as error:
        command = "`python -m diffusionact.training.guides training/recipes/guide128.toml`"
        raise refused(path, "guide", f"train one with {command}", error) from error
    return guide.eval(), notes
