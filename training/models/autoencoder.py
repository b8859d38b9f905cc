"""The published autoencoder module: the U-Net with the semantic encoder inside."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from diffusionact.training.models.config import NetworkConfig
from diffusionact.training.models.encoder import SemanticEncoder
from diffusionact.training.models.unet import UNet


class Autoencoder(UNet):
    """The U-Net and, under the key prefix `encoder.`, the semantic encoder of its z.

    Source: DiffAE, Figure 2, and the parameter names of its code.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.encoder = SemanticEncoder(config)

    def encode(self, image: Tensor) -> Tensor:
        """z [N,E] of image [N,3,S,S], RGB in [-1,1]."""
        return cast(Tensor, self.encoder(image))
