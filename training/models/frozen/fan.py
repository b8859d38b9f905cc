"""2DFAN-4, the landmark detector: four stacked hourglasses.

Source: Bulat and Tzimiropoulos, "How far are we from solving the 2D & 3D face alignment
problem?", 2017; names as in 2DFAN4-11f355bf06.pth.tar.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusionact.training.models.frozen.network import FrozenNetwork, FrozenNorm

LANDMARKS, STACKS, DEPTH, CHANNELS = 68, 4, 4, 256


class FAN(FrozenNetwork):
    """A heat map for each of the 68 landmarks."""

    NAME = "fan"
    INPUT = (1, 3, 256, 256)
    OUTPUTS = ("heatmaps",)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3)
        self.bn1 = FrozenNorm(64)
        self.conv2 = Block(64, 128)
        self.conv3 = Block(128, 128)
        self.conv4 = Block(128, CHANNELS)
        for i in range(STACKS):
            self.add_module(f"m{i}", Hourglass())
            self.add_module(f"top_m_{i}", Block(CHANNELS, CHANNELS))
            self.add_module(f"conv_last{i}", nn.Conv2d(CHANNELS, CHANNELS, 1))
            self.add_module(f"bn_end{i}", FrozenNorm(CHANNELS))
            self.add_module(f"l{i}", nn.Conv2d(CHANNELS, LANDMARKS, 1))
            if i < STACKS - 1:
                self.add_module(f"bl{i}", nn.Conv2d(CHANNELS, CHANNELS, 1))
                self.add_module(f"al{i}", nn.Conv2d(LANDMARKS, CHANNELS, 1))

    def forward(self, image: Tensor) -> Tensor:
        """The last stack's heat maps: [N,68,H/4,W/4].

        image: float32 [N,3,H,W], RGB, 0..1; H and W multiples of 64
        """
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.avg_pool2d(self.conv2(x), 2)
        x = self.conv4(self.conv3(x))
        for i in range(STACKS):
            features = self._layer(f"top_m_{i}", self._layer(f"m{i}", x))
            features = F.relu(self._layer(f"bn_end{i}", self._layer(f"conv_last{i}", features)))
            heatmaps = self._layer(f"l{i}", features)
            if i < STACKS - 1:
                x = x + self._layer(f"bl{i}", features) + self._layer(f"al{i}", heatmaps)
        return heatmaps

    def _layer(self, name: str, x: Tensor) -> Tensor:
        result: Tensor = self.get_submodule(name)(x)
        return result


class Hourglass(nn.Module):
    """Blocks at five scales, halved on the way in and doubled, by repetition, on the way out."""

    def __init__(self) -> None:
        super().__init__()
        for level in range(DEPTH, 0, -1):
            for branch in ("b1", "b2", "b3"):
                self.add_module(f"{branch}_{level}", Block(CHANNELS, CHANNELS))
        self.b2_plus_1 = Block(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self._level(DEPTH, x)

    def _level(self, level: int, x: Tensor) -> Tensor:
        low = self._block(f"b2_{level}", F.avg_pool2d(x, 2))
        low = self._level(level - 1, low) if level > 1 else self.b2_plus_1(low)
        low = self._block(f"b3_{level}", low)
        return self._block(f"b1_{level}", x) + F.interpolate(low, scale_factor=2.0, mode="nearest")

    def _block(self, name: str, x: Tensor) -> Tensor:
        result: Tensor = self.get_submodule(name)(x)
        return result


class Block(nn.Module):
    """Three convolutions in a row, their outputs side by side, and a way around them."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        half, quarter = c_out // 2, c_out // 4
        self.bn1 = FrozenNorm(c_in)
        self.conv1 = nn.Conv2d(c_in, half, 3, padding=1, bias=False)
        self.bn2 = FrozenNorm(half)
        self.conv2 = nn.Conv2d(half, quarter, 3, padding=1, bias=False)
        self.bn3 = FrozenNorm(quarter)
        self.conv3 = nn.Conv2d(quarter, quarter, 3, padding=1, bias=False)
        self.downsample: nn.Module = nn.Identity()
        if c_in != c_out:
            self.downsample = nn.Sequential(
                FrozenNorm(c_in), nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv1(F.relu(self.bn1(x)))
        second = self.conv2(F.relu(self.bn2(first)))
        third = self.conv3(F.relu(self.bn3(second)))
        around: Tensor = self.downsample(x)
        return torch.cat([first, second, third], dim=1) + around
