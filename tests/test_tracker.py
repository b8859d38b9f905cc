"""Trackers: one face out of several, recorded tracks, and MediaPipe on faces that we rendered."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from diffusionact.errors import BackendMissing, NoFace, SettingsError
from diffusionact.landmarks import Landmarks, Track
from diffusionact.runtime import tracker as tracker_module
from diffusionact.runtime.tracker import (
    LANDMARK_BYTES,
    MediaPipeTracker,
    RecordedTracker,
    portrait_face,
)
from diffusionact.training.faces import Motion, Rendering, render, sample_camera, sample_identity

# Mean distance in eye distances between MediaPipe's points and ours, whose layouts differ a little
# (its lids and lips are thicker). A wrong map of points gives 0.3 and more.
EYES_TOLERANCE, MOUTH_TOLERANCE, IRIS_TOLERANCE = 0.10, 0.10, 0.06
SIDE_PX = 256


def rendered(seed: int) -> Rendering:
    rng = np.random.default_rng(seed)
    rest = Motion(*(np.zeros(size, np.float32) for size in (3, 13, 2, 3)))
    return render(sample_identity(rng), rest, sample_camera(rng), SIDE_PX)


def bgr(rendering: Rendering) -> np.ndarray:
    return np.ascontiguousarray(rendering.image[..., ::-1])


@pytest.fixture(scope="module")
def tracker() -> Iterator[MediaPipeTracker]:
    try:
        made = MediaPipeTracker()
    except BackendMissing as missing:
        pytest.skip(str(missing))
    with made:
        yield made


def test_one_face_is_taken_without_asking(face: Landmarks) -> None:
    assert portrait_face([face]) is face


def test_several_faces_are_named_with_their_places(face: Landmarks) -> None:
    right = face.transformed(np.array([[1.0, 0.0, 100.0], [0.0, 1.0, 0.0]]))
    with pytest.raises(NoFace, match=r"2 faces.*1 at x=\d+ y=\d+, 2 at x=\d+.*--face N"):
        portrait_face([face, right])
    assert portrait_face([face, right], 2) is right
    for wrong in (0, 3):
        with pytest.raises(SettingsError, match="wanted 1 to 2"):
            portrait_face([face, right], wrong)
    with pytest.raises(NoFace, match="no face"):
        portrait_face([])


def test_a_recorded_track_plays_once_in_order(face: Landmarks) -> None:
    points = np.stack([face.points, np.full_like(face.points, np.nan)])
    gaze = np.stack([face.gaze, np.full_like(face.gaze, np.nan)])
    recorded = RecordedTracker(Track(points, gaze, np.array([0, 1]), (32, 32)))
    blank = np.zeros((4, 4, 3), np.uint8)
    np.testing.assert_array_equal(recorded.track(blank).points, face.points)
    with pytest.raises(NoFace, match="frame 1"):
        recorded.track(blank)
    with pytest.raises(NoFace, match="ends after 2"):
        recorded.track(blank)


@pytest.mark.parametrize("seen", [None, "0.10.35"])
def test_a_missing_or_wrong_mediapipe_names_the_command(
    monkeypatch: pytest.MonkeyPatch, seen: str | None
) -> None:
    def version(name: str) -> str:
        if seen is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return seen

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(sys, "version_info", (3, 11, 0))
    with pytest.raises(BackendMissing, match="pip install --no-deps mediapipe==0.10.21"):
        MediaPipeTracker()
    monkeypatch.setattr(tracker_module.sys, "version_info", _Version((3, 13, 0)))
    with pytest.raises(BackendMissing, match="Python 3.12"):
        MediaPipeTracker()


class _Version(tuple[int, ...]):
    major, minor = 3, 13


def test_a_message_of_landmarks_is_decoded() -> None:
    # field 1 (a message of 15 bytes), in it the floats 1, 2 and 3: x, y, z
    packed = b"\n\x0f\r" + np.float32(0.25).tobytes() + b"\x15" + np.float32(0.5).tobytes()
    packed += b"\x1d" + np.float32(-0.125).tobytes()
    assert len(packed) == LANDMARK_BYTES.itemsize
    decoded = tracker_module._decode_landmarks(packed * 2)
    np.testing.assert_array_equal(decoded, [[0.25, 0.5, -0.125]] * 2)


def test_a_rendered_face_is_found_where_it_is(tracker: MediaPipeTracker) -> None:
    truth = rendered(3)
    (found,) = tracker.detect(bgr(truth))
    distance = np.linalg.norm(found.points[:, :2] - truth.landmarks.points[:, :2], axis=1)
    eyes = truth.landmarks.points
    unit = np.linalg.norm(eyes[36:42, :2].mean(axis=0) - eyes[42:48, :2].mean(axis=0))
    assert distance[36:48].mean() / unit < EYES_TOLERANCE
    assert distance[48:].mean() / unit < MOUTH_TOLERANCE
    iris = np.linalg.norm(found.gaze - truth.landmarks.gaze, axis=1).mean()
    assert iris / unit < IRIS_TOLERANCE


def test_all_faces_of_a_picture_are_found_largest_first(tracker: MediaPipeTracker) -> None:
    large, small = bgr(rendered(3)), bgr(rendered(4))[::2, ::2]
    both = np.full((SIDE_PX, SIDE_PX * 2, 3), 90, np.uint8)
    both[:, SIDE_PX:] = large
    both[64:192, 64:192] = small
    faces = tracker.detect(both)
    assert len(faces) == 2
    assert faces[0].points[:, 0].mean() > SIDE_PX > faces[1].points[:, 0].mean()


def test_a_face_that_fills_the_picture_is_found(tracker: MediaPipeTracker) -> None:
    truth = rendered(5)
    left, top = truth.landmarks.points[:, :2].min(axis=0).astype(int)
    right, bottom = truth.landmarks.points[:, :2].max(axis=0).astype(int)
    close = np.ascontiguousarray(bgr(truth)[top - 8 : bottom + 4, left:right])
    (found,) = tracker.detect(close)
    back = found.points[:, :2] + (left, top - 8)
    assert np.abs(back[48:] - truth.landmarks.points[48:, :2]).mean() < 0.1 * (right - left)


def test_a_clip_without_a_face_raises_frame_by_frame(tracker: MediaPipeTracker) -> None:
    truth = bgr(rendered(3))
    tracker.track(truth)
    for _ in range(2):
        with pytest.raises(NoFace):
            tracker.track(np.full_like(truth, 90))
    tracker.track(truth)


def test_the_libraries_write_nothing(
    tracker: MediaPipeTracker, capfd: pytest.CaptureFixture[str]
) -> None:
    with MediaPipeTracker() as fresh:
        fresh.detect(bgr(rendered(3)))
    assert capfd.readouterr().err == ""


def test_only_the_first_picture_is_run_in_silence(
    tracker: MediaPipeTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    blank = np.full((SIDE_PX, SIDE_PX, 3), 90, np.uint8)
    with MediaPipeTracker() as fresh:
        with pytest.raises(NoFace):
            fresh.track(blank)
        monkeypatch.setattr(tracker_module, "_silent_stderr", lambda: pytest.fail("silenced"))
        with pytest.raises(NoFace):
            fresh.track(blank)
