"""The recipes of the paper's protocol say what the paper says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from diffusionact.training.config import PoolRecipe, Recipe, ShardsRecipe, load_recipe
from diffusionact.training.models import PRESETS
from diffusionact.training.stages import trained

pytestmark = pytest.mark.torch

RECIPES = Path(__file__).parents[1] / "training" / "recipes"
# Source: DiffusionAct, implementation details.
PAPER = {"pixel": 20, "perceptual": 20, "identity": 20, "style": 20, "background": 10,
         "shape": 0.5, "gaze": 2, "head_pose": 2}  # fmt: skip


def recipe(name: str) -> Recipe:
    return load_recipe(RECIPES / f"paper_{name}.toml")


@pytest.mark.parametrize("name", ["voxceleb256", "faces128"])
def test_the_stages_are_the_papers(name: str) -> None:
    stages = recipe(name).stages
    assert [s.kind for s in stages][-3:] == ["pretrain", "sampler", "sampler"]
    pretrain, main, joint = stages[-3:]
    assert (pretrain.lr, pretrain.batch, pretrain.drawing_gain) == (1e-3, 32, 0)
    for stage in (main, joint):
        assert (stage.batch, stage.train_steps, stage.split, stage.lr) == (4, 8, True, 1e-4)
    assert trained(main) == ["reenactment"] and trained(joint) == ["reenactment", "unet"]
    assert joint.lr * joint.unet_lr == pytest.approx(1e-5)
    assert {n: w for n, w in asdict(recipe(name).criteria).items() if w} == PAPER


def test_clips_of_people_begin_from_the_published_autoencoder() -> None:
    found = recipe("voxceleb256")
    assert found.start == "weights" and isinstance(found.pool, ShardsRecipe)
    assert PRESETS[found.network].prediction == "eps" and found.inversions.steps == 50
    assert all(value for name, value in asdict(found.critics).items() if name != "guide")
    assert all(stage.constant_lr and stage.ema == 0 for stage in found.stages)


def test_rendered_faces_need_no_download() -> None:
    found = recipe("faces128")
    assert isinstance(found.pool, PoolRecipe) and not found.start
    assert [name for name, value in asdict(found.critics).items() if value] == ["guide"]
    assert found.stages[0].kind == "autoencoder"


def test_the_autoencoder_is_trained_as_published() -> None:
    """Source: DiffAE, Table 6: eps under the mean square at timesteps drawn alike."""
    found = recipe("autoencoder256")
    (stage,) = found.stages
    assert PRESETS[found.network].prediction == "eps"
    assert (stage.kind, stage.lr, stage.batch, stage.ema) == ("autoencoder", 1e-4, 64, 0.9999)
    assert (stage.timestep_power, stage.cached_noise, stage.weight_decay) == (1, 0, 0)
    assert {*found.loss.regions()} == {1.0}
    assert found.loss.gaze == found.loss.heads == found.loss.keypoints == 0
