"""The neutral face, that a driver's motion is measured from: found in a clip, or live."""

from __future__ import annotations

import numpy as np
import pytest

from diffusionact.errors import NoFace
from diffusionact.landmarks import Landmarks
from diffusionact.morphable import angles, rendered_face
from diffusionact.runtime.neutral import calmest
from diffusionact.runtime.retarget import MOST_HEADS, Retargeter
from tests.drivers import (
    BLINK_A,
    BLINK_B,
    FPS,
    JAW_OPEN,
    SMILING,
    measured,
    rendered_driver,
    resting_source,
)


@pytest.fixture(scope="module")
def source() -> Landmarks:
    return resting_source()


def test_live_the_first_second_is_the_neutral_face(source: Landmarks) -> None:
    retargeter = Retargeter(source)
    retargeter.calibrate()
    aside, further = rendered_driver((10, 0, 0)), rendered_driver((30, 0, 0))
    for i in range(31):
        target = retargeter.target(aside, round(i * 1e9 / FPS))
        np.testing.assert_allclose(target.points, source.points, atol=0.05)
    for i in range(31, 90):
        target = retargeter.target(further, round(i * 1e9 / FPS))
    assert measured(target)["yaw"] == pytest.approx(20.0, abs=1.0)


@pytest.mark.parametrize("smiling", [0.3, 0.6])
def test_live_the_neutral_face_need_not_be_the_first(source: Landmarks, smiling: float) -> None:
    """Someone who smiles, talks, blinks and turns while the neutral face is looked for."""
    retargeter = Retargeter(source)
    retargeter.calibrate()
    rng = np.random.default_rng(0)
    busy = {SMILING: 0.9, JAW_OPEN: 0.5}
    for i in range(32):
        turn = (rng.uniform(-15, 15), 0, 0) if rng.random() < smiling else (0, 0, 0)
        wears = busy if i < 32 * smiling else {BLINK_A: 1.0, BLINK_B: 1.0} if i % 9 == 0 else {}
        retargeter.target(rendered_driver(turn, wears), round(i * 1e9 / FPS))
        assert retargeter.calibrating == (i < 30)
    for i in range(32, 90):
        target = retargeter.target(rendered_driver(), round(i * 1e9 / FPS))
    rest, seen = measured(source), measured(target)
    assert abs(seen["yaw"] - rest["yaw"]) < 4.0
    assert seen["mouth"] == pytest.approx(rest["mouth"], abs=0.02)
    assert seen["width"] == pytest.approx(rest["width"], rel=0.03)
    assert seen["lids"] == pytest.approx(rest["lids"], rel=0.1)


def test_live_a_neutral_face_is_not_made_of_one_frame(source: Landmarks) -> None:
    retargeter = Retargeter(source)
    retargeter.calibrate()
    retargeter.target(rendered_driver(), 0)
    for i in range(40):
        retargeter.target(None, round((0.1 + i / 20) * 1e9))
    retargeter.target(rendered_driver(), 3_000_000_000)
    assert retargeter.calibrating


def test_another_portrait_follows_on_without_calibrating(source: Landmarks) -> None:
    one, other = Retargeter(source), Retargeter(source)
    one.calibrate()
    for i in range(40):
        one.target(rendered_driver((10, 0, 0)), round(i * 1e9 / FPS))
    other.follow_on(one)
    assert not other.calibrating
    for i in range(40, 80):
        target = other.target(rendered_driver((30, 0, 0)), round(i * 1e9 / FPS))
    assert measured(target)["yaw"] == pytest.approx(20.0, abs=1.0)


def test_a_clip_without_a_face_has_no_neutral(source: Landmarks) -> None:
    with pytest.raises(NoFace, match="no face in any frame"):
        Retargeter(source).calibrate([None, None])


def test_the_calmest_face_is_frontal_and_shut(source: Landmarks) -> None:
    faces = [
        rendered_driver((25, 0, 0)),
        rendered_driver(expression={JAW_OPEN: 0.7}),
        rendered_driver(expression={BLINK_A: 1.0, BLINK_B: 1.0}),
        rendered_driver((2, 0, 0)),
    ]
    neutral = calmest(faces, rendered_face().template)
    assert angles(neutral.rotation)[0] == pytest.approx(2.0, abs=0.5)


def test_live_a_clock_that_stands_still_gathers_no_more_than_a_second(source: Landmarks) -> None:
    """Whoever sends times that hardly move must not make a server remember every frame."""
    retargeter = Retargeter(source)
    retargeter.calibrate()
    face = rendered_driver()
    for i in range(MOST_HEADS):
        assert retargeter.calibrating
        retargeter.target(face, i)
    assert not retargeter.calibrating
