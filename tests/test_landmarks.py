from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from diffusionact import landmarks as lm
from diffusionact.errors import MediaError, NoFace, SettingsError
from diffusionact.landmarks import Landmarks, Track

GOLDEN = np.load(Path(__file__).parent / "golden" / "image_small.npz")
GREY_LEVELS = 1.001  # the reference truncates to a grey level and keeps integer corners
GAZE_ATOL = 1e-4  # float32 pixels


def a_face(seed: int = 0) -> Landmarks:
    """A frontal 68-point face, inter-eye distance 32 px, with depth."""
    rng = np.random.default_rng(seed)
    points = np.array(GOLDEN["crop_inside_lm"], np.float64)
    depth = rng.normal(size=(68, 1)) * 4.0
    return Landmarks(
        np.concatenate([points, depth], axis=1).astype(np.float32),
        np.stack([points[36:42].mean(0), points[42:48].mean(0)]).astype(np.float32),
        0.9,
    )


def a_track() -> Track:
    points = np.stack([a_face(i).points for i in range(3)])
    points[1] = np.nan
    gaze = np.stack([a_face(i).gaze for i in range(3)])
    return Track(points, gaze, np.array([0, 40_000_000, 90_000_001]), (256, 200))


def sample_bilinear(
    image: npt.NDArray[np.uint8], matrix: npt.NDArray[np.float64], side: int
) -> npt.NDArray[np.float64]:
    """The crop that `matrix` describes, in float64 and by the definition."""
    row, column = np.mgrid[:side, :side]
    ones = np.ones(side * side)
    x, y = lm.invert_affine(matrix) @ np.stack([column.ravel(), row.ravel(), ones])
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right_part, lower_part = (x - left)[:, None], (y - top)[:, None]
    upper = image[top, left] * (1 - right_part) + image[top, left + 1] * right_part
    lower = image[top + 1, left] * (1 - right_part) + image[top + 1, left + 1] * right_part
    return (upper * (1 - lower_part) + lower * lower_part).reshape(side, side, 3)


@pytest.mark.parametrize(
    ("points", "gaze"), [((68, 2), (2, 2)), ((1, 68, 3), (2, 2)), ((68, 3), (2, 3)), ((68, 3), ())]
)
def test_landmarks_of_other_shapes_are_refused(
    points: tuple[int, ...], gaze: tuple[int, ...]
) -> None:
    with pytest.raises(SettingsError, match=r"wanted \[68,3\]"):
        Landmarks(np.zeros(points, np.float32), np.zeros(gaze, np.float32))


def test_a_track_holds_a_face_only_where_all_of_it_is_known() -> None:
    track = a_track()
    track.gaze[0, 1] = np.nan
    track.landmarks[1] = 3.0
    assert track[0] is None and track[1] is None and track[2] is not None


@pytest.mark.parametrize("case", ["inside", "small"])
def test_the_published_crop(case: str) -> None:
    matrix = lm.crop_matrix(GOLDEN[f"crop_{case}_lm"], 256, rotate=True)
    crop = sample_bilinear(GOLDEN["img"], matrix, 256)[::4, ::4]
    assert np.abs(crop - GOLDEN[f"crop_{case}_out"]).max() <= GREY_LEVELS


@pytest.mark.parametrize("rotate", [True, False])
def test_a_wider_crop_has_the_same_centre_and_direction(rotate: bool) -> None:
    points, middle = GOLDEN["crop_small_lm"], (127 / 2, 127 / 2, 1.0)
    plain, wide = (lm.crop_matrix(points, 128, rotate, scale) for scale in (1.0, 1.13))
    np.testing.assert_allclose(wide[:, :2] * 1.13, plain[:, :2], rtol=1e-12)
    centres = [lm.invert_affine(matrix) @ middle for matrix in (plain, wide)]
    np.testing.assert_allclose(centres[0], centres[1], rtol=1e-12)


