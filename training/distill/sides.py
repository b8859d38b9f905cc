"""The two directions of a student whose encoders do not move: to the picture, and to its noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusionact.training.config import StageRecipe
from diffusionact.training.distill.segments import Denoiser, Segments
from diffusionact.training.stages.sample import Sample
from diffusionact.training.state import State


@dataclass(frozen=True)
class Side:
    """One direction: the student, its average, its teacher, and the student's segments."""

    live: Denoiser
    average: Denoiser
    teacher: Denoiser
    segments: Segments


def moves(stage: StageRecipe) -> list[str]:
    """The networks that move: the U-Net, and the one that inverts where it is another; what z says
    of a face stays as it is."""
    return ["unet", *(["inverter"] if stage.inverter else [])]


def inverter(stage: StageRecipe) -> str:
    """The name of the network that inverts."""
    return "inverter" if stage.inverter else "unet"


@torch.no_grad()
def student_code(state: State, sample: Sample) -> Tensor:
    """Returns z float32 [B,E] of the student's own, unmoved encoder."""
    assert sample.source is not None and sample.condition is not None
    z: Tensor = state.ema["reenactment"](sample.source, sample.condition).float()
    return z


def side(state: State, name: str, z: Tensor, teacher: Denoiser, table: Segments) -> Side:
    """Returns the direction in which the student's network `name` is asked, without dropout."""
    kind = state.config.prediction
    live, average = (
        Denoiser(networks[name].eval(), kind, z) for networks in (state.live, state.ema)
    )
    return Side(live, average, teacher, table.to(z.device))
