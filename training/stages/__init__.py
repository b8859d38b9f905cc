"""The stages of a run, one module a kind.

A stage module has

    PAIRS: bool      its batches hold a source and a drawing beside the target
    DECODES: bool    there is a decoder worth looking at
    trained(stage) -> list[str]                               the networks that move
    loss(state, sample, recipe, stage) -> (loss, its parts)
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from diffusionact.training.config import Recipe, StageRecipe
from diffusionact.training.stages import autoencoder, reenact, scene
from diffusionact.training.stages.sample import Sample, to_sample
from diffusionact.training.state import State

__all__ = ["STAGES", "Sample", "Stage", "stage_loss", "to_sample", "trained"]


class Stage(Protocol):
    """What a stage module offers."""

    PAIRS: bool
    DECODES: bool

    def trained(self, stage: StageRecipe) -> list[str]:
        """The names of the networks that the stage moves."""
        ...

    def loss(
        self, state: State, sample: Sample, recipe: Recipe, stage: StageRecipe
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a batch and its parts."""
        ...


STAGES: dict[str, Stage] = {"scene": scene, "autoencoder": autoencoder, "reenact": reenact}


def trained(stage: StageRecipe) -> list[str]:
    """The names of the networks that a stage moves."""
    return STAGES[stage.kind].trained(stage)


def stage_loss(
    state: State, sample: Sample, recipe: Recipe, stage: StageRecipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of the stage and its parts."""
    return STAGES[stage.kind].loss(state, sample, recipe, stage)
