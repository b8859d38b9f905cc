"""The optimiser of a stage: which parameters it moves, and how fast."""

from __future__ import annotations

import torch

from diffusionact.training.config import StageRecipe
from diffusionact.training.muon import Muon
from diffusionact.training.stages import rates, trained
from diffusionact.training.state import State


def make_optimizer(state: State, stage: StageRecipe) -> torch.optim.Optimizer:
    """Returns AdamW, or Muon where the stage has a `matrix_lr`, over the networks that it trains."""
    factors, groups = rates(stage), []
    for name in trained(stage):
        ends: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
        for key, parameter in state.live[name].named_parameters():
            ends[name == "heads" or _is_end(key)].append(parameter)
        lr = {"lr": stage.lr, "base_lr": stage.lr * factors.get(name, 1.0)}
        groups += [
            {"params": parameters, "matrices": not end, **lr}
            for end, parameters in ends.items()
            if parameters
        ]
    if stage.matrix_lr > 0:
        return Muon(groups, matrix_lr=stage.matrix_lr, weight_decay=stage.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=stage.weight_decay, fused=True)


def _is_end(key: str) -> bool:
    """Whether the parameter makes an output whose scale matters (z, a picture, a coordinate): no
    norm follows that would forgive Muon's long steps."""
    return "out" in key.split(".") or "keypoint_map" in key
