"""VGG-19's convolutions, whose maps say how alike two pictures look.

Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", 2015, configuration E; names as in torchvision's vgg19-dcbb9e9d.pth. The maps are
those of Johnson et al., "Perceptual Losses for Real-Time Style Transfer and Super-Resolution",
2016, moved to the first convolution of each block, as reenactment uses them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from diffusionact.training.models.frozen.network import FrozenNetwork

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = (2, 2, 4, 4, 1)  # of each block; the last block has three more, behind its map
BEHIND = ("features.30.", "features.32.", "features.34.")


class VGG19(FrozenNetwork):
    """Five maps of a picture, at 1, 1/2, 1/4, 1/8 and 1/16 of its side.

    Args:
        widths: channels of the five blocks.
    """

    NAME = "vgg19"
    INPUT = (1, 3, 224, 224)
    OUTPUTS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.features = nn.ModuleDict()
        c_in, place = 3, 0  # a place for each convolution, each ReLU and each pooling
        for width, count in zip(self.widths, CONVOLUTIONS, strict=True):
            for _ in range(count):
                self.features[str(place)] = nn.Conv2d(c_in, width, 3, padding=1)
                c_in, place = width, place + 2
            place += 1

    def config(self) -> dict[str, Any]:
        return {"widths": list(self.widths)}

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The five maps: [N,C,H,W] each.

        image: float32 [N,3,H,W], RGB, ImageNet-normalised; H and W at least 16
        """
        layers, maps, x = iter(self.features.values()), [], image
        for block, count in enumerate(CONVOLUTIONS):
            x = F.max_pool2d(x, 2) if block else x
            for i in range(count):
                x = F.relu(next(layers)(x))
                if i == 0:
                    maps.append(x)
        return tuple(maps)

    @classmethod
    def from_published(cls, state: Mapping[str, Any]) -> Self:
        """The network from torchvision's file; the classifier and what lies behind the last map
        are only counted.

        Raises: SettingsError: tensors are missing, unknown, of another shape or not finite.
        """
        return cls._load(state, {}, _spare)


def _spare(name: str) -> str | None:
    if name.startswith("classifier."):
        return "classifier of ImageNet"
    return "layers behind the last map" if name.startswith(BEHIND) else None
