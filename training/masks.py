"""Masks of real faces by a parsing network, for prepared data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from diffusionact.training.config import CriteriaRecipe, CriticRecipe
from diffusionact.training.critics import open_critics
from diffusionact.training.diffusion import to_batch

U8 = npt.NDArray[np.uint8]


def open_parser(bisenet: Path) -> Callable[[U8], U8]:
    """Returns the way from a crop, uint8 [S,S,3] RGB, to its mask, uint8 [S,S], 255 on what is
    not background; on a GPU where there is one.

    Raises: SettingsError: the file is missing, damaged or another one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = {field.name: 0.0 for field in fields(CriteriaRecipe)} | {"background": 1.0}
    recipe = CriticRecipe(bisenet=str(bisenet))
    critics = open_critics(recipe, CriteriaRecipe(**weights), device, masks=False)

    @torch.no_grad()
    def parse(crop: U8) -> U8:
        share = critics.background(to_batch(crop[None], device), None)[0, 0]
        return np.where(share.cpu().numpy() < 0.5, 255, 0).astype(np.uint8)

    return parse
