"""The interface of all data sets, the fit of our face model, and landmarks across people."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffusionact.errors import SettingsError
from diffusionact.evaluation.expression import ExpressionFit
from diffusionact.landmarks import Landmarks
from diffusionact.morphable import rendered_face, rotation
from diffusionact.training.cross_pairs import CrossSampler
from diffusionact.training.crossing import crossed, face_fit
from diffusionact.training.dataset import training_people
from diffusionact.training.losses import GROUP_WEIGHTS, group_weights, head_targets
from tests.test_data import IDENTITIES, write_pool

NECK_PIVOT = (0.0, 1.0, 0.45)


def face(seed: int, pose_deg: tuple[float, float, float]) -> tuple[Landmarks, np.ndarray]:
    """A face of our model at (128, 120) px, 60 px a head unit, and its expression."""
    model, rng = rendered_face(), np.random.default_rng(seed)
    expression = np.zeros(len(model.expression_basis))
    expression[[0, 1]] = rng.uniform(0.0, 0.8, 2)  # jaw and smile
    shape = 0.7 * rng.standard_normal(len(model.identity_basis))
    head = np.asarray(model.landmarks(model.shape(shape, expression)))
    points = 60 * head @ rotation(np.array(pose_deg)).T + [128.0, 120.0, 0.0]
    gaze = np.stack([points[36:42, :2].mean(axis=0), points[42:48, :2].mean(axis=0)]) + [3.0, 1.0]
    return Landmarks(points.astype(np.float32), gaze.astype(np.float32)), expression


@pytest.mark.parametrize("pose_deg", [(0.0, 0.0, 0.0), (20.0, -8.0, 12.0), (-25.0, 10.0, -5.0)])
def test_the_fit_finds_pose_camera_and_expression(pose_deg: tuple[float, float, float]) -> None:
    fit = ExpressionFit(rendered_face())
    landmarks, expression = face(3, pose_deg)
    found = fit.fit(landmarks.points)
    np.testing.assert_allclose(found.pose_deg, pose_deg, atol=3.0)
    np.testing.assert_allclose(found.expression[:2], expression[:2], atol=0.25)
    assert found.scale == pytest.approx(60, rel=0.08)
    error = np.abs(fit.points(found) - landmarks.points[:, :2])
    assert error.mean() < 0.6 and error.max() < 3.0


def test_a_known_shape_is_kept_and_the_rest_is_fitted_to_it() -> None:
    fit = ExpressionFit(rendered_face())
    first, second = face(5, (10.0, 0.0, 0.0))[0], face(5, (-15.0, 5.0, 0.0))[0]
    shape = fit.fit(first.points).shape
    found = fit.fit(second.points, shape)
    np.testing.assert_array_equal(found.shape, shape)
    np.testing.assert_allclose(found.pose_deg, (-15.0, 5.0, 0.0), atol=3.0)
    assert np.abs(fit.points(found) - second.points[:, :2]).mean() < 1.0


def test_a_face_crossed_with_itself_is_itself() -> None:
    source = face(1, (12.0, -4.0, 6.0))[0]
    made = crossed(source, source)
    np.testing.assert_allclose(made.points[:, :2], source.points[:, :2], atol=1e-3)
    np.testing.assert_allclose(made.gaze, source.gaze, atol=1e-3)


def test_across_people_the_shape_is_the_source_and_the_motion_the_driver() -> None:
    """Held against the face model itself: the source's shape with the driver's expression."""
    model = rendered_face()
    source, driver = face(1, (0.0, 0.0, 0.0))[0], face(2, (18.0, -6.0, 8.0))[0]
    made, fit = crossed(source, driver), face_fit()
    theirs = fit.fit(driver.points)
    ours = fit.fit(source.points)
    again = fit.fit(made.points, ours.shape)
    np.testing.assert_allclose(again.pose_deg, theirs.pose_deg, atol=1.5)
    np.testing.assert_allclose(again.expression, theirs.expression, atol=0.15)
    assert again.scale == pytest.approx(ours.scale, rel=0.02)
    # The neck stays where it was, so the head turns in its place.
    for each in (ours, again):
        neck = each.scale * np.array(NECK_PIVOT) @ each.rotation[:2].T + each.offset
        np.testing.assert_allclose(neck, [128.0, 120.0 + 60.0], atol=6.0)
    assert len(model.template) == 68


def test_pairs_across_people_are_never_one_person(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool")
    # faces, so that a model can be fitted to them
    points = np.stack([[face(9 * i + f, (i, f, 0))[0].points for f in range(3)] for i in range(6)])
    gaze = np.stack([[face(9 * i + f, (i, f, 0))[0].gaze for f in range(3)] for i in range(6)])
    pool = type(pool)(**{**vars(pool), "points": points / 8, "gaze": gaze / 8})
    draw = CrossSampler(pool, IDENTITIES - 2, 12, (1,))
    batch, again = draw(4), draw(4)
    assert batch.driver is not None and batch.source is not None
    np.testing.assert_array_equal(batch.source, again.source)
    assert (batch.driver != batch.identity).all() and batch.driver.max() < IDENTITIES - 2
    np.testing.assert_array_equal(batch.target[:, 0, 0, 0] // 10, batch.driver)
    np.testing.assert_array_equal(batch.source[:, 0, 0, 0] // 10, batch.identity)
    assert batch.condition is not None and batch.condition.std() > 0
    with pytest.raises(SettingsError, match="at least 2"):
        CrossSampler(pool, 1, 4, (1,))


def test_some_people_are_held_out_and_some_are_not(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool")
    assert training_people(pool, 2) == IDENTITIES - 2
    for held_out in (0, IDENTITIES):
        with pytest.raises(SettingsError, match=f"the data has {IDENTITIES} people"):
            training_people(pool, held_out)


def test_heads_without_parameters_read_the_landmarks() -> None:
    points, gaze = face(1, (0.0, 0.0, 0.0))[0].points[None], face(1, (0.0, 0.0, 0.0))[0].gaze[None]
    targets = head_targets(points, gaze, None)
    with_one = head_targets(points, gaze, np.ones((1, 1), np.float32))
    assert targets.sizes == (0, *with_one.sizes[1:])
    np.testing.assert_array_equal(targets.values, with_one.values[:, 1:])
    weights = group_weights(targets.sizes)
    assert weights.sum() == pytest.approx(1.0)
    rest = np.array(GROUP_WEIGHTS[1:])
    starts = np.cumsum([0, *targets.sizes[1:]])
    shares = [weights[a:b].sum() for a, b in zip(starts, starts[1:], strict=False)]
    np.testing.assert_allclose(shares, rest / rest.sum(), rtol=1e-5)
