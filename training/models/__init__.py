"""The networks, with the published parameter names. Needs torch."""

from __future__ import annotations

from diffusionact.training.models.autoencoder import Autoencoder
from diffusionact.training.models.config import (
    FACE128,
    FFHQ64,
    FFHQ128,
    FFHQ256,
    PRESETS,
    NetworkConfig,
)
from diffusionact.training.models.encoder import ReenactmentEncoder, SemanticEncoder
from diffusionact.training.models.unet import UNet

__all__ = [
    "FACE128",
    "FFHQ64",
    "FFHQ128",
    "FFHQ256",
    "PRESETS",
    "Autoencoder",
    "NetworkConfig",
    "ReenactmentEncoder",
    "SemanticEncoder",
    "UNet",
]
