from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffusionact.condition import Drawing, draw_condition
from diffusionact.landmarks import Landmarks

GOLDEN = np.load(Path(__file__).parent / "golden" / "image_small.npz")
OPENCV_PIXELS = 16  # OpenCV 5 sets 1-2 line pixels otherwise than 4.11, which made the reference
OURS = Drawing(thickness_px=1, disc_radius_px=1.5, antialias=True)


def golden_face(index: int, gaze: bool = True) -> Landmarks:
    points = np.full((68, 3), np.nan, np.float32)
    points[:, :2] = GOLDEN["stick_lm"][index]
    eyes = np.stack([GOLDEN["gaze_left_pt"][index], GOLDEN["gaze_right_pt"][index]])
    return Landmarks(points, eyes if gaze else np.full((2, 2), np.nan, np.float32))


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("name", "gaze"), [("stick_gaze_u8", True), ("stick_nogaze_u8", False)])
def test_the_published_drawing(index: int, name: str, gaze: bool) -> None:
    drawn = draw_condition(golden_face(index, gaze), 256, Drawing())
    differs = np.any(drawn.transpose(2, 0, 1) != GOLDEN[name][index], axis=0)
    assert differs.sum() <= OPENCV_PIXELS


def test_background_is_the_one_asked_for_and_a_buffer_is_reused() -> None:
    out = np.full((64, 64, 3), 77, np.uint8)
    far = golden_face(0).transformed(np.array([[1.0, 0.0, 1e6], [0.0, 1.0, 0.0]]))
    assert draw_condition(far, 64, Drawing(background=9), out) is out
    assert np.all(out == 9)


def test_antialiased_lines_follow_a_tenth_of_a_pixel() -> None:
    face = golden_face(0).transformed(np.array([[0.5, 0.0, 0.0], [0.0, 0.5, 0.0]]))
    moved = face.transformed(np.array([[1.0, 0.0, 0.1], [0.0, 1.0, 0.0]]))
    at_rest, after = (draw_condition(x, 128, OURS).astype(int) for x in (face, moved))
    assert np.abs(after - at_rest).sum() > 0
    # nothing else than a small shift: no pixel jumps by half its range
    assert np.abs(after - at_rest).max() < 128


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e30, 1e30])
def test_unknown_and_wild_points_do_no_harm(bad: float) -> None:
    face = golden_face(0)
    points, gaze = face.points.copy(), face.gaze.copy()
    points[50, 0] = gaze[1, 1] = bad
    drawn = draw_condition(Landmarks(points, gaze), 256, OURS)
    brow = (drawn[..., 0] > 150) & (drawn[..., 1:] < 60).all(axis=2)
    assert brow.any()  # the rest of the face is still there


def test_an_unknown_point_leaves_out_its_own_curve_only() -> None:
    face = golden_face(0)
    points = face.points.copy()
    points[62] = np.nan
    drawn = draw_condition(Landmarks(points, face.gaze), 256, Drawing())
    whole = draw_condition(face, 256, Drawing())
    lost = np.any(drawn != whole, axis=2)
    assert lost.any()
    inner = face.points[60:68, :2]
    rows, columns = np.nonzero(lost)
    assert columns.min() >= inner[:, 0].min() - 2 and columns.max() <= inner[:, 0].max() + 2
    assert rows.min() >= inner[:, 1].min() - 2 and rows.max() <= inner[:, 1].max() + 2
