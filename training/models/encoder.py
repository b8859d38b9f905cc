"""The encoders that turn an image, or an image and a drawing of landmarks, into z."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from diffusionact.training.models.blocks import (
    Attention,
    EncoderBlock,
    GroupNorm,
    conv3x3,
    position_map,
    zeroed,
)
from diffusionact.training.models.config import NetworkConfig


class SemanticEncoder(nn.Module):
    """Image -> semantic code z.

    Source: DiffAE, section 3.2, and the parameter names of its code.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.input_blocks, width = _input_blocks(config)
        side = config.grid // 2 ** (len(config.encoder_mult) - 1)
        if config.positions:
            self.position_stem = position_map(config.channels * config.encoder_mult[0], config.grid)
            self.position_middle = position_map(width, side)
        self.middle_block = nn.Sequential(
            EncoderBlock(width, width), Attention(width), EncoderBlock(width, width)
        )
        flat = config.code_pool == "flat"
        self.out = nn.Sequential(
            GroupNorm(width),
            nn.SiLU(),
            nn.Identity() if flat else nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, config.embed, side if flat else 1),
            nn.Flatten(),
        )

    def forward(self, image: Tensor) -> Tensor:
        """z [N,E] of image [N,3,S,S], RGB in [-1,1]."""
        block = self.config.block_size
        h = F.pixel_unshuffle(image, block) if block > 1 else image
        h = self.input_blocks[0](h)
        if self.config.positions:
            h = h + self.position_stem.to(h.dtype)
        for stage in self.input_blocks[1:]:
            h = stage(h)
        if self.config.positions:
            h = h + self.position_middle.to(h.dtype)
        return cast(Tensor, self.out(self.middle_block(h)))


class ReenactmentEncoder(nn.Module):
    """Source image and target landmarks -> semantic code z.

    Source: DiffusionAct, section 3.2: a zero-initialised 1x1 convolution of the drawing is added to
    the source image, and a copy of the semantic encoder reads the sum.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.controlnet = SemanticEncoder(config)
        self.zero_conv_1 = zeroed(nn.Conv2d(3, 3, 1))

    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        """z [N,E] of image and condition, each [N,3,S,S], RGB in [-1,1]."""
        return cast(Tensor, self.controlnet(image + self.zero_conv_1(condition)))


def _input_blocks(config: NetworkConfig) -> tuple[nn.ModuleList, int]:
    """The downward stages and the width of the last."""
    width = config.channels * config.encoder_mult[0]
    side = config.grid
    stages = [nn.Sequential(conv3x3(config.image_channels, width))]
    for level, mult in enumerate(config.encoder_mult):
        for _ in range(config.res_blocks):
            layers: list[nn.Module] = [EncoderBlock(width, config.channels * mult)]
            width = config.channels * mult
            if side in config.attention_at:
                layers.append(Attention(width))
            stages.append(nn.Sequential(*layers))
        if level < len(config.encoder_mult) - 1:
            stages.append(nn.Sequential(EncoderBlock(width, width, "down")))
            side //= 2
    return nn.ModuleList(stages), width
