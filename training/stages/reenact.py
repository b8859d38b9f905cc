"""The short way for rendered faces: decoder and encoders together, without the sampler."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusionact.training.config import Recipe, StageRecipe
from diffusionact.training.losses import code_distance
from diffusionact.training.sheets import Pairs, teacher_pictures
from diffusionact.training.stages.sample import Sample
from diffusionact.training.stages.terms import denoising_error, readings
from diffusionact.training.state import State

PAIRS = True
NOISE = "ring"
CRITICS = False


def trained(stage: StageRecipe) -> list[str]:
    """The networks that move."""
    return ["unet", "reenactment", "heads", *(["encoder"] if stage.encoder_lr else [])]


def rates(stage: StageRecipe) -> dict[str, float]:
    """Factors on lr beside those of every stage."""
    return {"encoder": stage.encoder_lr}


def loss(
    state: State, sample: Sample, recipe: Recipe, stage: StageRecipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss and its parts for a batch of even length: the samples in even places are
    decoded from z_r, the others from z_t, so that the decoder learns z_r without forgetting z_t;
    z_r is held against its z_t. Source: DiffusionAct, the reenactment encoder's pre-training."""
    assert sample.source is not None and sample.condition is not None
    z_r = state.live["reenactment"](sample.source[0::2], sample.condition[0::2]).float()
    encoder = state.live["encoder"] if stage.encoder_lr > 0 else state.ema["encoder"]
    with torch.no_grad():
        wanted = encoder(sample.target[0::2]).float()
    with torch.set_grad_enabled(stage.encoder_lr > 0):
        z_t = encoder(sample.target[1::2]).float()
    z = torch.stack([z_r, z_t], dim=1).flatten(0, 1)
    code = code_distance(z_r, wanted).mean()
    read, parts = readings(state, sample, recipe, z)
    denoising = denoising_error(state, sample, z)
    loss = stage.code * code + read + stage.diffusion * denoising
    return loss, {"denoising": denoising, **parts, "code": code}


def pictures(
    state: State, pairs: Pairs, device: torch.device, recipe: Recipe
) -> dict[str, NDArray[np.uint8]]:
    """The rows of its sample sheet, each uint8 [N,S,S,3] RGB."""
    return teacher_pictures(state, pairs, device, reenact=True)
