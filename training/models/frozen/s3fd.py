"""S3FD, the face detector: a VGG-16 with heads at six strides.

Source: Zhang et al., "S3FD: Single Shot Scale-invariant Face Detector", 2017; names as in
s3fd-619a316812.pth.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusionact.training.models.frozen.network import FrozenNetwork

STRIDES = (4, 8, 16, 32, 64, 128)  # px between the cells of each head's map
L2_EPS = 1e-10
# layer -> channels in and out; a pooling ends each block of the VGG
BLOCKS = (
    {"conv1_1": (3, 64), "conv1_2": (64, 64)},
    {"conv2_1": (64, 128), "conv2_2": (128, 128)},
    {"conv3_1": (128, 256), "conv3_2": (256, 256), "conv3_3": (256, 256)},
    {"conv4_1": (256, 512), "conv4_2": (512, 512), "conv4_3": (512, 512)},
    {"conv5_1": (512, 512), "conv5_2": (512, 512), "conv5_3": (512, 512)},
)
# head -> channels of its feature map, channels of its logits
HEADS = {
    "conv3_3_norm": (256, 4),
    "conv4_3_norm": (512, 2),
    "conv5_3_norm": (512, 2),
    "fc7": (1024, 2),
    "conv6_2": (512, 2),
    "conv7_2": (256, 2),
}


class S3FD(FrozenNetwork):
    """Face logits and box offsets of every cell of six maps."""

    NAME = "s3fd"
    INPUT = (1, 3, 256, 256)
    OUTPUTS = tuple(f"{kind}_{i}" for kind in ("box_logits", "offsets") for i in range(6))

    def __init__(self) -> None:
        super().__init__()
        for block in BLOCKS:
            for name, (c_in, c_out) in block.items():
                self.add_module(name, nn.Conv2d(c_in, c_out, 3, padding=1))
        self.fc6 = nn.Conv2d(512, 1024, 3, padding=3)
        self.fc7 = nn.Conv2d(1024, 1024, 1)
        self.conv6_1 = nn.Conv2d(1024, 256, 1)
        self.conv6_2 = nn.Conv2d(256, 512, 3, stride=2, padding=1)
        self.conv7_1 = nn.Conv2d(512, 128, 1)
        self.conv7_2 = nn.Conv2d(128, 256, 3, stride=2, padding=1)
        for name, (channels, classes) in HEADS.items():
            if name.endswith("_norm"):
                self.add_module(name, L2Norm(channels))
            self.add_module(f"{name}_mbox_conf", nn.Conv2d(channels, classes, 3, padding=1))
            self.add_module(f"{name}_mbox_loc", nn.Conv2d(channels, 4, 3, padding=1))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Six logit maps [N,2,h,w] (background, face), then six offset maps [N,4,h,w].

        image: float32 [N,3,H,W], RGB, 0..255 (the published pipeline subtracts no mean)
        """
        logits, offsets = [], []
        for name, feature in zip(HEADS, self._features(image), strict=True):
            found = self._layer(f"{name}_mbox_conf", feature)
            if found.shape[1] > 2:  # three kinds of background: the likeliest stands for all
                found = torch.cat([found[:, :-1].amax(1, keepdim=True), found[:, -1:]], dim=1)
            logits.append(found)
            offsets.append(self._layer(f"{name}_mbox_loc", feature))
        return (*logits, *offsets)

    def _features(self, image: Tensor) -> list[Tensor]:
        """The six feature maps, the first three normalised."""
        h, features = image, []
        for block in BLOCKS:
            for name in block:
                h = F.relu(self._layer(name, h))
            if f"{name}_norm" in HEADS:
                features.append(self._layer(f"{name}_norm", h))
            h = F.max_pool2d(h, 2)
        for name in ("fc6", "fc7", "conv6_1", "conv6_2", "conv7_1", "conv7_2"):
            h = F.relu(self._layer(name, h))
            if name in HEADS:
                features.append(h)
        return features

    def _layer(self, name: str, x: Tensor) -> Tensor:
        result: Tensor = self.get_submodule(name)(x)
        return result


class L2Norm(nn.Module):
    """Every cell's channels scaled to length 1, then by a weight per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        length = x.square().sum(1, keepdim=True).sqrt() + L2_EPS
        return x / length * self.weight[:, None, None]
