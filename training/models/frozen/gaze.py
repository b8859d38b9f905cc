"""ETH-XGaze's gaze network: a ResNet-50 and one linear layer.

Source: Zhang et al., "ETH-XGaze: A Large Scale Dataset for Gaze Estimation under Extreme Head
Pose and Gaze Variation", 2020; names as in the `model_state` of its checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from diffusionact.training.models.frozen.network import FrozenNetwork, batch_counter
from diffusionact.training.models.frozen.resnet import FEATURES, ResNet50


class Gaze(FrozenNetwork):
    """Where a face looks."""

    NAME = "gaze"
    INPUT = (1, 3, 224, 224)
    OUTPUTS = ("pitch_yaw",)

    def __init__(self) -> None:
        super().__init__()
        self.gaze_network = ResNet50()
        self.gaze_fc = nn.Sequential(nn.Linear(FEATURES, 2))

    def forward(self, image: Tensor) -> Tensor:
        """Pitch and yaw: [N,2], radians.

        image: float32 [N,3,224,224], RGB, ImageNet-normalised
        """
        angles: Tensor = self.gaze_fc(self.gaze_network(image))
        return angles

    @classmethod
    def from_published(cls, state: Mapping[str, Any]) -> Self:
        """The network from `model_state`; the ResNet's own classifier in it is left out.

        Raises: SettingsError: tensors are missing, unknown, of another shape or not finite.
        """
        return cls._load(state, {}, _spare)


def _spare(name: str) -> str | None:
    return "unused ImageNet classifier" if ".fc." in name else batch_counter(name)
