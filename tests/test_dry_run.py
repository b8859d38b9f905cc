"""What a run will take, before it is begun: believed figures, and nothing left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusionact.cli import main
from diffusionact.training import dry_run as dry
from diffusionact.training import loop, state
from diffusionact.training.config import load_recipe
from diffusionact.training.world import alone
from tests.test_training import TINY, write_pool

pytestmark = pytest.mark.torch

TEXT = """
name = "tiny"
network = "tiny"
weights = "weights/face.safetensors"
[pool]
folder = "pool"
identities = 6
held_out = 2
size = 32
[inversions]
steps = 2
capacity = 64
fill = 8
every = 10
batch = 4
[loop]
fused_norm = false
bf16 = false
evaluation_pairs = 2
sheet_minutes = 1000
[[stages]]
kind = "autoencoder"
images = 400
batch = 32
cached_from = 0.5
[[stages]]
kind = "reenact"
images = 4_000_000
minutes = 0.5
batch = 32
cached_noise = 0.0
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(state, "PRESETS", {"tiny": TINY})
    monkeypatch.chdir(tmp_path)
    write_pool(tmp_path / "pool")
    (tmp_path / "tiny.toml").write_text(TEXT)
    return tmp_path / "tiny.toml"


def saved_bytes(recipe: Path) -> int:
    """What the backward pass of one step of the first stage keeps, by the tensors themselves."""
    settings = load_recipe(recipe)
    run = loop.Trainer(settings, recipe.parent / "probe", alone(torch.device("cpu")))
    stage = replace(settings.stages[0], cached_noise=0.0)
    run._begin(stage)
    batch = loop.PairSampler(run.pool, 4, stage, run.cache, (1, 0))(0)
    weights = {p.untyped_storage().data_ptr() for p in run.state.live.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run._step(stage, batch, loop.Clock(0.0))
    return sum(kept.values())


def test_figures_are_of_this_run_and_nothing_is_left(recipe: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    cost = dry.dry_run(recipe, device="cpu", steps=2)
    assert cost is not None and sorted(tmp_path.rglob("*")) == before
    first, second = cost.stages
    assert (first.kind, first.steps, first.samples) == ("autoencoder", 13, 32)
    assert first.images_per_s == pytest.approx(32 / first.step_seconds)
    # 8 inversions in 2 batches, then one every 10 steps of the second half
    inversions = (8 / 4 + 13 * 0.5 / 10) * first.inversion_seconds
    assert first.inversion_seconds > 0 and first.seconds == pytest.approx(
        13 * first.step_seconds + inversions + first.sheet_seconds, rel=0.01
    )
    assert second.seconds == pytest.approx(30 + second.sheet_seconds)
    assert second.steps == pytest.approx(30 / second.step_seconds, rel=0.1)
    assert cost.render_seconds == 0
    assert cost.seconds == pytest.approx(first.seconds + second.seconds)
    activations = saved_bytes(recipe) / 32
    assert first.sample_bytes is not None and first.fixed_bytes is not None
    assert 0.5 * activations < first.sample_bytes < 6 * activations
    assert first.fixed_bytes > 4 * sum(p.numel() * 4 for p in loop.State(
        load_recipe(recipe), loop._statistics(loop.open_dataset(load_recipe(recipe).pool), 4),
        torch.device("cpu")).live["unet"].parameters())  # fmt: skip


def test_the_command_tells_it_as_a_table_and_as_json(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(TEXT.replace("sheet_minutes = 1000", "sheet_minutes = 0"))
    words = ["train", str(recipe), "--dry-run", "--device", "cpu"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [stage["kind"] for stage in told["stages"]] == ["autoencoder", "reenact"]
    assert told["seconds"] > 30 and told["processes"] == 1
    assert [stage["sheet_seconds"] for stage in told["stages"]] == [0, 0]
    cost = dry.RunCost(
        told["device"], 1, [dry.StageCost(**stage) for stage in told["stages"]], 5400.0
    )
    table = cost.table().splitlines()
    assert len(table) == 5 and table[1].startswith("autoencoder ") and " 13 " in table[1]
    assert table[3] == "the faces are not rendered yet: 1.5 h"


def test_faces_that_are_not_rendered_yet_are_counted(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe.write_text(TEXT.replace('folder = "pool"', 'folder = "none"'))
    asked = []

    def render(folder: Path, **request: int) -> None:
        asked.append(request)
        write_pool(folder, request["identities"], request["frames"])

    monkeypatch.setattr(dry, "render_pool", render)
    settings, seconds = dry._with_faces(load_recipe(recipe), tmp_path / "few")
    assert asked == [{"identities": 8, "frames": 2, "size": 32, "seed": 1}] and seconds > 0
    assert settings.pool.folder == str(tmp_path / "few") and settings.pool.held_out == 1
