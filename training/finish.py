"""The end of a run: the weights that the bundle is exported from."""

from __future__ import annotations

import logging
from pathlib import Path

from diffusionact import machine
from diffusionact.training import weights
from diffusionact.training.config import Recipe
from diffusionact.training.distill import described
from diffusionact.training.shards import origin_of
from diffusionact.training.stages import STAGES
from diffusionact.training.state import State

log = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"


def finish(state: State, recipe: Recipe, path: Path) -> None:
    """Writes the weights that the bundle is exported from: the averages, in half precision, with
    where they came from."""
    provenance = {
        "recipe": recipe.name, "recipe_sha256": recipe.digest,
        "commit": machine.commit() or "unknown",
        "earlier_recipes_sha256": state.earlier_recipes, "images_seen": state.progress.seen,
        "complete": state.progress.stage >= len(recipe.stages), **origin_of(recipe.pool),
    }  # fmt: skip
    parts = {"render": state.ema["unet"], "encoder": state.ema["encoder"]}
    if state.has_reenactment:  # a Diffusion Autoencoder's would be noise, and be taken for trained
        parts["reenactment"] = state.ema["reenactment"]
    if state.invert is not None and STAGES[recipe.stages[-1].kind].NOISE == "sources":
        parts["invert"] = state.invert
    if "inverter" in state.ema:
        parts["invert"] = state.ema["inverter"]
    student = described(recipe, state.config.prediction)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights.save(path, state.config, parts, provenance=provenance, student=student)
    log.info("wrote %s", path)


def weights_path(recipe: Recipe, folder: Path) -> Path:
    """Returns where a run leaves its weights."""
    return Path(recipe.weights) if recipe.weights else folder / WEIGHTS
