"""Both encoders learn to read the rendered scene, before there is a decoder."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusionact.training.config import Recipe, StageRecipe
from diffusionact.training.losses import code_distance
from diffusionact.training.sheets import Pairs
from diffusionact.training.stages.sample import Sample
from diffusionact.training.stages.terms import readings
from diffusionact.training.state import State

PAIRS = True
NOISE = ""
CRITICS = False


def trained(stage: StageRecipe) -> list[str]:
    """The networks that move; of the U-Net its keypoints only."""
    return ["unet", "reenactment", "heads", "encoder"]


def loss(
    state: State, sample: Sample, recipe: Recipe, stage: StageRecipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss and its parts: both encoders learn to read the rendered scene, without a
    decoder, which takes three times as long; z_r stays by z_t."""
    z_t = state.live["encoder"](sample.target).float()
    z_r = state.live["reenactment"](sample.source, sample.condition).float()
    parts = {"code": code_distance(z_r, z_t.detach()).mean()}
    read, parts_read = readings(state, sample, recipe, z_t)
    again, parts_again = readings(state, sample, recipe, z_r)
    for name in parts_read:
        parts[f"{name} of z_t"], parts[f"{name} of z_r"] = parts_read[name], parts_again[name]
    return stage.code * parts["code"] + read + again, parts


def pictures(
    state: State, pairs: Pairs, device: torch.device, recipe: Recipe
) -> dict[str, NDArray[np.uint8]]:
    """None: before a decoder is trained there is nothing to see."""
    return {}
