"""The rendered benchmark: what ships is what the renderer makes, and its truth is exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffusionact.assets import benchmark_path
from diffusionact.commands.eval.people import people, rendered_person
from diffusionact.errors import BundleError, SettingsError
from diffusionact.evaluation.expression import ExpressionFit
from diffusionact.evaluation.rendered import (
    SEED,
    SIZE,
    Person,
    load_people,
    moved_landmarks,
    save_people,
)
from diffusionact.morphable import rendered_face

# The model of 68 landmarks rounds to float32, and the renderer's dense one to its landmarks.
LANDMARKS_PX = 0.02


@pytest.fixture(scope="module")
def shipped() -> list[Person]:
    return load_people(benchmark_path())


def test_what_ships_is_what_the_renderer_makes(shipped: list[Person]) -> None:
    pytest.importorskip("numba")
    for index in (0, len(shipped) - 1):
        made = rendered_person(SEED, index, SIZE)
        assert made.name == shipped[index].name
        for moment in ("source", "target"):
            a, b = getattr(made, moment), getattr(shipped[index], moment)
            np.testing.assert_array_equal(a.image, b.image)
            np.testing.assert_array_equal(a.labels, b.labels)
            np.testing.assert_array_equal(a.landmarks.points, b.landmarks.points)
            np.testing.assert_array_equal(a.pose, b.pose)


def test_more_people_continue_the_series(shipped: list[Person]) -> None:
    pytest.importorskip("numba")
    more = people(len(shipped) + 1)
    assert [p.name for p in more[:-1]] == [p.name for p in shipped]
    assert more[-1].name == f"{SEED}-{len(shipped):05d}"
    other = people(1, seed=3)
    assert other[0].name == "3-00000"
    assert not np.array_equal(other[0].shape, shipped[0].shape)


def test_the_shipped_people_need_no_renderer(
    shipped: list[Person], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusionact.commands.eval.people.rendered_person", pytest.fail)
    assert len(people()) == len(shipped) and len(people(3)) == 3
    with pytest.raises(SettingsError, match="wanted 1"):
        people(0)


def test_own_motion_gives_the_own_landmarks(shipped: list[Person]) -> None:
    """Equation 8 with one person as both is the identity."""
    for person in shipped[:6]:
        for shot in (person.source, person.target):
            made = moved_landmarks(person, shot, rendered_face())
            assert np.abs(made.points - shot.landmarks.points).max() < LANDMARKS_PX
            assert np.abs(made.gaze - shot.landmarks.gaze).max() < LANDMARKS_PX


def test_a_driver_gives_pose_and_expression_not_shape(shipped: list[Person]) -> None:
    pytest.importorskip("numba")
    from diffusionact.training import faces

    rng = np.random.default_rng((SEED, 0))
    identity, camera = faces.sample_identity(rng), faces.sample_camera(rng)
    driver = shipped[1].target
    motion = faces.Motion(
        driver.pose.astype(np.float32), driver.expression.astype(np.float32),
        driver.gaze_deg.astype(np.float32), driver.shift.astype(np.float32),
    )  # fmt: skip
    wanted = faces.render(identity, motion, camera, SIZE).landmarks
    made = moved_landmarks(shipped[0], driver, rendered_face())
    assert np.abs(made.points - wanted.points).max() < LANDMARKS_PX
    assert np.abs(made.gaze - wanted.gaze).max() < LANDMARKS_PX


def test_reading_knows_what_is_hidden(shipped: list[Person]) -> None:
    fit = ExpressionFit(rendered_face())
    readings = [person.target.reading(fit) for person in shipped]
    hidden = [not np.isfinite(reading.gaze).all() for reading in readings]
    assert any(hidden) and not all(hidden)
    for person, reading in zip(shipped, readings, strict=True):
        face = person.target.face
        assert 0.05 < face.mean() < 0.6
        inner = np.rint(reading.points[27:36]).astype(int)  # the nose lies on the face
        assert face[inner[:, 1], inner[:, 0]].mean() > 0.7


def test_the_fit_follows_the_expression(shipped: list[Person]) -> None:
    """What landmarks show plainly is read: the jaw, the smile and the blinks."""
    fit = ExpressionFit(rendered_face())
    shots = [shot for person in shipped for shot in (person.source, person.target)]
    found = np.stack([fit(shot.landmarks.points) for shot in shots])
    truth = np.stack([shot.expression for shot in shots])
    for index, least in ((0, 0.95), (1, 0.9), (10, 0.85), (11, 0.85)):
        assert np.corrcoef(found[:, index], truth[:, index])[0, 1] > least
    assert ((found >= 0) & (found <= 1)).all()


def test_the_fit_is_free_of_place_and_size(shipped: list[Person]) -> None:
    fit = ExpressionFit(rendered_face())
    points = np.asarray(shipped[0].target.landmarks.points, np.float64)
    np.testing.assert_allclose(fit(points), fit(3 * points + 50), atol=1e-9)


def test_people_survive_a_file(tmp_path: Path, shipped: list[Person]) -> None:
    save_people(tmp_path / "x.npz", shipped[:2])
    again = load_people(tmp_path / "x.npz")
    np.testing.assert_array_equal(again[1].target.image, shipped[1].target.image)
    np.testing.assert_array_equal(again[1].irises, shipped[1].irises)
    (tmp_path / "x.npz").write_bytes(b"nothing")
    with pytest.raises(BundleError, match="not the rendered benchmark"):
        load_people(tmp_path / "x.npz")