def test_an_upright_crop_has_the_centre_and_size_of_the_published_one() -> None:
    points = GOLDEN["crop_small_lm"]
    levelled, upright = (lm.crop_matrix(points, 128, rotate) for rotate in (True, False))
    assert upright[0, 1] == upright[1, 0] == 0.0 and upright[0, 0] == upright[1, 1] > 0.0
    assert np.hypot(*levelled[:, 0]) == pytest.approx(upright[0, 0])
    middle = (128 - 1) / 2
    for inverse in (lm.invert_affine(levelled), lm.invert_affine(upright)):
        centre = inverse @ (middle, middle, 1.0)
        eyes = (points[36:42].mean(0) + points[42:48].mean(0)) / 2
        mouth = (points[48] + points[54]) / 2
        np.testing.assert_allclose(centre, eyes + 0.1 * (mouth - eyes), atol=1e-4)


@pytest.mark.parametrize("value", [7.0, np.nan])
def test_points_that_span_no_face_are_refused(value: float) -> None:
    with pytest.raises(NoFace, match="span no face"):
        lm.crop_matrix(np.full((68, 2), value), 128)


@pytest.mark.parametrize("index", [0, 1])
def test_gaze_points_are_the_published_ones(index: int) -> None:
    pitch, yaw = (float(v) for v in GOLDEN["gaze_pitchyaw"][0])
    seen = lm.gaze_points(GOLDEN["stick_lm"][index], pitch, yaw)
    wanted = np.stack([GOLDEN["gaze_left_pt"][index], GOLDEN["gaze_right_pt"][index]])
    np.testing.assert_allclose(seen, wanted, atol=GAZE_ATOL)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_fit_similarity_finds_the_motion_it_was_given(dimensions: int) -> None:
    rng = np.random.default_rng(5)
    source = rng.standard_normal((20, dimensions))
    basis = np.linalg.qr(rng.standard_normal((dimensions, dimensions)))[0]
    rotation = basis * np.sign(np.linalg.det(basis)) if dimensions == 3 else basis
    rotation[:, 0] *= np.sign(np.linalg.det(rotation))
    shift = rng.standard_normal(dimensions)
    scale, seen, offset = lm.fit_similarity(source, 1.7 * source @ rotation.T + shift)
    assert scale == pytest.approx(1.7)
    np.testing.assert_allclose(seen, rotation, atol=1e-12)
    np.testing.assert_allclose(offset, shift, atol=1e-12)


def test_fit_similarity_never_mirrors() -> None:
    source = np.random.default_rng(6).standard_normal((12, 3))
    _, rotation, _ = lm.fit_similarity(source, source * (-1, 1, 1))
    assert np.linalg.det(rotation) == pytest.approx(1.0)


def test_transformed_turns_points_and_gaze_and_scales_depth() -> None:
    face = a_face()
    moved = face.transformed(np.array([[0.0, -2.0, 5.0], [2.0, 0.0, 1.0]]))
    x, y, z = face.points[30]
    np.testing.assert_allclose(moved.points[30], (5 - 2 * y, 1 + 2 * x, 2 * z), rtol=1e-6)
    np.testing.assert_allclose(moved.gaze[1], (5 - 2 * face.gaze[1, 1], 1 + 2 * face.gaze[1, 0]))
    assert moved.score == face.score and moved.points.dtype == np.float32


def test_the_mesh_gives_68_points_and_the_irises() -> None:
    mesh = np.arange(478 * 3, dtype=np.float64).reshape(478, 3)
    face = lm.from_mediapipe(mesh)
    assert face.points.shape == (68, 3) and face.gaze.shape == (2, 2)
    np.testing.assert_array_equal(face.points[3], (mesh[132] + mesh[58]) / 2)
    np.testing.assert_array_equal(face.points[8], mesh[152])
    np.testing.assert_array_equal(face.points[45], mesh[263])
    np.testing.assert_array_equal(face.points[66], mesh[14])
    np.testing.assert_array_equal(face.gaze, mesh[[468, 473], :2])


def test_a_track_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    track = a_track()
    track.save(tmp_path / "new" / "clip.npz")
    seen = Track.load(tmp_path / "new" / "clip.npz")
    np.testing.assert_array_equal(seen.landmarks, track.landmarks)
    np.testing.assert_array_equal(seen.pts_ns, track.pts_ns)
    assert seen.size == track.size and len(seen) == 3
    assert seen[1] is None
    face = seen[2]
    assert face is not None and np.array_equal(face.gaze, track.gaze[2])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["clip.npz"]


