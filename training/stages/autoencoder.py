"""The Diffusion Autoencoder: a decoder under the code of the picture itself."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusionact.training.config import Recipe, StageRecipe
from diffusionact.training.sheets import Pairs, teacher_pictures
from diffusionact.training.stages.sample import Sample
from diffusionact.training.stages.terms import denoising_error, readings
from diffusionact.training.state import State

PAIRS = False
NOISE = "ring"
CRITICS = False


def trained(stage: StageRecipe) -> list[str]:
    """The networks that move."""
    return ["unet", "encoder", "heads"]


def loss(
    state: State, sample: Sample, recipe: Recipe, stage: StageRecipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss and its parts: the denoising error under z of the picture itself, and what
    z fails to tell of the scene. Source: DiffAE, Eq. 6."""
    z = state.live["encoder"](sample.target).float()
    denoising = denoising_error(state, sample, z)
    read, parts = readings(state, sample, recipe, z)
    return denoising + read, {"denoising": denoising, **parts}


def pictures(
    state: State, pairs: Pairs, device: torch.device, recipe: Recipe
) -> dict[str, NDArray[np.uint8]]:
    """The rows of its sample sheet, each uint8 [N,S,S,3] RGB."""
    return teacher_pictures(state, pairs, device, reenact=False)
