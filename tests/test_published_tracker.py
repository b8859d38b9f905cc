"""The published tracker strung together, over networks that see what a test picture holds.

The pictures hold their own coordinates as colours, so that a network that finds colours finds
places: if any crop on the way were misplaced, the landmarks would be too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from diffusionact import manifest as manifest_file
from diffusionact.condition import draw_condition
from diffusionact.errors import BundleError, NoFace, SettingsError
from diffusionact.landmarks import Landmarks, Track, gaze_points, invert_affine
from diffusionact.manifest import TensorSpec, tracker_tensors
from diffusionact.morphable import Flame, flame_from, flame_pixels
from diffusionact.runtime import tracker as tracker_module
from diffusionact.runtime.clip import run_clip
from diffusionact.runtime.component import check_bound
from diffusionact.runtime.published.codes import FaceCodes
from diffusionact.runtime.published.tracker import PublishedTracker
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.source import Source
from diffusionact.runtime.tracker import open_tracker_of

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]

# A colour has 256 levels over the picture, and a heat map 64 cells over a face.
FINE_PX, PUBLISHED_PX = 4.0, 6.0
CODE_TOLERANCE = 0.03  # of the colour in the middle of a crop, 0..1
SIZE = (420, 300)


@dataclass(frozen=True)
class Seen:
    """A face of a test picture. points: [68,2], shares of its width and height."""

    points: npt.NDArray[np.float64]
    score: float

    @property
    def box(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        return self.points.min(axis=0), self.points.max(axis=0)

    def in_picture(self, size: tuple[int, int] = SIZE) -> npt.NDArray[np.float64]:
        return self.points * (np.array(size) - 1)


def coordinates(size: tuple[int, int] = SIZE) -> UInt8Array:
    """A picture, BGR: red rises to the right, green to the bottom."""
    width, height = size
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.rint(np.stack([np.zeros_like(red), green, red], axis=-1)).astype(np.uint8)


def place_of(colours: Float32Array, point: npt.NDArray[np.float64]) -> tuple[int, int]:
    """Where a picture, [3,H,W] in 0..1, has the colours of a point: x, y. The middle, where many
    pixels have them."""
    far = np.abs(colours[0] - point[0]) + np.abs(colours[1] - point[1])
    rows, columns = np.nonzero(far < far.min() + 1e-4)
    return int(np.median(columns)), int(np.median(rows))


class StandIn:
    """A component that is a function of its picture."""

    def __init__(
        self, name: str, compute: Callable[[Float32Array], Mapping[str, Float32Array]]
    ) -> None:
        inputs, outputs = tracker_tensors()[name]
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in inputs}
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in outputs}
        self._compute, self._arrays = compute, dict[str, Float32Array]()

    def bind(self, **arrays: Float32Array) -> None:
        check_bound({**self.inputs, **self.outputs}, arrays)
        self._arrays = arrays

    def run(self) -> None:
        for name, value in self._compute(self._arrays["image"]).items():
            self._arrays[name][...] = value


class World:
    """The faces that the networks can see."""

    def __init__(self, *faces: Seen) -> None:
        self.faces: list[Seen] = list(faces)
        self.detections = 0

    def networks(self) -> dict[str, StandIn]:
        made = {"s3fd": self.s3fd, "fan": self.fan, "emoca": self.emoca, "gaze": self.gaze}
        return {name: StandIn(name, compute) for name, compute in made.items()}

    def s3fd(self, image: Float32Array) -> Mapping[str, Float32Array]:
        self.detections += 1
        maps = {}
        for spec in tracker_tensors()["s3fd"][1]:
            maps[spec.name] = np.zeros([int(size) for size in spec.shape], np.float32)
            if spec.name.startswith("box_logits"):
                maps[spec.name][0, 1] = -6.0
        if not image.any():
            return maps
        for face in self.faces:
            low, high = (np.array(place_of(image[0] / 255.0, end)) for end in face.box)
            centre, size = (low + high) / 2.0, np.maximum(high - low, 1.0)
            column, row = ((centre - 8) / 16).round().astype(int)
            prior = 8 + 16 * np.array([column, row])
            maps["offsets_2"][0, :, row, column] = (
                *((centre - prior) / 6.4),
                *(np.log(size / 64) / 0.2),
            )
            maps["box_logits_2"][0, :, row, column] = 0.0, np.log(face.score / (1 - face.score))
        return maps

    def fan(self, image: Float32Array) -> Mapping[str, Float32Array]:
        middle = image[0, :2, 118:138, 118:138].mean(axis=(1, 2))
        far = [np.hypot(*(face.points.mean(axis=0) - middle)) for face in self.faces]
        heatmaps = np.zeros((1, 68, 64, 64), np.float32)
        for i, point in enumerate(self.faces[int(np.argmin(far))].points):
            x, y = place_of(image[0], point)
            heatmaps[0, i, y // 4, x // 4] = 1.0
        return {"heatmaps": heatmaps}

    def emoca(self, image: Float32Array) -> Mapping[str, Float32Array]:
        red, green, _ = image[0, :, 100:124, 100:124].mean(axis=(1, 2))
        codes = {"shape": np.zeros(100), "expression": np.zeros(50), "pose": np.zeros(6)}
        codes["shape"][0], codes["expression"][0], codes["pose"][1] = red, green, 0.4 * red
        made = {**codes, "camera": np.array([6.0 + green, 0.0, 0.0])}
        return {name: value[None].astype(np.float32) for name, value in made.items()}

    def gaze(self, image: Float32Array) -> Mapping[str, Float32Array]:
        means = image[0, :2, 100:124, 100:124].mean(axis=(1, 2)) * (0.229, 0.224) + (0.485, 0.456)
        return {"pitch_yaw": means[None].astype(np.float32)}


def a_face(face: Landmarks, left: float, top: float, width: float, score: float = 0.9) -> Seen:
    """The plain face of the fixtures, in these shares of the picture."""
    xy = face.points[:, :2] / 32.0
    return Seen(xy * (width, width * SIZE[0] / SIZE[1]) + (left, top), score)


@pytest.fixture(scope="module")
def flame() -> Flame:
    """A face model of a plain face: landmarks on triangles of one vertex each."""
    rng, vertices = np.random.default_rng(5), 119
    contour = 0.08 * np.stack([np.cos(t := np.linspace(np.pi, 0, 17)), -np.sin(t), 0 * t], axis=1)
    inner = rng.uniform(-0.05, 0.05, (51, 3))
    template = np.concatenate([contour, inner, rng.normal(0, 0.05, (vertices - 68 + 5, 3))])
    corners = np.concatenate([np.tile(np.arange(17), 79), 17 + np.arange(51)])
    arrays = {
        "template": template,
        "identity_basis": rng.normal(0, 0.01, (100, vertices + 5, 3)),
        "expression_basis": rng.normal(0, 0.01, (50, vertices + 5, 3)),
        "landmark_vertices": corners[:, None].repeat(3, axis=1),
        "landmark_weights": np.full((len(corners), 3), 1 / 3),
        "pose_basis": np.zeros((36, vertices, 3)),
        "skinning": np.eye(5)[np.zeros(vertices, int)],
        "parents": np.array([-1, 0, 1, 1, 1]),
        "rest_pose": np.zeros((5, 3)),
    }
    return flame_from(
        {name: a.astype(np.float32) if a.dtype == float else a for name, a in arrays.items()}
    )


@pytest.fixture(params=[False, True], ids=["mended", "published"])
def published(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_landmarks_come_back_to_their_picture(
    face: Landmarks, flame: Flame, published: bool
) -> None:
    seen = a_face(face, 0.3, 0.1, 0.45)
    world = World(seen)
    tracker = PublishedTracker(world.networks(), flame, 256, published)
    (found,) = tracker.detect(coordinates())
    error = np.abs(found.points[:, :2] - seen.in_picture())
    assert error.max() < (PUBLISHED_PX if published else FINE_PX)
    assert found.score == pytest.approx(seen.score, abs=1e-3)
    assert world.detections == (2 if published else 1)
    if published:  # whole numbers in the picture of 256 x 256
        xy = (found.points[:, :2] + 0.5) * 256.0 / np.array(SIZE) - 0.5
        np.testing.assert_allclose(xy, np.rint(xy), atol=1e-3)
    assert found.codes is not None
    codes = FaceCodes.of_vector(found.codes, 100)
    low, high = seen.box
    middle = (low + high) / 2.0
    read = np.array([codes.shape[0], codes.expression[0]])
    np.testing.assert_allclose(read, middle, atol=CODE_TOLERANCE)
    looks = gaze_points(found.points, *(float(angle) for angle in codes.gaze))
    np.testing.assert_allclose(found.gaze, looks)
    np.testing.assert_array_equal(tracker.track(coordinates()).points, found.points)


def test_a_close_up_is_reduced_first(face: Landmarks, flame: Flame) -> None:
    size = (1680, 1200)
    seen = a_face(face, 0.25, 0.1, 0.55)
    (found,) = PublishedTracker(World(seen).networks(), flame, 256).detect(coordinates(size))
    error = np.abs(found.points[:, :2] - seen.in_picture(size))
    assert error.max() < FINE_PX * size[0] / SIZE[0]


def test_a_portrait_is_cut_where_its_matrix_says(
    face: Landmarks, flame: Flame, published: bool
) -> None:
    picture = coordinates()
    for side in (256, 64):
        networks = World(a_face(face, 0.25, 0.1, 0.5)).networks()
        made = PublishedTracker(networks, flame, side, published).portrait(picture)
        assert made.crop.shape == (side, side, 3)
        centre = np.array([side / 2.0, side / 2.0])
        for offset in ((0, 0), (side / 8, 0), (0, -side / 8), (side / 6, side / 6)):
            x, y = (centre + offset).astype(int)
            back = invert_affine(made.matrix) @ (x, y, 1.0)
            red, green = back / (np.array(SIZE) - 1) * 255.0
            np.testing.assert_allclose(made.crop[y, x, :2], [red, green], atol=4.0)
        assert made.landmarks.codes is not None
        codes = FaceCodes.of_vector(made.landmarks.codes, 100)
        model = flame.landmarks(codes.shape, codes.expression, codes.pose)
        drawn = flame_pixels(model, codes.camera) * side / 256.0
        np.testing.assert_allclose(made.landmarks.points, drawn, rtol=1e-5, atol=1e-4)


def test_mixed_landmarks_are_one_shape_with_all_else_of_the_other(
    face: Landmarks, flame: Flame
) -> None:
    world = World(a_face(face, 0.1, 0.1, 0.4))
    tracker = PublishedTracker(world.networks(), flame, 256)
    (one,) = tracker.detect(coordinates())
    world.faces = [a_face(face, 0.45, 0.2, 0.5)]
    (two,) = tracker.detect(coordinates())
    assert one.codes is not None and two.codes is not None
    a, b = FaceCodes.of_vector(one.codes, 100), FaceCodes.of_vector(two.codes, 100)
    model = flame.landmarks(a.shape, b.expression, b.pose)
    mixed = tracker.mixed(one, two)
    np.testing.assert_allclose(mixed.points, flame_pixels(model, b.camera), atol=1e-4)
    looks = gaze_points(mixed.points, *(float(angle) for angle in b.gaze))
    np.testing.assert_allclose(mixed.gaze, looks, atol=1e-4)
    with pytest.raises(SettingsError, match="no face codes"):
        tracker.mixed(one, replace(two, codes=None))


def test_one_of_two_faces(face: Landmarks, flame: Flame, published: bool) -> None:
    small, large = a_face(face, 0.05, 0.1, 0.3, 0.95), a_face(face, 0.5, 0.1, 0.45, 0.8)
    tracker = PublishedTracker(World(small, large).networks(), flame, 256, published)
    found = tracker.detect(coordinates())
    assert [one.score for one in found] == pytest.approx([0.8, 0.95], abs=1e-3)
    second = tracker.portrait(coordinates(), face=2)
    assert second.landmarks.score == pytest.approx(0.95, abs=1e-3)
    with pytest.raises(SettingsError, match="wanted 1 to 2"):
        tracker.portrait(coordinates(), face=3)
    if published:
        assert tracker.portrait(coordinates()).landmarks.score == second.landmarks.score
    else:
        with pytest.raises(NoFace, match="2 faces.*--face N"):
            tracker.portrait(coordinates())


def test_the_driver_is_followed_when_another_is_surer(
    face: Landmarks, flame: Flame, published: bool
) -> None:
    left, right = a_face(face, 0.05, 0.1, 0.4, 0.95), a_face(face, 0.5, 0.1, 0.4, 0.8)
    world = World(left, right)
    tracker = PublishedTracker(world.networks(), flame, 256, published)
    first = tracker.track(coordinates())
    world.faces = [replace(left, score=0.7), right]
    then = tracker.track(coordinates())
    jumped = abs(then.points[:, 0].mean() - first.points[:, 0].mean()) > SIZE[0] / 4
    assert jumped == published


def test_no_face_is_said(face: Landmarks, flame: Flame, published: bool) -> None:
    tracker = PublishedTracker(World().networks(), flame, 256, published)
    assert tracker.detect(coordinates()) == []
    with pytest.raises(NoFace, match="in this frame"):
        tracker.track(coordinates())
    with pytest.raises(NoFace, match="in the portrait"):
        tracker.portrait(coordinates())


def test_networks_that_are_missing_are_named(flame: Flame) -> None:
    networks = World().networks()
    del networks["fan"]
    with pytest.raises(SettingsError, match=r"lacks \['fan'\]"):
        PublishedTracker(networks, flame, 256)


@pytest.fixture
def world(face: Landmarks) -> World:
    return World(a_face(face, 0.1, 0.1, 0.4))


@pytest.fixture
def act(toy_bundle: Path, world: World, flame: Flame) -> Iterator[Reenactor]:
    tracker = PublishedTracker(world.networks(), flame, 32)
    settings = Settings(threads=1, paste=False)
    with Reenactor.load(toy_bundle, settings=settings, tracker=tracker) as act:
        yield act


def test_a_frame_is_drawn_from_mixed_codes_and_held_when_lost(
    act: Reenactor, world: World, face: Landmarks, tmp_path: Path
) -> None:
    source = act.prepare(coordinates())
    assert source.crop.shape == (32, 32, 3) and source.landmarks.codes is not None
    drawing = draw_condition(source.landmarks, 32, act.manifest.drawing)
    assert len(np.unique(drawing)) > 2  # the face lies on the canvas
    lost = act.reenact(None, source)
    np.testing.assert_array_equal(lost.landmarks.points, source.landmarks.points)
    world.faces = [a_face(face, 0.45, 0.2, 0.5)]
    (driver,) = act.tracker.detect(coordinates())
    assert isinstance(act.tracker, PublishedTracker)
    mixed = act.tracker.mixed(source.landmarks, driver)
    for seen in (coordinates(), driver):
        result = act.reenact(seen, source)
        np.testing.assert_array_equal(result.landmarks.points, mixed.points)
        assert result.seen and not np.array_equal(result.crop, lost.crop)
    world.faces = []
    held = act.reenact(coordinates(), source)
    assert not held.seen
    np.testing.assert_array_equal(held.landmarks.points, mixed.points)
    act.retargeter(source)  # another session
    rested = act.reenact(None, source)
    np.testing.assert_array_equal(rested.landmarks.points, source.landmarks.points)
    source.save(tmp_path / "source.npz")
    again = Source.load(tmp_path / "source.npz")
    np.testing.assert_array_equal(act.reenact(driver, again).landmarks.points, mixed.points)


def test_a_driver_of_another_tracker_is_retargeted(act: Reenactor, face: Landmarks) -> None:
    source = act.prepare(coordinates())
    act.retargeter(source).calibrate([face])
    moved = act.target(face.transformed(np.array([[1.0, 0, 4], [0, 1, 0]])), source)
    assert moved.codes is None
    assert np.abs(moved.points[:, :2] - source.landmarks.points[:, :2]).max() > 1.0


def test_a_clip_carries_the_codes_of_every_frame(
    act: Reenactor, world: World, tmp_path: Path
) -> None:
    frames = tmp_path / "driver"
    frames.mkdir()
    for i in range(3):
        picture = coordinates() if i != 1 else np.zeros((300, 420, 3), np.uint8)
        cv2.imwrite(str(frames / f"{i}.png"), picture)
    cv2.imwrite(str(tmp_path / "portrait.png"), coordinates())
    report = run_clip(act, tmp_path / "portrait.png", frames, tmp_path / "out.npz")
    assert report.frames == 3
    made = Track.load(tmp_path / "out.npz")
    assert isinstance(act.tracker, PublishedTracker)
    source, (driver,) = act.prepare(coordinates()), act.tracker.detect(coordinates())
    wanted = act.tracker.mixed(source.landmarks, driver)
    np.testing.assert_allclose(made.landmarks[0], wanted.points, atol=1e-5)
    np.testing.assert_allclose(made.landmarks[2], wanted.points, atol=1e-5)


def test_a_track_keeps_codes(face: Landmarks, tmp_path: Path) -> None:
    codes = np.stack([np.arange(161), np.full(161, np.nan)]).astype(np.float32)
    points = np.stack([face.points, np.full_like(face.points, np.nan)])
    gaze = np.stack([face.gaze, np.full_like(face.gaze, np.nan)])
    Track(points, gaze, np.array([0, 1]), (32, 32), codes).save(tmp_path / "t.npz")
    track = Track.load(tmp_path / "t.npz")
    first = track[0]
    assert first is not None and first.codes is not None and track[1] is None
    np.testing.assert_array_equal(first.codes, codes[0])
    turned = first.transformed(np.array([[2.0, 0, 0], [0, 2.0, 0]]))
    assert turned.codes is first.codes


def test_compat_stretches_every_picture(toy_bundle: Path, face: Landmarks) -> None:
    portrait = np.random.default_rng(1).integers(90, 150, (64, 64, 3)).astype(np.uint8)
    seen = face.transformed(np.array([[2.0, 0, 0], [0, 2.0, 0]]))
    crops = {}
    for compat in (None, "published"):
        settings = Settings(threads=1, paste=False, compat=compat)  # type: ignore[arg-type]
        with Reenactor.load(toy_bundle, settings=settings) as act:
            source = act.prepare(portrait, landmarks=seen)
            crops[compat] = act.rest(source).crop
    plain, stretched = crops[None], crops["published"]
    assert stretched.min() == 0 and stretched.max() == 255
    assert plain.min() > 0 or plain.max() < 255
    order = np.argsort(plain, axis=None, kind="stable")
    assert (np.diff(stretched.ravel()[order].astype(int)) >= -3).all()  # the same picture


@pytest.mark.parametrize("wrong", [{"tracker": "dlib"}, {"compat": "paper"}])
def test_wrong_settings_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong.values()))):
        Settings(**wrong)  # type: ignore[arg-type]


def test_which_tracker_a_bundle_gets(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = manifest_file.read(toy_bundle)
    installed = object()
    monkeypatch.setattr(tracker_module, "open_tracker", lambda: installed)
    assert open_tracker_of(toy_bundle, plain) is installed
    with pytest.raises(BundleError, match="lacks s3fd, fan, emoca, gaze, flame; import"):
        open_tracker_of(toy_bundle, plain, "published")
