"""Sessions: many drivers on one reenactor, none of them seen by another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from diffusionact.errors import SettingsError
from diffusionact.landmarks import Landmarks, Track
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.session import Session
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.source import Source

Portrait = tuple[npt.NDArray[np.uint8], Landmarks]
FRAME_NS = 40_000_000


@pytest.fixture
def act(toy_bundle: Path) -> Iterator[Reenactor]:
    with Reenactor.load(toy_bundle, settings=Settings(threads=1)) as act:
        yield act


@pytest.fixture
def source(act: Reenactor, portrait: Portrait) -> Source:
    return act.prepare(portrait[0], landmarks=portrait[1])


def swaying(face: Landmarks, frames: int, reach_px: float) -> list[Landmarks]:
    """The face, moved sideways and back."""
    shifts = reach_px * np.sin(np.arange(frames) / 3.0)
    return [face.transformed(np.array([[1.0, 0.0, x], [0.0, 1.0, 0.0]])) for x in shifts]


def drive(act: Reenactor, session: Session, motion: list[Landmarks]) -> list[Landmarks]:
    return [act.reenact(f, session, i * FRAME_NS).landmarks for i, f in enumerate(motion)]


def test_two_sessions_on_one_source_do_not_see_each_other(
    act: Reenactor, source: Source, portrait: Portrait
) -> None:
    motions = swaying(portrait[1], 12, 6.0), swaying(portrait[1], 12, -3.0)
    alone = [drive(act, act.session(source), motion) for motion in motions]
    first, second = act.session(source), act.session(source)
    for i in range(12):
        for session, motion, wanted in zip((first, second), motions, alone, strict=True):
            seen = act.reenact(motion[i], session, i * FRAME_NS).landmarks
            assert np.array_equal(seen.points, wanted[i].points)
    assert not np.array_equal(alone[0][3].points, alone[1][3].points)


def test_the_unnamed_session_is_one_more(
    act: Reenactor, source: Source, portrait: Portrait
) -> None:
    motion = swaying(portrait[1], 6, 6.0)
    wanted = drive(act, act.session(source), motion)
    session = act.session(source)
    for i, face in enumerate(motion):
        act.reenact(motion[-1 - i], session, i * FRAME_NS)
        unnamed = act.reenact(face, source, i * FRAME_NS).landmarks
        assert np.array_equal(unnamed.points, wanted[i].points)


def test_a_started_session_is_measured_from_what_it_is_given(
    act: Reenactor, source: Source, portrait: Portrait
) -> None:
    motion = swaying(portrait[1], 40, 6.0)
    session = act.session(source)
    session.start()  # from the first second: until it is over, the source rests
    at_rest = act.session(source).target(None, 0)
    targets = [session.target(face, i * FRAME_NS) for i, face in enumerate(motion)]
    assert np.allclose(targets[5].points[:, :2], at_rest.points[:, :2], atol=1e-3)
    moved = [np.abs(target.points[:, :2] - at_rest.points[:, :2]).max() for target in targets]
    assert max(moved[:25]) < 1e-3 and max(moved[26:]) > 0.5
    stacked = np.stack([face.points for face in motion])
    gaze = np.stack([face.gaze for face in motion])
    track = Track(stacked, gaze, np.arange(40) * FRAME_NS, (80, 90))
    session.start(track)
    assert not np.allclose(session.target(motion[5], 0).points, at_rest.points, atol=1e-1)


def test_a_session_refuses_a_source_of_other_weights(act: Reenactor, source: Source) -> None:
    with pytest.raises(SettingsError, match="prepared with weights"):
        act.session(replace(source, weights_sha256="ef" * 32))
