"""The model card's numbers and text, on stand-in networks; the clip's correlations."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from benchmarks import card_text, clip_motion, model_card
from diffusionact.assets import driver_path, portrait_paths
from diffusionact.condition import Drawing
from diffusionact.errors import MediaError, SettingsError
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.schedule import alpha_bars, inversion_run, render_run, timesteps
from diffusionact.training.models.judge import Judge, JudgeConfig, Reading, load_judge

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[1]
SIZE = 64
FACTS = {
    "identities": 3, "seed": 5, "steps": [4], "invert_steps": 10,
    "reconstruction_steps": [50, 20], "weights_sha256": "ab" * 32,
    "runtime_max_difference": 1e-4, "precision": "float32",
    "judge_own_error": {"landmark_px": 0.5, "gaze_px": 0.2, "pose_deg": 1.0},
}  # fmt: skip


class Echo(torch.nn.Module):
    """Stands for a U-Net: its v leads every x to the picture that z holds."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        level = torch.from_numpy(alpha_bars())[t].float().view(-1, 1, 1, 1)
        picture = z.view(x.shape)
        return (level.sqrt() * x - picture) / (1 - level).sqrt()


class Picture(torch.nn.Module):
    """Stands for an encoder: the code is the picture itself."""

    def forward(self, image: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return image.flatten(1)


@pytest.fixture(scope="module")
def pairs() -> model_card.Pairs:
    return model_card.held_out_pairs(3, seed=5, size=SIZE)


@pytest.fixture(scope="module")
def rows(pairs: model_card.Pairs) -> dict[str, np.ndarray]:
    table = alpha_bars()
    plan = model_card.Plan(
        invert=inversion_run("v", timesteps(10), table),
        render={4: render_run("v", timesteps(4), table)},
        published_invert=inversion_run("v", timesteps(5), table),
        published_render=render_run("v", timesteps(5), table),
        drawing=Drawing(),
        batch=2,
    )
    networks = model_card.Networks(Echo(), Echo(), Picture(), Picture())
    return model_card.generate(networks, plan, pairs, seed=1)


def reading_of(truth: model_card.Truth) -> Reading:
    return Reading(truth.points, np.asarray(truth.gaze, np.float32), truth.pose)


def test_held_out_pairs_depend_on_the_seed_and_place_only(pairs: model_card.Pairs) -> None:
    again = model_card.held_out_pairs(2, seed=5, size=SIZE)
    other = model_card.held_out_pairs(2, seed=6, size=SIZE)
    np.testing.assert_array_equal(again.target.images, pairs.target.images[:2])
    assert not np.array_equal(other.target.images, again.target.images)
    assert not np.array_equal(pairs.source.pose, pairs.target.pose)


def test_codes_decide_what_is_generated(
    pairs: model_card.Pairs, rows: dict[str, np.ndarray]
) -> None:
    """With codes that hold the picture, the source's code gives the source back and the target's
    the target, over batches of unequal size."""
    np.testing.assert_allclose(rows["oracle T=4"].astype(int), pairs.target.images, atol=1)
    np.testing.assert_allclose(rows["reenactment T=4"].astype(int), pairs.source.images, atol=1)
    for code in ("semantic", "reenactment"):
        for start in ("inverted", "random"):
            row = rows[f"reconstruction, {code} code, {start} x_T"]
            np.testing.assert_allclose(row.astype(int), pairs.source.images, atol=1)


def test_truth_has_no_error(pairs: model_card.Pairs) -> None:
    scores = model_card.score(pairs.target.images, reading_of(pairs.target), pairs.target)
    assert np.all(np.isinf(scores["psnr_db"])) and np.all(scores["ssim"] == 1)
    for name in ("landmark_px", "landmark_nme", "pose_deg"):
        np.testing.assert_array_equal(scores[name], 0)
    np.testing.assert_array_equal(np.nan_to_num(scores["gaze_px"]), 0)


def test_mean_face_answers_with_the_mean(pairs: model_card.Pairs) -> None:
    scores = model_card.mean_face(pairs.source, pairs.target)
    wanted = np.abs(pairs.source.pose.mean(0) - pairs.target.pose).mean(1)
    np.testing.assert_allclose(scores["pose_deg"], wanted, rtol=1e-5)


def test_reconstructions_are_held_against_the_source(
    pairs: model_card.Pairs, rows: dict[str, np.ndarray]
) -> None:
    judge = Judge(JudgeConfig(image_size=SIZE, channels=(8, 16, 16), eye_channels=(8, 8)))
    mean = card_text.means(model_card.measure(rows, pairs, judge))
    assert mean["reconstruction, semantic code, random x_T"]["psnr_db"] > 45
    assert mean["oracle T=4"]["psnr_db"] > 45 > 40 > mean["copy"]["psnr_db"]
    text, results = card_text.section(model_card.measure(rows, pairs, judge), FACTS)
    assert "| oracle T=4 |" in text and "| copy |" in text and "seed 5" in text
    assert results["gap"]["T=4"]["closed"]["psnr_db"] == pytest.approx(0, abs=0.02)
    assert not results["gap"]["T=4"]["passed"]
    json.dumps(results, allow_nan=False)


def means_with(landmarks: float, others: float = 0.9) -> dict[str, dict[str, float]]:
    copy, oracle = dict.fromkeys(card_text.COLUMNS, 10.0), dict.fromkeys(card_text.COLUMNS, 2.0)
    for likeness in card_text.LIKENESS:
        oracle[likeness] = 18.0
    ours = {name: 10 + others * (value - 10) for name, value in oracle.items()}
    ours["landmark_px"] = landmarks
    return {"copy": copy, "oracle T=4": oracle, "reenactment T=4": ours}


def test_gaps_hold_only_when_every_share_is_reached() -> None:
    good = card_text.gaps(means_with(3.0), [4])["T=4"]
    assert good["closed"]["landmark_px"] == pytest.approx(7 / 8)
    assert good["oracle_landmarks_of_copy"] == pytest.approx(0.2) and good["passed"]
    assert not card_text.gaps(means_with(4.0), [4])["T=4"]["passed"]
    assert not card_text.gaps(means_with(3.0, others=0.7), [4])["T=4"]["passed"]
    weak = means_with(5.0)
    weak["oracle T=4"]["landmark_px"] = 4.0
    assert not card_text.gaps(weak, [4])["T=4"]["passed"]
    backwards = means_with(3.0)
    backwards["oracle T=4"]["psnr_db"], backwards["reenactment T=4"]["psnr_db"] = 9.0, 8.0
    assert not card_text.gaps(backwards, [4])["T=4"]["passed"]


def test_card_keeps_what_stands_around_the_tables(tmp_path: Path) -> None:
    card = tmp_path / "MODEL_CARD.md"
    card.write_text(f"# Card\n\nBefore.\n\n{card_text.BEGIN}\nold\n{card_text.END}\n\nAfter.\n")
    card_text.write_section(card, "new")
    once = card.read_text()
    assert "old" not in once and "new" in once
    assert once.startswith("# Card\n\nBefore.") and once.endswith("\n\nAfter.\n")
    card_text.write_section(card, "new")
    assert card.read_text() == once
    assert [p.name for p in tmp_path.iterdir()] == ["MODEL_CARD.md"]


def test_card_is_made_where_there_is_none(tmp_path: Path) -> None:
    card = tmp_path / "deep" / "MODEL_CARD.md"
    card_text.write_section(card, "tables")
    assert card_text.BEGIN in card.read_text()
    card.write_text(card_text.BEGIN)
    with pytest.raises(MediaError, match="add the other"):
        card_text.write_section(card, "tables")


def test_sheet_shows_five_rows(
    tmp_path: Path, pairs: model_card.Pairs, rows: dict[str, np.ndarray]
) -> None:
    path = tmp_path / "out" / "sheet.png"
    model_card.write_sheet(path, pairs, rows, 4)
    sheet = cv2.imread(str(path))
    assert sheet is not None and sheet.shape[0] == 5 * SIZE
    np.testing.assert_array_equal(sheet[:SIZE, -SIZE:, ::-1], pairs.source.images[-1])


def moving(count: int = 40, seed: int = 0) -> Reading:
    rng = np.random.default_rng(seed)
    points = np.repeat(rng.uniform(20, 110, (1, 68, 2)), count, 0)
    points[:, 65:68, 1] += rng.uniform(0, 10, (count, 1))
    gaze = rng.uniform(40, 80, (count, 2, 2))
    return Reading(
        points.astype(np.float32), gaze.astype(np.float32), rng.normal(0, 20, (count, 3))
    )


def test_a_result_that_follows_correlates() -> None:
    driver = moving()
    half = dataclasses.replace(driver, pose=0.5 * driver.pose + 3, points=driver.points + 9)
    motion = clip_motion.correlations(driver, half)
    assert motion.frames == 40 and motion.passed
    assert motion.yaw == pytest.approx(1) and motion.mouth == pytest.approx(1)
    against = dataclasses.replace(driver, pose=-driver.pose)
    assert clip_motion.correlations(driver, against).yaw == pytest.approx(-1)
    assert not clip_motion.correlations(driver, against).passed
    assert not clip_motion.correlations(driver, moving(seed=1)).passed


def test_a_result_that_stands_still_does_not_pass() -> None:
    driver = moving()
    still = Reading(*(np.repeat(column[:1], 40, 0) for column in dataclasses.astuple(driver)))
    motion = clip_motion.correlations(driver, still)
    assert np.isnan(motion.yaw) and not motion.passed


def test_clips_of_other_lengths_are_refused() -> None:
    frames = np.zeros((3, 128, 128, 3), np.uint8)
    with pytest.raises(SettingsError, match="3 frames, the result 2"):
        clip_motion.clip_motion(Judge(), frames, frames[:2])


def test_frozen_difference_is_the_largest() -> None:
    frames = np.full((4, 8, 8, 3), 100, np.uint8)
    assert clip_motion.frozen_difference(frames) == 0
    frames[2, 0, 0, 0] = 148
    assert clip_motion.frozen_difference(frames) == pytest.approx(48 / 192)


@pytest.mark.slow
def test_shipped_portrait_follows_the_shipped_driver() -> None:
    judge, _ = load_judge(ROOT / "training" / "checkpoints" / "judge.safetensors")
    with Reenactor.load(ROOT / "diffusionact" / "assets" / "face.bundle") as act:
        motion, frozen = clip_motion.measure(act, judge, portrait_paths()[0], driver_path())
    assert motion.frames >= 60
    for name, least in clip_motion.REQUIRED.items():
        assert getattr(motion, name) >= least, motion
    assert frozen < clip_motion.MAX_FROZEN_DIFFERENCE