def test_a_track_is_as_readable_as_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    a_track().save(tmp_path / "clip.npz")
    assert (tmp_path / "clip.npz").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_normalised_mesh_track_is_read_in_pixels_at_25_fps(tmp_path: Path) -> None:
    mesh = np.full((2, 478, 3), 0.5, np.float16)
    mesh[1] = np.nan
    np.savez(tmp_path / "mesh.npz", landmarks=mesh, size=np.array([640, 480]))
    track = Track.load(tmp_path / "mesh.npz")
    np.testing.assert_array_equal(track.landmarks[0, 0], (320, 240, 320))
    assert track[1] is None and track.pts_ns.tolist() == [0, 40_000_000]


def test_points_without_depth_are_read_as_unknown_depth(tmp_path: Path) -> None:
    face = a_face()
    np.savez(
        tmp_path / "flat.npz",
        landmarks=face.points[None, :, :2],
        gaze=face.gaze[None],
        pts_ns=np.array([7]),
        size=np.array([256, 256]),
    )
    track = Track.load(tmp_path / "flat.npz")
    assert track[0] is not None and np.isnan(track.landmarks[0, :, 2]).all()


def one_face(**arrays: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a good track of two frames, but for those given."""
    good = {
        "landmarks": np.zeros((2, 68, 3)),
        "gaze": np.zeros((2, 2, 2)),
        "pts_ns": np.array([0, 40]),
        "size": np.array([4, 4]),
    }
    return {**good, **arrays}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"points": np.zeros(3)}, "wanted the arrays landmarks and size"),
        ({"landmarks": np.zeros((0, 68, 3)), "size": np.array([4, 4])}, "N > 0"),
        ({"landmarks": np.zeros((2, 70, 3)), "size": np.array([4, 4])}, "2, 70, 3"),
        (
            {
                "landmarks": np.zeros((2, 68, 3)),
                "gaze": np.zeros((1, 2, 2)),
                "size": np.array([4, 4]),
            },
            "do not fit",
        ),
        (one_face(size=np.array([4, 4, 3])), "size .* wanted width and height"),
        (one_face(size=np.array(4)), "size .* wanted width and height"),
        (one_face(size=np.array([np.nan, 4])), "size .* wanted width and height"),
        (one_face(size=np.array(["4", "4"])), "size holds <U1"),
        (one_face(landmarks=np.full((2, 68, 3), "a")), "landmarks holds"),
        (one_face(gaze=np.full((2, 2, 2), b"a")), "gaze holds"),
        (one_face(pts_ns=np.array(["0", "1"])), "pts_ns holds"),
        (one_face(pts_ns=np.array([0.0, np.nan])), "do not rise"),
        (one_face(pts_ns=np.array([40, 0])), "do not rise"),
        (one_face(pts_ns=np.array([7, 7])), "do not rise"),
    ],
)
def test_a_track_of_other_shapes_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(MediaError, match=message):
        Track.load(tmp_path / "bad.npz")


NPY = b"\x93NUMPY\x01\x00\x46\x00{'descr': '<i8', 'fortran_order': False, 'shape': (), }"


@pytest.mark.parametrize("content", [None, b"", b"not a zip file", b"PK\x03\x04 cut short", NPY])
def test_a_missing_or_broken_track_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "clip.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=r"clip\.npz"):
        Track.load(path)


def test_a_failed_save_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clip.npz"
    a_track().save(path)
    before = path.read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(MediaError, match="No space left"):
        a_track().save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["clip.npz"]


def test_a_track_into_a_path_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MediaError, match="cannot be written"):
        a_track().save(tmp_path / "file" / "clip.npz")


def test_another_kind_of_file_is_no_track_and_nobody_is_told_to_unpickle_it(tmp_path: Path) -> None:
    wrong = tmp_path / "notes.npz"
    wrong.write_text("# Notes\n")
    with pytest.raises(MediaError, match="cannot be read as a landmark track") as refused:
        Track.load(wrong)
    assert "another kind of file" in str(refused.value) and "pickle" not in str(refused.value)
