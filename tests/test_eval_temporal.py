"""Measures of clips against closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from diffusionact.evaluation import metrics
from diffusionact.evaluation.temporal import Flicker, IdentityDrift, Jitter

SAME_SUM = 1e-12  # float64, another order of the sums


def drift(embeddings: np.ndarray) -> IdentityDrift:
    made = IdentityDrift()
    for embedding in embeddings:
        made.add(embedding)
    return made


def turning(frames: int, step_deg: float = 3.0) -> np.ndarray:
    """Embeddings that turn evenly in a plane, of growing length."""
    angle = np.radians(step_deg) * np.arange(frames)
    return np.stack([np.cos(angle), np.sin(angle)], 1) * (1 + np.arange(frames))[:, None]


def test_identity_drift_is_the_mean_over_pairs_as_written_out() -> None:
    e = np.random.default_rng(0).normal(size=(9, 16)) + 1
    pairs = [metrics.cosine_similarity(a, b) for a, b in itertools.combinations(e, 2)]
    near = [metrics.cosine_similarity(a, b) for a, b in itertools.pairwise(e)]
    assert drift(e).tg_id == pytest.approx(np.mean(pairs), abs=SAME_SUM)
    assert drift(e).tl_id == pytest.approx(np.mean(near), abs=SAME_SUM)


def test_a_shuffled_clip_loses_tl_id_and_keeps_tg_id() -> None:
    e = turning(40)
    shuffled = e[np.random.default_rng(1).permutation(40)]
    assert drift(e).tl_id == pytest.approx(math.cos(math.radians(3)), abs=SAME_SUM)
    assert drift(shuffled).tl_id < drift(e).tl_id - 0.1
    assert drift(shuffled).tg_id == pytest.approx(drift(e).tg_id, abs=SAME_SUM)


def test_a_swapped_identity_halves_what_is_alike() -> None:
    """Two orthogonal people, n frames each: n(n-1) alike of 2n(2n-1)/2 pairs, one seam."""
    n = 10
    e = np.repeat(np.eye(2), n, axis=0)
    assert drift(e).tg_id == pytest.approx((n - 1) / (2 * n - 1), abs=SAME_SUM)
    assert drift(e).tl_id == pytest.approx((2 * n - 2) / (2 * n - 1), abs=SAME_SUM)
    assert metrics.cosine_similarity(e[0], e[-1]) == 0.0
    assert metrics.cosine_similarity(e[0], 3 * e[1]) == 1.0


def test_a_gap_parts_neighbours() -> None:
    made = IdentityDrift()
    made.add([1, 0])
    made.gap()
    made.add([0, 1])
    assert math.isnan(made.tl_id) and made.tg_id == 0.0


def test_drift_of_too_few_frames_has_no_value() -> None:
    assert math.isnan(drift(np.eye(1)).tl_id) and math.isnan(drift(np.eye(1)).tg_id)
    assert math.isnan(metrics.cosine_similarity([0, 0], [1, 0]))


def test_flicker_of_a_clip_that_blinks() -> None:
    reference = np.random.default_rng(2).integers(0, 100, (6, 8, 8, 3)).astype(np.uint8)
    steady, blinking = Flicker(), Flicker()
    for t, frame in enumerate(reference):
        steady.add(frame, frame + 40)  # brighter, but always
        blinking.add(frame, frame + 51 * (t % 2))
    assert steady.value == 0.0
    assert blinking.value == pytest.approx(51 / 255)


def test_flicker_does_not_count_over_a_gap() -> None:
    made = Flicker()
    made.add(np.zeros((4, 4)), np.zeros((4, 4)))
    made.gap()
    assert math.isnan(made.add(np.zeros((4, 4)), np.full((4, 4), 255)))
    assert math.isnan(made.value)
    assert made.add(np.zeros((4, 4)), np.zeros((4, 4))) == 1.0


def face() -> np.ndarray:
    points = np.random.default_rng(3).uniform(0, 100, (68, 2))
    points[[36, 45]] = (10, 50), (60, 50)
    return points


def test_jitter_of_even_motion_is_nothing_and_of_noise_its_size() -> None:
    even, shaking = Jitter(), Jitter()
    for t in range(20):
        even.add(face() + (3 * t, -t))
        shaking.add(face() + (0, (-1) ** t))
    assert even.value == pytest.approx(0, abs=1e-12)
    assert shaking.value == pytest.approx(4 / 50)  # 1 - 2 (-1) + 1, over 50 px between the eyes


def test_jitter_leaves_out_unknown_points_and_parts_at_gaps() -> None:
    made = Jitter()
    for t in range(4):
        points = face() + (0, (-1) ** t)
        points[7] = np.nan
        made.add(points)
        if t == 1:
            made.gap()
    assert math.isnan(made.value)
    made.add(face() + (0, 1))
    assert made.value == pytest.approx(4 / 50)


def test_brightness_shift_is_signed_and_weighs_colours() -> None:
    dark = np.zeros((4, 4, 3), np.uint8)
    assert metrics.brightness_shift(dark, dark + 51) == pytest.approx(0.2)
    assert metrics.brightness_shift(dark + 51, dark) == pytest.approx(-0.2)
    green = dark.copy()
    green[..., 1] = 255
    assert metrics.brightness_shift(dark, green) == pytest.approx(0.587)
    assert metrics.mean_luma(np.full((3, 3), 7)) == 7


def test_expression_error_is_the_mean_distance() -> None:
    assert metrics.expression_error([0, 1, -1], [0.5, 1, -2]) == pytest.approx(0.5)
