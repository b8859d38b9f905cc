"""A stage's loss as one module, which is what DDP and FSDP wrap."""

from __future__ import annotations

from torch import Tensor, nn

from diffusionact.training.config import Recipe, StageRecipe
from diffusionact.training.stages import Sample, stage_loss, trained
from diffusionact.training.state import State


class Objective(nn.Module):
    """The live networks and what the stage asks of them. One forward for each backward, however
    often a network is called within it; the averages stay outside."""

    def __init__(self, state: State, recipe: Recipe, stage: StageRecipe) -> None:
        """Only the networks that the stage trains take a gradient from here on; all train, but for
        those that the stage asks without dropout."""
        super().__init__()
        self.networks = state.live.train()
        self._state, self._recipe, self._stage = state, recipe, stage
        moving = trained(stage)
        for name, network in state.live.items():
            network.requires_grad_(name in moving)

    def forward(self, sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of the sample, and its parts without a gradient."""
        loss, parts = stage_loss(self._state, sample, self._recipe, self._stage)
        return loss, {name: part.detach() for name, part in parts.items()}
