"""The stages of a run, one module a kind.

A stage module has

    PAIRS: bool      its batches hold a source and a drawing beside the target
    NOISE: str       what it adds to Gaussian noise: "ring", inversions of sources by the networks
                     as they are now; "sources", each source's own x_T alone; "", nothing
    CRITICS: bool    its loss asks the run's critics
    trained(stage) -> list[str]                               the networks that move
    loss(state, sample, recipe, stage) -> (loss, its parts)
    pictures(state, pairs, device, recipe) -> rows            of its sample sheet, if any
    begin(state, recipe, stage)                               what it makes ready, if anything
    rates(stage) -> dict[str, float]                          factors on lr of its own, if any
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusionact.training import distill
from diffusionact.training.config import Recipe, StageRecipe
from diffusionact.training.sheets import Pairs
from diffusionact.training.stages import autoencoder, pretrain, reenact, sampler, scene
from diffusionact.training.stages.sample import Sample, to_sample
from diffusionact.training.state import State

__all__ = [
    "STAGES",
    "Sample",
    "Stage",
    "begin_stage",
    "rates",
    "stage_loss",
    "to_sample",
    "trained",
]


class Stage(Protocol):
    """What a stage module offers."""

    PAIRS: bool
    NOISE: str
    CRITICS: bool

    def trained(self, stage: StageRecipe) -> list[str]:
        """The names of the networks that the stage moves."""
        ...

    def loss(
        self, state: State, sample: Sample, recipe: Recipe, stage: StageRecipe
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a batch and its parts."""
        ...

    def pictures(
        self, state: State, pairs: Pairs, device: torch.device, recipe: Recipe
    ) -> dict[str, NDArray[np.uint8]]:
        """Returns the rows of the sample sheet by name, each uint8 [N,S,S,3] RGB; {} before there
        is a decoder to look at."""
        ...


STAGES: dict[str, Stage] = {
    "scene": scene,
    "autoencoder": autoencoder,
    "reenact": reenact,
    "pretrain": pretrain,
    "sampler": sampler,
    "student": distill,
}


def begin_stage(state: State, recipe: Recipe, stage: StageRecipe) -> None:
    """Lets the stage make ready what it needs, when it begins and when it is taken up again."""
    begin = getattr(STAGES[stage.kind], "begin", None)
    if begin is not None:
        begin(state, recipe, stage)


def rates(stage: StageRecipe) -> dict[str, float]:
    """Returns the factor on the stage's lr of each network where it is not 1."""
    own = getattr(STAGES[stage.kind], "rates", None)
    return {"unet": stage.unet_lr, "heads": stage.heads_lr, **(own(stage) if own else {})}


def trained(stage: StageRecipe) -> list[str]:
    """The names of the networks that a stage moves."""
    return STAGES[stage.kind].trained(stage)


def stage_loss(
    state: State, sample: Sample, recipe: Recipe, stage: StageRecipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of the stage and its parts."""
    return STAGES[stage.kind].loss(state, sample, recipe, stage)
