"""The Diffusion Autoencoder: a decoder under the code of the picture itself."""

from __future__ import annotations

from torch import Tensor

from diffusionact.training.config import Recipe, StageRecipe
from diffusionact.training.stages.sample import Sample
from diffusionact.training.stages.terms import denoising_error, readings
from diffusionact.training.state import State

PAIRS, DECODES = False, True


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
