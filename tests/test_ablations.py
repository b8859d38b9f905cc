"""The ablations: which runs there are, how they are judged, the page, and the pool they use."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from benchmarks import ablation_plan, ablation_scores, ablation_table, ablations, small_pool
from benchmarks.ablation_plan import Run
from diffusionact.errors import SettingsError
from diffusionact.schedule import timesteps
from diffusionact.training import data
from diffusionact.training.config import PoolRecipe, Recipe, parse_recipe
from diffusionact.training.judges import Truth
from diffusionact.training.models.judge import Judge, JudgeConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.torch

BASE = ablations.settings("ablation32")
RUNS = Path("runs/somewhere")


def planned(seeds: list[int], **how: Any) -> dict[str, Run]:
    found = ablations.plan(RUNS, seeds, how.get("scale", 1.0), how.get("minutes"))
    return {run.name: run for run in found}


def recipe_of(run: Run) -> Recipe:
    """The recipe as training reads it: unknown settings raise."""
    return parse_recipe(ablation_plan.to_toml(run.recipe))


def test_every_run_is_a_recipe_and_comes_after_what_it_begins_from() -> None:
    seen: set[str] = set()
    for name, run in planned([1, 2, 3]).items():
        recipe = recipe_of(run)
        assert recipe.name == name and recipe.stages
        assert not run.start or run.start in seen
        seen.add(name)


def test_variants_change_what_they_say_and_nothing_else() -> None:
    runs = planned([4])
    full = recipe_of(runs["full-main-4"]).stages
    assert [(s.kind, s.train_steps, s.split, s.unet_lr) for s in full] == [("sampler", 8, True, 0)]
    assert recipe_of(runs["full-joint-4"]).stages[0].unet_lr > 0
    assert runs["full-main-4"].start == "pretrain-4"
    assert runs["no-pre-training-main-4"].start == "autoencoder"
    assert recipe_of(runs["no-pre-training-main-4"]).stages == full
    for stage in ("main", "joint"):
        whole = recipe_of(runs[f"full-{stage}-4"]).stages[0]
        unsplit = recipe_of(runs[f"no-batch-split-{stage}-4"]).stages[0]
        fewer = recipe_of(runs[f"Ttr-4-{stage}-4"]).stages[0]
        assert not unsplit.split and fewer.train_steps == 4
        assert vars(unsplit) == vars(whole) | {"split": False}
        assert vars(fewer) == vars(whole) | {"train_steps": 4}
    assert (runs["full-main-4"].variant, runs["full-joint-4"].variant) == ("no fine-tuning", "full")


def test_seeds_share_one_autoencoder_and_the_teacher() -> None:
    runs = planned([1, 2])
    assert sum("autoencoder" in name for name in runs) == 1
    assert {run.start for run in runs.values() if run.part == "distillation"} == {"full-joint-1"}
    assert recipe_of(runs["pretrain-2"]).seed == 2


def test_methods_see_as_many_pictures() -> None:
    counts = [sum(s.images for s in recipe_of(run).stages)
              for run in planned([1]).values() if run.part == "distillation"]  # fmt: skip
    assert len(counts) == 3 and max(counts) - min(counts) < 3


def test_the_teacher_can_take_the_yardsticks_steps() -> None:
    assert all(len(timesteps(count)) == count for count in ablations.TEACHER_STEPS)


def test_scale_and_minutes() -> None:
    whole, part = planned([1]), planned([1], scale=0.5, minutes=3.0)
    for name, run in part.items():
        stages = recipe_of(run).stages
        assert sum(s.images for s in stages) == pytest.approx(
            sum(s.images for s in recipe_of(whole[name]).stages) / 2, abs=3
        )
        assert sum(s.minutes or 0 for s in stages) == pytest.approx(3.0)


def test_toml_round_trip() -> None:
    table = {"name": 'a "b"', "lr": 1e-5, "on": True, "of": {"steps": [1, 2], "render": {"4": [1]}},
             "stages": [{"x": 1}, {"x": 2.5}]}  # fmt: skip
    assert tomllib.loads(ablation_plan.to_toml(table)) == table
    assert tomllib.loads(ablation_plan.to_toml(BASE)) == BASE


@pytest.mark.parametrize(
    ("worse", "said"),
    [([0.1, 0.2, 0.3], "holds"), ([-0.1, 0.0, -0.3], "does not hold"),
     ([0.1, -0.2, 0.3], "open: the seeds disagree"), ([0.1], "holds (one seed)"), ([], "not run")],
)  # fmt: skip
def test_verdicts(worse: list[float], said: str) -> None:
    assert ablation_table.verdict(worse) == said


def finished(folder: Path, runs: list[Run], shift: dict[str, float]) -> None:
    """What runs leave behind; `shift` moves all measures of a variant."""
    for run in runs:
        place = folder / run.name
        place.mkdir(parents=True)
        ablation_plan.weights_of(folder, run.name).touch()
        if run.part:
            value = 10 + shift.get(run.variant, 0.0) + 0.1 * run.seed
            row = dict.fromkeys(ablation_scores.MEASURES, value)
            steps = ["4", "2", "1"] if run.part == "distillation" else ["20"]
            (place / "scores.json").write_text(json.dumps(dict.fromkeys(steps, row)))


def test_page_tells_means_spread_directions_and_what_was_not_run(tmp_path: Path) -> None:
    runs = list(planned([1, 2]).values())
    finished(tmp_path, runs[:-1], {"no pre-training": 2.0, "no batch split": 1.0})
    results = ablation_table.collect(runs, tmp_path)
    found = {(row["variant"], row["measure"]): row for row in results["directions"]}
    assert found["no pre-training", "pose_deg"]["worse_by"] == pytest.approx([2.0, 2.0])
    assert found["no pre-training", "pose_deg"]["verdict"] == "holds"
    # More decibels are better: the same shift is no loss there.
    assert found["no batch split", "reconstruction_psnr_db"]["verdict"] == "does not hold"
    assert found["no batch split", "reconstruction_perceptual"]["verdict"] == "holds"
    text = ablation_table.page(results)
    assert "12.15 ± 0.07" in text and f"Not run: {runs[-1].name}." in text
    plot = ablation_table.plot(results["protocol"])
    variants = len(results["protocol"])
    assert plot.count("<circle") == 2 * variants * len(ablation_table.PANELS)


def test_a_variant_is_held_against_the_full_protocol_of_its_own_seed() -> None:
    row = {"seed": [1, 2], **{name: [1.0, 5.0] for name in ablation_scores.MEASURES}}
    other = {"seed": [2], **{name: [5.5] for name in ablation_scores.MEASURES}}
    found = ablation_table.directions({"full": {"20": row}, "no fine-tuning": {"20": other}})
    assert [r["worse_by"] for r in found] == [pytest.approx([0.5])]


def test_points_follow_a_picture_that_is_enlarged() -> None:
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[0, 2, 5] = 255
    points = np.full((1, 68, 2), (5, 2), np.float32)
    truth = Truth(image, points, points[:, :2], np.zeros((1, 3), np.float32))
    seen = ablation_scores._at(truth, 32)
    large = ablation_scores.enlarged(image, 32)[0, ..., 0].astype(float)
    middle = [(large.sum(0) * np.arange(32)).sum(), (large.sum(1) * np.arange(32)).sum()]
    np.testing.assert_allclose(seen.points[0, 0], np.array(middle) / large.sum(), atol=0.05)
    np.testing.assert_array_equal(seen.gaze, seen.points[:, :2])


def test_perceptual_distance() -> None:
    judge = Judge(JudgeConfig(64, (8, 12, 16), (4, 8), eye_px=12.0, eye_cells=8))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    assert ablation_scores.perceptual(judge, images, images) == 0
    near = np.clip(images.astype(int) + 3, 0, 255).astype(np.uint8)
    far = 255 - images
    distances = [ablation_scores.perceptual(judge, images, other) for other in (near, far)]
    assert 0 < distances[0] < distances[1]


def test_small_pool_keeps_faces_and_where_things_are(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    rng = np.random.default_rng(0)
    points = np.zeros((3, 2, 68, 3), np.float32)
    images = np.zeros((3, 2, 32, 32, 3), np.uint8)
    for i in range(3):
        place = rng.integers(8, 24, 2)
        points[i, :, :, :2] = place
        for frame in range(2):
            cv2.circle(images[i, frame], [int(v) for v in place], 5, (200, 200, 200), -1)
    arrays = {
        "images": images, "labels": (images[..., 0] > 0).astype(np.uint8), "points": points,
        "gaze": points[:, :, :2, :2], "pose": rng.normal(size=(3, 2, 3)).astype(np.float32),
        "expression": np.zeros((3, 2, 13), np.float32), "gaze_angles": np.zeros((3, 2, 2)),
        "parameters": rng.normal(size=(3, 2, 9)).astype(np.float32),
    }  # fmt: skip
    for name in data.FIELDS:
        np.save(tmp_path / "large" / f"{name}.npy", arrays[name])
    meta = {"format": data.FORMAT, "identities": 3, "frames": 2, "size": 32, "seed": 0}
    (tmp_path / "large" / "meta.json").write_text(json.dumps(meta))
    pool = small_pool.shrink_pool(tmp_path / "large", tmp_path / "small", 8, 2)
    assert (pool.identities, pool.frames, pool.size) == (2, 2, 8)
    np.testing.assert_array_equal(pool.pose, arrays["pose"][1:])
    for row in range(2):
        weight = pool.images[row, 0, ..., 0].astype(float)
        middle = np.array(
            [(weight.sum(0) * np.arange(8)).sum(), (weight.sum(1) * np.arange(8)).sum()]
        )
        np.testing.assert_allclose(pool.points[row, 0, 0, :2], middle / weight.sum(), atol=0.05)
    np.testing.assert_array_equal(pool.gaze, pool.points[:, :, :2, :2])
    again = small_pool.shrink_pool(tmp_path / "large", tmp_path / "small", 8, 2)
    np.testing.assert_array_equal(again.images, pool.images)
    # A recipe that asks for such a pool has it: `diffusionact train` renders nothing.
    asked = PoolRecipe(str(tmp_path / "small"), identities=2, frames=2, size=8, seed=0, held_out=1)
    data.render_faces(asked)
    with pytest.raises(SettingsError, match="wanted"):
        data.render_faces(dataclasses.replace(asked, frames=3))
    with pytest.raises(SettingsError, match="multiple of 5"):
        small_pool.shrink_pool(tmp_path / "large", tmp_path / "other", 5, 2)
    with pytest.raises(SettingsError, match="another pool"):
        small_pool.shrink_pool(tmp_path / "large", tmp_path / "small", 4, 2)
