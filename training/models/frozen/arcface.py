"""ArcFace, the face recogniser: a ResNet of 50 layers with squeeze-and-excitation.

Source: Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", 2019, with
the blocks of Hu et al., "Squeeze-and-Excitation Networks", 2018; names as in model_ir_se50.pth,
the file that reenactment and face editing take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from diffusionact.training.models.frozen.network import FrozenNetwork, FrozenNorm

WIDTHS = (64, 128, 256, 512)
BLOCKS = (3, 4, 14, 3)
SQUEEZE = 16  # channels to one inside squeeze-and-excitation
SIDE = 112
EMBEDDING = 512


class ArcFace(FrozenNetwork):
    """Who a face is, as a direction.

    Args:
        widths, blocks: channels and blocks of the four stages, each of which halves the side.
        side: of the picture, px, a multiple of 16.
    """

    NAME = "arcface"
    INPUT = (1, 3, SIDE, SIDE)
    OUTPUTS = ("embedding",)

    def __init__(
        self,
        widths: Sequence[int] = WIDTHS,
        blocks: Sequence[int] = BLOCKS,
        side: int = SIDE,
        embedding: int = EMBEDDING,
    ) -> None:
        super().__init__()
        self.sizes = {"widths": list(widths), "blocks": list(blocks)}
        self.side, self.embedding = side, embedding
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, padding=1, bias=False),
            FrozenNorm(widths[0]),
            nn.PReLU(widths[0]),
        )
        body: list[nn.Module] = []
        c_in = widths[0]
        for width, count in zip(widths, blocks, strict=True):
            for i in range(count):
                body.append(Block(c_in, width, stride=1 if i else 2))
                c_in = width
        self.body = nn.Sequential(*body)
        cells = (side // 2 ** len(blocks)) ** 2
        self.output_layer = nn.Sequential(
            FrozenNorm(c_in),
            nn.Identity(),  # drop-out, in training
            nn.Flatten(),
            nn.Linear(c_in * cells, embedding),
            FrozenNorm(embedding),
        )

    def config(self) -> dict[str, Any]:
        return {**self.sizes, "side": self.side, "embedding": self.embedding}

    def forward(self, image: Tensor) -> Tensor:
        """The embedding, of length 1: [N,E].

        image: float32 [N,3,side,side], RGB, -1..1, the face aligned to the five points of
            `critic_inputs.TEMPLATE`
        """
        embedding: Tensor = self.output_layer(self.body(self.input_layer(image)))
        return F.normalize(embedding, dim=1)


class Block(nn.Module):
    """Norm, two 3x3 convolutions and squeeze-and-excitation, added to a way around them."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.shortcut_layer: nn.Module = nn.Identity()
        if c_in != c_out:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False), FrozenNorm(c_out)
            )
        self.res_layer = nn.Sequential(
            FrozenNorm(c_in),
            nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
            nn.PReLU(c_out),
            nn.Conv2d(c_out, c_out, 3, stride=stride, padding=1, bias=False),
            FrozenNorm(c_out),
            SqueezeExcite(c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        around: Tensor = self.shortcut_layer(x)
        if isinstance(self.shortcut_layer, nn.Identity):
            around = around[..., :: self.stride, :: self.stride]
        return self.res_layer(x) + around  # type: ignore[no-any-return]


class SqueezeExcite(nn.Module):
    """Each channel scaled by a share, 0..1, that the means of all channels decide.

    Source: Hu et al., Eq. 2-4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // SQUEEZE, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // SQUEEZE, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        logits: Tensor = self.fc2(F.relu(self.fc1(means)))
        return x * logits.sigmoid()
