"""The conditional U-Net: one forward pass split into time, modulation and step."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusionact.training.models.blocks import (
    Attention,
    CodeMap,
    GroupNorm,
    KeypointMap,
    ResBlock,
    TimeEmbed,
    conv3x3,
    position_map,
    zeroed,
)
from diffusionact.training.models.config import NetworkConfig


class UNet(nn.Module):
    """Predicts eps, v or x0 (see `config.prediction`) from a noisy image, its timestep and z.

    The modulation of all ResBlocks is kept apart from the convolutions, because it depends on
    neither x nor, in its larger part, on z: `time_rows` once for each timestep, `modulation` once
    for each frame, `step` once for each frame and timestep.

    Source: DiffAE code, the network of `ffhq256_autoenc`, and its parameter names.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.time_embed = TimeEmbed(config.channels, config.embed)
        self.input_blocks, lateral_widths, side = _input_blocks(config)
        middle = lateral_widths[-1]
        self.middle_block = nn.Sequential(
            _res_block(config, middle, middle),
            Attention(middle),
            _res_block(config, middle, middle),
        )
        self.output_blocks = _output_blocks(config, lateral_widths, side)
        first = config.channels * config.channel_mult[0]
        self.out = nn.Sequential(
            GroupNorm(first), nn.SiLU(), zeroed(conv3x3(first, config.image_channels))
        )
        if config.positions:
            self.position_stem = position_map(first, config.grid)
            self.position_middle = position_map(middle, side)
        stages = [*self.input_blocks, self.middle_block, *self.output_blocks]
        # in the order of execution, which is that of the modulation rows
        self.modulated: list[ResBlock | CodeMap | KeypointMap] = [
            m for stage in stages for m in stage if isinstance(m, ResBlock)
        ]
        if config.code_channels:
            self.code_map = CodeMap(config.code_channels, middle, side, config.embed)
            self.modulated.append(self.code_map)
        if config.keypoints:
            self.keypoint_map = KeypointMap(config.keypoints, first, config.grid, config.embed)
            self.modulated.append(self.keypoint_map)
        self._widths = [block.width for block in self.modulated]

    @property
    def modulation_size(self) -> int:
        """K, the channels of all modulated ResBlocks together, and the values of z's maps."""
        return sum(self._widths)

    def time_rows(self, t: Tensor) -> Tensor:
        """The part of the modulation that depends on time: float32 [N,2K], scales then shifts.

        Args:
            t: float32 or int64 [N], timestep in 0..999.
        """
        e = self.time_embed(t)
        rows = [block.time_row(e) for block in self.modulated]
        return torch.cat([scale for scale, _ in rows] + [shift for _, shift in rows], dim=1)

    def modulation(self, z: Tensor, time_rows: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, shift), each float32 [N,K], that replace norm's affine part in every ResBlock.

        With n the normalised feature, (g n + b)(1 + s_t) + b_t, all times (1 + s_z), is
        n * scale + shift.

        Args:
            z: float32 [N,E] or [1,E], semantic code.
            time_rows: float32 [N,2K] of `time_rows`.

        Source: DiffAE, Eq. 6.
        """
        factor = torch.cat([block.code_row(z) for block in self.modulated], dim=1)
        scale, shift = time_rows.chunk(2, dim=1)
        return scale * factor, shift * factor

    def step(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The prediction [N,3,S,S] for the noisy image x [N,3,S,S] under modulation rows [N,K]."""
        rows = torch.split_with_sizes(scale, self._widths, dim=1)
        scales = iter(rows)
        shifts = iter(torch.split_with_sizes(shift, self._widths, dim=1))

        def run(stage: nn.Module, h: Tensor) -> Tensor:
            for layer in cast(nn.Sequential, stage):
                if isinstance(layer, ResBlock):
                    h = layer(h, next(scales), next(shifts))
                else:
                    h = layer(h)
            return h

        block = self.config.block_size
        h = run(self.input_blocks[0], F.pixel_unshuffle(x, block) if block > 1 else x)
        if self.config.positions:
            h = h + self.position_stem.to(h.dtype)
        if self.config.keypoints:
            h = self.keypoint_map(h, rows[-1])
        laterals = [h]
        for stage in self.input_blocks[1:]:
            h = run(stage, h)
            laterals.append(h)
        if self.config.positions:
            h = h + self.position_middle.to(h.dtype)
        if self.config.code_channels:
            h = self.code_map(h, rows[-2 if self.config.keypoints else -1])
        h = run(self.middle_block, h)
        for stage in self.output_blocks:
            h = run(stage, torch.cat([h, laterals.pop()], dim=1))
        h = self.out(h)
        return F.pixel_shuffle(h, block) if block > 1 else h

    def forward(self, x: Tensor, t: Tensor, z: Tensor, keypoints: Tensor | None = None) -> Tensor:
        """The prediction [N,3,S,S] for noisy images x [N,3,S,S], timesteps t [N] and z [N,E];
        `keypoints` [N,P,2] px, if given, stand in for those that z places."""
        scale, shift = self.modulation(z, self.time_rows(t))
        if keypoints is not None:
            placed = keypoints.flatten(1) * (2 / self.config.image_size)
            scale = torch.cat([scale[:, : -placed.shape[1]], placed], dim=1)
        return self.step(x, scale, shift)

    def keypoints(self, z: Tensor) -> Tensor:
        """Where z [N,E] places its points: float32 [N,P,2], x and y in px."""
        rows = self.keypoint_map.code_row(z) * (self.config.image_size / 2)
        return rows.reshape(len(z), -1, 2)


def _res_block(config: NetworkConfig, cin: int, cout: int) -> ResBlock:
    return ResBlock(cin, cout, config.embed, config.dropout)


def _input_blocks(config: NetworkConfig) -> tuple[nn.ModuleList, list[int], int]:
    """The downward stages, their output widths, and the grid side at the bottom."""
    width = config.channels * config.channel_mult[0]
    side = config.grid
    stages = [nn.Sequential(conv3x3(config.image_channels, width))]
    widths = [width]
    for level, mult in enumerate(config.channel_mult):
        for _ in range(config.res_blocks):
            layers: list[nn.Module] = [_res_block(config, width, config.channels * mult)]
            width = config.channels * mult
            if side in config.attention_at:
                layers.append(Attention(width))
            stages.append(nn.Sequential(*layers))
            widths.append(width)
        if level < len(config.channel_mult) - 1:
            down = ResBlock(width, width, config.embed, config.dropout, "down")
            stages.append(nn.Sequential(down))
            widths.append(width)
            side //= 2
    return nn.ModuleList(stages), widths, side


def _output_blocks(config: NetworkConfig, lateral_widths: list[int], side: int) -> nn.ModuleList:
    """The upward stages; each takes the last lateral that is left."""
    laterals = list(lateral_widths)
    width = laterals[-1]
    stages = []
    for level in reversed(range(len(config.channel_mult))):
        for index in range(config.res_blocks + 1):
            cout = config.channels * config.channel_mult[level]
            layers: list[nn.Module] = [_res_block(config, width + laterals.pop(), cout)]
            width = cout
            if side in config.attention_at:
                layers.append(Attention(width))
            if level and index == config.res_blocks:
                layers.append(ResBlock(width, width, config.embed, config.dropout, "up"))
                side *= 2
            stages.append(nn.Sequential(*layers))
    return nn.ModuleList(stages)
