"""Rendered faces: the ground truth is where the picture shows it; depth decides what is seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diffusionact.export.bundle import FACE128_CARD
from diffusionact.landmarks import crop_matrix, fit_similarity
from diffusionact.morphable import angles, pose, project, rendered_face, rotation
from diffusionact.training.face_shape import EXPRESSION, NECK_PIVOT
from diffusionact.training.faces import (
    FRAME_CENTRE_Y,
    FRAME_UNITS,
    HAIR_STYLES,
    POSE_RANGE_DEG,
    Camera,
    Identity,
    Motion,
    Rendering,
    render,
    sample_camera,
    sample_identity,
    sample_motion,
    scene,
)

pytestmark = pytest.mark.torch  # the development environment: numba is not in the plain one

EYES, MOUTH = 2, 3
NEAR_FRONTAL_DEG = 12.0  # of yaw: portraits are
CROP_TOLERANCE = 0.02  # people differ by 0.09: over 500 of them, five standard errors
CAMERA = Camera(FRAME_UNITS, np.array([0.0, FRAME_CENTRE_Y], np.float32))


def person(seed: int = 4) -> Identity:
    """Somebody without glasses or fringe before the eyes."""
    who = sample_identity(np.random.default_rng(seed))
    return replace(who, glasses=0, style=HAIR_STYLES.index("short"))


def motion(pose: tuple[float, float, float] = (0, 0, 0), gaze: tuple[float, float] = (0, 0),
           **expression: float) -> Motion:  # fmt: skip
    values = np.array([expression.get(name, 0.0) for name in EXPRESSION], np.float32)
    return Motion(
        np.array(pose, np.float32), values, np.array(gaze, np.float32), np.zeros(3, np.float32)
    )


def shot(**changes: object) -> Rendering:
    return render(person(), motion(**changes), CAMERA)  # type: ignore[arg-type]


def area(made: Rendering, label: int) -> int:
    return int((made.labels == label).sum())


def test_a_seed_is_a_picture() -> None:
    def make() -> Rendering:
        rng = np.random.default_rng(11)
        return render(sample_identity(rng), sample_motion(rng), sample_camera(rng), 96)

    first, second = make(), make()
    assert np.array_equal(first.image, second.image)
    assert first.image.shape == (96, 96, 3) and first.image.dtype == np.uint8
    assert first.landmarks.points.shape == (68, 3) and first.landmarks.gaze.shape == (2, 2)
    assert np.isfinite(first.landmarks.points).all() and np.isfinite(first.parameters).all()
    assert np.abs(first.parameters).max() < 4, "parameters are about -1..1"


def test_a_prepared_scene_renders_the_same() -> None:
    who = person()
    assert np.array_equal(
        render(scene(who), motion((20, 5, 0)), CAMERA).image,
        render(who, motion((20, 5, 0)), CAMERA).image,
    )


@pytest.mark.parametrize("pose", [(0, 0, 0), (25, 0, 0), (-25, 10, 0), (0, -15, 20)])
def test_landmarks_lie_on_what_they_mark(pose: tuple[float, float, float]) -> None:
    made = shot(pose=pose)
    for gaze in made.landmarks.gaze:
        x, y = np.floor(gaze).astype(int)
        assert EYES in made.labels[y - 1 : y + 2, x - 1 : x + 2], "an iris is in its eye"
    for index in (51, 57, 62, 66):
        x, y = np.floor(made.landmarks.points[index, :2]).astype(int)
        assert MOUTH in made.labels[y - 2 : y + 3, x - 2 : x + 3], f"lip point {index}"


def test_the_far_eye_hides_at_the_end_of_the_yaw_range() -> None:
    front, side = shot(), shot(pose=(POSE_RANGE_DEG[0], 0, 0))
    left = side.landmarks.gaze[:, 0].min() + side.landmarks.gaze[:, 0].max()
    split = int(left / 2)
    near, far = (side.labels[:, :split] == EYES).sum(), (side.labels[:, split:] == EYES).sum()
    assert far < 0.75 * near, "the eye beyond the nose shows less"
    assert area(side, EYES) < area(front, EYES)


def test_expression_moves_picture_and_truth_together() -> None:
    rest, open_, shut = shot(), shot(jaw_open=0.9), shot(blink_a=1.0, blink_b=1.0)
    assert area(open_, MOUTH) > 1.5 * area(rest, MOUTH)
    gap = open_.landmarks.points[66, 1] - open_.landmarks.points[62, 1]
    assert gap > 10 * max(float(rest.landmarks.points[66, 1] - rest.landmarks.points[62, 1]), 0.2)
    lids = shut.landmarks.points[[41, 40], 1] - shut.landmarks.points[[37, 38], 1]
    open_lids = rest.landmarks.points[[41, 40], 1] - rest.landmarks.points[[37, 38], 1]
    assert (np.abs(lids) < 0.15 * open_lids).all()


def test_gaze_moves_the_iris_in_the_picture() -> None:
    left, right = shot(gaze=(-30, 0)), shot(gaze=(30, 0))
    assert (right.landmarks.gaze[:, 0] - left.landmarks.gaze[:, 0] > 4).all()
    assert np.allclose(left.landmarks.points, right.landmarks.points), "only the iris moves"

    def darkest(made: Rendering) -> float:
        """Column of the darkest part of the first eye: the pupil's."""
        x0, x1 = (int(made.landmarks.points[i, 0]) for i in (36, 39))
        y = int(made.landmarks.points[36:42, 1].mean())
        strip = made.image[y - 1 : y + 2, x0 + 2 : x1 - 1].sum((0, 2)).astype(float)
        return x0 + 2 + float(strip.argmin())

    assert darkest(right) - darkest(left) > 3


def test_pose_is_what_the_points_say() -> None:
    wanted = (28.0, -9.0, 14.0)
    rest, turned = shot().landmarks.points, shot(pose=wanted).landmarks.points
    _, matrix, _ = fit_similarity(rest.astype(float), turned.astype(float))
    assert np.allclose(angles(matrix), wanted, atol=0.05)


def landmarks(who: Identity, moved: Motion, camera: Camera, side: int) -> np.ndarray:
    """The points [68, 3] that `render` gives with its picture, a hundred times faster."""
    face = rendered_face()
    points = np.asarray(face.landmarks(face.shape(who.shape, moved.expression)), np.float64)
    turned = pose(points, rotation(moved.pose), NECK_PIVOT, moved.shift)
    scale = side / camera.units
    return np.asarray(project(turned, scale, side / 2 - scale * camera.centre))


def test_the_bundles_crop_shows_a_face_as_large_as_it_was_in_training() -> None:
    frames = []
    for seed in range(2000):
        rng = np.random.default_rng((5, seed))
        frames.append((sample_identity(rng), sample_motion(rng), sample_camera(rng)))
    near_frontal = [frame for frame in frames if abs(frame[1].pose[0]) < NEAR_FRONTAL_DEG]
    made = render(*near_frontal[0], 64).landmarks.points
    np.testing.assert_allclose(landmarks(*near_frontal[0], 64), made, atol=1e-3)
    scale = FACE128_CARD.crop.scale
    crops = [crop_matrix(landmarks(*frame, 128), 128, scale=scale) for frame in near_frontal]
    ratios = [np.sqrt(np.linalg.det(crop[:, :2])) for crop in crops]
    assert len(ratios) > 500
    assert np.mean(ratios) == pytest.approx(1, abs=CROP_TOLERANCE)
