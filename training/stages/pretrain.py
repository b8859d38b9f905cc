"""The reenactment encoder before the sampler is in play: its code against the target's own.

It begins as the semantic encoder with a zero convolution for the drawing, and learns where the
target's face lies in the space of codes that the frozen decoder knows.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from diffusionact.training.config import Recipe, StageRecipe
from diffusionact.training.sheets import Pairs, teacher_pictures
from diffusionact.training.stages.sample import Sample
from diffusionact.training.state import State

PAIRS = True
NOISE = ""
CRITICS = False


def trained(stage: StageRecipe) -> list[str]:
    """The networks that move; the Diffusion Autoencoder is frozen."""
    return ["reenactment"]


def begin(state: State, recipe: Recipe, stage: StageRecipe) -> None:
    """Sets the reenactment encoder to the semantic one, whatever it was before; the paper's
    `drawing_gain` is 0."""
    if state.progress.step == 0:
        state.start_reenactment(stage.drawing_gain)


def loss(
    state: State, sample: Sample, recipe: Recipe, stage: StageRecipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns |z_r - z_t|_1, mean over batch and code, and nothing else.

    Source: DiffusionAct, the pre-training of the reenactment encoder.
    """
    assert sample.source is not None and sample.condition is not None
    z_r = state.live["reenactment"](sample.source, sample.condition).float()
    with torch.no_grad():
        z_t = state.ema["encoder"](sample.target).float()
    code = F.l1_loss(z_r, z_t)
    return code, {"code": code}


def pictures(
    state: State, pairs: Pairs, device: torch.device, recipe: Recipe
) -> dict[str, NDArray[np.uint8]]:
    """The rows of its sample sheet, each uint8 [N,S,S,3] RGB."""
    return teacher_pictures(state, pairs, device, reenact=True)
