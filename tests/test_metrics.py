"""The metrics against scikit-image and against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from diffusionact.errors import SettingsError
from diffusionact.evaluation import metrics

LIBRARY = 1e-6  # same formula in float64: only the order of the sums differs
CLOSED_FORM_DB = 0.01  # noise on 3e6 values: its variance is known to 0.1 %, so 0.004 dB


def pictures(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, shape, dtype=np.uint8)
    b = np.clip(a + rng.normal(0, 20, shape), 0, 255).astype(np.uint8)
    return a, b


def face(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(20, 110, (68, 2))


@pytest.mark.parametrize("shape", [(40, 53), (40, 53, 3), (11, 11, 3), (128, 128, 3)])
def test_pictures_agree_with_scikit_image(shape: tuple[int, ...]) -> None:
    a, b = pictures(shape)
    axis = 2 if len(shape) == 3 else None
    wanted = structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        data_range=255, channel_axis=axis,
    )  # fmt: skip
    assert metrics.ssim(a, b) == pytest.approx(wanted, abs=LIBRARY)
    assert metrics.psnr(a, b) == pytest.approx(
        peak_signal_noise_ratio(a, b, data_range=255), abs=LIBRARY
    )


def test_other_ranges_agree_with_scikit_image() -> None:
    a, b = (x / 127.5 - 1 for x in pictures((64, 64, 3)))
    wanted = structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        data_range=2.0, channel_axis=2,
    )  # fmt: skip
    assert metrics.ssim(a, b, data_range=2.0) == pytest.approx(wanted, abs=LIBRARY)
    assert metrics.psnr(a, b, 2.0) == pytest.approx(
        peak_signal_noise_ratio(a, b, data_range=2.0), abs=LIBRARY
    )


def test_equal_pictures() -> None:
    a, _ = pictures((32, 32, 3))
    assert metrics.psnr(a, a) == math.inf
    assert metrics.ssim(a, a) == 1.0
    assert metrics.l1(a, a) == 0.0


def test_psnr_of_known_noise() -> None:
    a = np.full((1000, 1000, 3), 128.0)
    noisy = a + np.random.default_rng(1).normal(0, 8, a.shape)
    assert metrics.psnr(a, noisy) == pytest.approx(20 * math.log10(255 / 8), abs=CLOSED_FORM_DB)


def test_l1_of_a_constant_difference() -> None:
    a = np.zeros((5, 7, 3), np.uint8)
    assert metrics.l1(a, a + 51) == pytest.approx(0.2)
    assert metrics.l1(a + 51, a) == pytest.approx(0.2)  # no wrap-round of uint8


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim, metrics.l1])
def test_shapes_that_differ_are_refused(metric: object) -> None:
    a, _ = pictures((32, 32, 3))
    with pytest.raises(SettingsError, match=r"\(32, 32, 3\).*\(32, 32\)"):
        metric(a, a[..., 0])  # type: ignore[operator]


def test_ssim_refuses_a_picture_smaller_than_its_window() -> None:
    with pytest.raises(SettingsError, match="11x11"):
        metrics.ssim(np.zeros((10, 40)), np.zeros((10, 40)))


def test_landmark_error_of_a_translation() -> None:
    points = face()
    moved = points + (3, -4)
    assert metrics.landmark_error(moved, points) == pytest.approx(5.0)
    eyes = np.linalg.norm(points[45] - points[36])
    assert metrics.landmark_nme(moved, points) == pytest.approx(5.0 / eyes)


def test_landmark_error_ignores_depth_and_unknown_points() -> None:
    points = np.column_stack([face(), np.arange(68)])
    moved = points + (3, -4, 99)
    moved[5] = np.nan
    assert metrics.landmark_error(moved, points[:, :2]) == pytest.approx(5.0)
    assert math.isnan(metrics.landmark_error(np.full_like(points, np.nan), points))


def test_landmark_nme_normalises_each_face_by_its_own_eyes() -> None:
    points = np.stack([face(1), 2 * face(1)])
    moved = points + np.array([[[1.0, 0.0]], [[2.0, 0.0]]])
    assert metrics.landmark_nme(moved, points) == pytest.approx(
        1 / np.linalg.norm(face(1)[45] - face(1)[36])
    )


def test_gaze_error_is_free_of_where_the_face_is() -> None:
    points = face()
    gaze = np.array([[40.0, 50.0], [80.0, 50.0]])
    assert metrics.gaze_error(gaze + 7, points + 7, gaze, points) == pytest.approx(0)
    looking_aside = gaze + (0, 2)
    assert metrics.gaze_error(looking_aside, points, gaze, points) == pytest.approx(2.0)
    looking_aside[0] = np.nan
    looking_aside[1] += (0, 1)
    assert metrics.gaze_error(looking_aside, points, gaze, points) == pytest.approx(3.0)


def test_gaze_offset_follows_equation_9() -> None:
    """c - w/2 sin(yaw) cos(pitch), c - h/2 sin(pitch) lies that far from the eye's centre."""
    points = face(3)
    centre = points[36:42].mean(0)
    width, height = np.ptp(points[36:42], axis=0)
    yaw, pitch = 0.3, -0.2
    offset = np.array([-width / 2 * np.sin(yaw) * np.cos(pitch), -height / 2 * np.sin(pitch)])
    gaze = np.stack([centre + offset, points[42:48].mean(0)])
    np.testing.assert_allclose(metrics.gaze_offset(gaze, points), [offset, (0, 0)], atol=1e-12)


