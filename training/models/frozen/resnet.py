"""ResNet-50 without its classifier, the body of EMOCA's encoders and of the gaze network.

Source: He et al., "Deep Residual Learning for Image Recognition", 2016, with the stride in the
3x3 convolution; names as torchvision's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from diffusionact.training.models.frozen.network import FrozenNorm

FEATURES = 2048
EXPANSION = 4
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # width, blocks, stride of the first


class ResNet50(nn.Module):
    """2048 features of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = FrozenNorm(64)
        c_in = 64
        for i, (width, blocks, stride) in enumerate(STAGES):
            c_out = EXPANSION * width
            first = Bottleneck(c_in, width, stride)
            rest = (Bottleneck(c_out, width, 1) for _ in range(blocks - 1))
            self.add_module(f"layer{i + 1}", nn.Sequential(first, *rest))
            c_in = c_out

    def forward(self, image: Tensor) -> Tensor:
        """The mean over the last map: [N,2048]; at 224 px it is the published 7x7 pooling.

        image: float32 [N,3,H,W], as the network around it says
        """
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(image))), 3, stride=2, padding=1)
        for i in range(len(STAGES)):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return x.mean((2, 3))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a way around them."""

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        c_out = EXPANSION * width
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = FrozenNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = FrozenNorm(width)
        self.conv3 = nn.Conv2d(width, c_out, 1, bias=False)
        self.bn3 = FrozenNorm(c_out)
        self.downsample: nn.Module = nn.Identity()
        if c_in != c_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False), FrozenNorm(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.bn3(self.conv3(h)) + self.downsample(x))
