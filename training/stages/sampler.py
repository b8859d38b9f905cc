"""The main stage: the reenactment encoder learns from the pictures that the sampler makes of its
codes, through all steps of the sampler; with `unet_lr` above 0 the decoder learns along with it.

The noise is that of the source, inverted once by networks that do not move (`inversions`). Half of
a batch reenacts: another frame of the person is the target. The other half reconstructs: the
target is the source itself.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusionact.training.config import Recipe, StageRecipe
from diffusionact.training.criteria import Goal, criteria, total
from diffusionact.training.diffusion import render
from diffusionact.training.sheets import Pairs, runtime_pictures
from diffusionact.training.stages.sample import Sample
from diffusionact.training.state import State

PAIRS = True
NOISE = "sources"
CRITICS = True
SHEET_STEPS = (20, 8)


def trained(stage: StageRecipe) -> list[str]:
    """The networks that move: the reenactment encoder, and in joint fine-tuning the decoder."""
    return ["reenactment", *(["unet"] if stage.unet_lr > 0 else [])]


def begin(state: State, recipe: Recipe, stage: StageRecipe) -> None:
    """Keeps the decoder as it is for inversion, before it moves: so each x_T stays what it was."""
    if stage.unet_lr > 0:
        state.keep_inverter()


def loss(
    state: State, sample: Sample, recipe: Recipe, stage: StageRecipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of the pictures that the source's noise becomes under z_r (z_s where the
    target is the source), and its parts. Source: DiffusionAct, Eq. 3-6 and 10-17."""
    assert sample.source is not None and sample.condition is not None
    z = state.live["reenactment"](sample.source, sample.condition).float()
    x_0 = render(
        _decoder(state, stage),
        state.config.prediction,
        sample.eps,
        z,
        stage.train_steps,
        recompute=stage.recompute,
    )
    goal = Goal(
        sample.target,
        sample.source,
        labels=None if recipe.critics.bisenet else sample.labels,
        points=sample.keypoints[:, :68],
        source_points=sample.source_points,
    )
    assert state.critics is not None
    parts = criteria(x_0, goal, state.critics, recipe.criteria)
    return total(parts, recipe.criteria), parts | _halves(x_0, sample, stage)


def _halves(x_0: Tensor, sample: Sample, stage: StageRecipe) -> dict[str, Tensor]:
    """The mean distance of a pixel in either half of the batch, to be told in the curves."""
    if stage.pairing != "halves":
        return {}
    apart = (x_0.detach() - sample.target).abs()
    return {"reenacted": apart[0::2].mean(), "reconstructed": apart[1::2].mean()}


def _decoder(state: State, stage: StageRecipe) -> nn.Module:
    """The U-Net to render with, without dropout, as the runtime does: its average, which is frozen
    and takes no gradient, unless the stage moves it."""
    return (state.live if stage.unet_lr > 0 else state.ema)["unet"].eval()


def pictures(
    state: State, pairs: Pairs, device: torch.device, recipe: Recipe
) -> dict[str, NDArray[np.uint8]]:
    """The rows of its sample sheet, each uint8 [N,S,S,3] RGB."""
    return runtime_pictures(state, pairs, device, recipe, {str(n): n for n in SHEET_STEPS})