def test_pose_error_takes_the_shorter_way_round() -> None:
    assert metrics.pose_error([179, 0, 0], [-179, 0, 0]) == pytest.approx(2 / 3)
    assert metrics.pose_error([[10, -5, 0]], [[4, -5, 6]]) == pytest.approx(4.0)


def test_openings_of_drawn_eyes_and_mouth() -> None:
    points = np.zeros((68, 2))
    points[36:48] = (64, 40)
    points[36:42] = [(40, 40), (44, 38), (48, 38), (52, 40), (48, 42), (44, 42)]
    points[42:48] = [(76, 40), (80, 40), (84, 40), (88, 40), (84, 40), (80, 40)]
    points[33] = (64, 60)
    points[61:64] = [(60, 70), (64, 70), (68, 70)]
    points[65:68] = [(68, 78), (64, 78), (60, 78)]
    np.testing.assert_allclose(metrics.eye_opening(points), [4 / 12, 0])
    assert metrics.mouth_opening(points) == pytest.approx(8 / 20)
    angle = np.radians(25)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turned = 1.7 * points @ turn.T + 5
    assert metrics.mouth_opening(turned) == pytest.approx(8 / 20)
    np.testing.assert_allclose(metrics.eye_opening(turned), [4 / 12, 0], atol=1e-12)


def test_correlation() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 500))
    assert metrics.correlation(a, 3 * a - 2) == pytest.approx(1)
    assert metrics.correlation(a, -a) == pytest.approx(-1)
    assert metrics.correlation(a, a + b) == pytest.approx(np.corrcoef(a, a + b)[0, 1])
    gappy = a + b
    gappy[::7] = np.nan
    kept = np.isfinite(gappy)
    assert metrics.correlation(a, gappy) == pytest.approx(np.corrcoef(a[kept], gappy[kept])[0, 1])
    assert math.isnan(metrics.correlation(a, np.ones(500)))
    assert math.isnan(metrics.correlation([1.0, math.nan], [1.0, 2.0]))


def test_gap_closed() -> None:
    assert metrics.gap_closed(10, 4, 2) == pytest.approx(0.75)
    assert metrics.gap_closed(16, 22, 24) == pytest.approx(0.75)
    assert metrics.gap_closed(10, 12, 2) < 0
    assert math.isnan(metrics.gap_closed(3, 1, 3))
