"""BiSeNet for faces: which of 19 parts each pixel shows.

Source: Yu et al., "BiSeNet: Bilateral Segmentation Network for Real-time Semantic Segmentation",
2018, with a ResNet-18 whose map at 1/8 stands in for the spatial path; names as in
79999_iter.pth, trained on CelebAMask-HQ. (The paper cites BiSeNetV2, of which no weights for
faces are published; these are the ones that face editing takes.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from diffusionact.training.models.frozen.network import FrozenNetwork, FrozenNorm, batch_counter

CLASSES = 19
BACKGROUND = 0  # class; 1-13 parts of the face, 14 neck, 15 necklace, 16 cloth, 17 hair, 18 hat
SIDE = 512


class BiSeNet(FrozenNetwork):
    """Logits of the parts of a face.

    Args:
        width: channels behind the first convolution; the published network's is 64.
    """

    NAME = "bisenet"
    INPUT = (1, 3, SIDE, SIDE)
    OUTPUTS = ("logits",)

    def __init__(self, width: int = 64, classes: int = CLASSES) -> None:
        super().__init__()
        self.width, self.classes = width, classes
        self.cp = Context(width)
        self.ffm = Fusion(4 * width)
        self.conv_out = Output(4 * width, 4 * width, classes)

    def config(self) -> dict[str, Any]:
        return {"width": self.width, "classes": self.classes}

    def forward(self, image: Tensor) -> Tensor:
        """The logits: [N,classes,H,W].

        image: float32 [N,3,H,W], RGB, ImageNet-normalised; the network was trained at 512 px
        """
        eighth, context = self.cp(image)
        logits = self.conv_out(self.ffm(torch.cat([eighth, context], dim=1)))
        return F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=True)

    @classmethod
    def from_published(cls, state: Mapping[str, Any]) -> Self:
        """The network from the published file; the outputs that only training used are counted.

        Raises: SettingsError: tensors are missing, unknown, of another shape or not finite.
        """
        return cls._load(state, {}, _spare)


class Context(nn.Module):
    """A ResNet-18 and the way back up from its last map to 1/8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        out = 2 * width
        self.resnet = ResNet18(width)
        self.arm16 = Refinement(4 * width, out)
        self.arm32 = Refinement(8 * width, out)
        self.conv_head32 = ConvNorm(out, out, 3)
        self.conv_head16 = ConvNorm(out, out, 3)
        self.conv_avg = ConvNorm(8 * width, out, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        eighth, sixteenth, last = self.resnet(image)
        whole = self.conv_avg(last.mean((2, 3), keepdim=True))
        up = F.interpolate(self.arm32(last) + whole, sixteenth.shape[2:], mode="nearest")
        up = self.arm16(sixteenth) + self.conv_head32(up)
        up = F.interpolate(up, eighth.shape[2:], mode="nearest")
        return eighth, self.conv_head16(up)


class ResNet18(nn.Module):
    """The maps at 1/8, 1/16 and 1/32 of a picture; names as torchvision's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = FrozenNorm(width)
        c_in = width
        for i in range(4):
            c_out = width * 2**i
            first = Basic(c_in, c_out, stride=2 if i else 1)
            self.add_module(f"layer{i + 1}", nn.Sequential(first, Basic(c_out, c_out, 1)))
            c_in = c_out

    def forward(self, image: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(image))), 3, stride=2, padding=1)
        maps = []
        for i in range(4):
            x = self.get_submodule(f"layer{i + 1}")(x)
            maps.append(x)
        return maps[1:]


class Basic(nn.Module):
    """Two 3x3 convolutions and a way around them."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = FrozenNorm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = FrozenNorm(c_out)
        self.downsample: nn.Module = nn.Identity()
        if c_in != c_out or stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False), FrozenNorm(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.downsample(x))


class ConvNorm(nn.Module):
    """Convolution, norm, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
        self.bn = FrozenNorm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Refinement(nn.Module):
    """A map whose channels are scaled by a share that their means decide."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = ConvNorm(c_in, c_out, 3)
        self.conv_atten = nn.Conv2d(c_out, c_out, 1, bias=False)
        self.bn_atten = FrozenNorm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv(x)
        share: Tensor = self.bn_atten(self.conv_atten(h.mean((2, 3), keepdim=True)))
        return h * share.sigmoid()


class Fusion(nn.Module):
    """Two maps mixed, and as much of the mixture added again as the channels' means say."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convblk = ConvNorm(channels, channels, 1)
        self.conv1 = nn.Conv2d(channels, channels // 4, 1, bias=False)
        self.conv2 = nn.Conv2d(channels // 4, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.convblk(x)
        share: Tensor = self.conv2(F.relu(self.conv1(h.mean((2, 3), keepdim=True))))
        return h + h * share.sigmoid()


class Output(nn.Module):
    """A 3x3 convolution, then the logits."""

    def __init__(self, c_in: int, middle: int, classes: int) -> None:
        super().__init__()
        self.conv = ConvNorm(c_in, middle, 3)
        self.conv_out = nn.Conv2d(middle, classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.conv_out(self.conv(x))
        return logits


def _spare(name: str) -> str | None:
    if name.startswith(("conv_out16.", "conv_out32.")):
        return "outputs for training"
    return batch_counter(name)
