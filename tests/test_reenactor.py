from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from diffusionact import manifest as manifest_file
from diffusionact.condition import draw_condition
from diffusionact.errors import BundleError, DeviceError, MediaError, NoFace, SettingsError
from diffusionact.image import bgr_to_rgb, to_tensor, to_uint8, warp_crop
from diffusionact.landmarks import Landmarks, crop_matrix
from diffusionact.runtime.loop import open_loop
from diffusionact.runtime.paste import on_whole_pixels
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.source import Source

UInt8Array = npt.NDArray[np.uint8]
Portrait = tuple[UInt8Array, Landmarks]
STAGES = ["retarget", "condition", "encode", "render", "paste"]


class FakeTracker:
    """Gives what it was made with; None is a frame without a face."""

    def __init__(self, faces: list[Landmarks], frames: list[Landmarks | None] | None = None):
        self.faces = faces
        self.frames = frames or []
        self.closed = False

    def detect(self, image_bgr: UInt8Array) -> list[Landmarks]:
        return self.faces

    def track(self, image_bgr: UInt8Array) -> Landmarks:
        face = self.frames.pop(0)
        if face is None:
            raise NoFace("no face in this frame")
        return face

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def act(toy_bundle: Path) -> Iterator[Reenactor]:
    with Reenactor.load(toy_bundle, settings=Settings(threads=1, smoothing=0.0)) as act:
        yield act


@pytest.fixture
def source(act: Reenactor, portrait: Portrait) -> Source:
    return act.prepare(portrait[0], landmarks=portrait[1])


def nodding(face: Landmarks, degrees: float) -> Landmarks:
    """The face, rolled in the picture about its own middle."""
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = face.points[:, :2].mean(axis=0)
    return face.transformed(np.concatenate([turn, (middle - turn @ middle)[:, None]], axis=1))


def test_prepare_and_render_are_the_stages_in_their_order(
    act: Reenactor, toy_bundle: Path, portrait: Portrait
) -> None:
    picture, face = portrait
    manifest = manifest_file.read(toy_bundle)
    how = manifest.crop
    matrix = on_whole_pixels(crop_matrix(face.points, 32, how.rotate, how.scale), 32)
    assert how.scale != 1.0
    crop = warp_crop(bgr_to_rgb(picture), matrix, 32)
    image = to_tensor(crop)

    def condition(landmarks: Landmarks) -> npt.NDArray[np.float32]:
        return to_tensor(draw_condition(landmarks, 32, manifest.drawing))

    loop = open_loop(toy_bundle, manifest, threads=1)
    x_T = loop.invert(image, loop.encode(image, condition(face.transformed(matrix))))
    target = nodding(face.transformed(matrix), 10.0)
    x_0 = loop.render(x_T, loop.encode(image, condition(target)))

    source = act.prepare(picture, landmarks=face)
    result = act.render(target, source)
    assert np.array_equal(source.x_T, x_T) and np.array_equal(source.crop, crop)
    assert source.weights_sha256 == manifest.weights_sha256
    assert np.array_equal(result.crop, bgr_to_rgb(to_uint8(x_0)))
    assert np.array_equal(result.frame, source.paster.paste(result.crop))
    assert result.frame.shape == picture.shape and result.landmarks is target


def test_a_known_x_T_is_taken_and_nothing_is_inverted(
    act: Reenactor, source: Source, portrait: Portrait, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(act._loop, "invert", None)
    picture, face = portrait
    again = act.prepare(picture, landmarks=face, x_T=source.x_T)
    assert again.x_T is source.x_T and np.array_equal(again.crop, source.crop)


def test_reenact_moves_the_face_and_times_its_stages(
    act: Reenactor, source: Source, portrait: Portrait
) -> None:
    face = portrait[1]
    act.retargeter(source).calibrate([face])
    still = act.reenact(face, source, 0)
    moved = act.reenact(nodding(face, 12.0), source, 40_000_000)
    assert list(still.times) == STAGES and min(still.times.values()) >= 0
    assert still.seen and moved.seen
    assert not np.array_equal(moved.frame, still.frame)
    eyes = moved.landmarks.points[42:48, :2].mean(0) - moved.landmarks.points[36:42, :2].mean(0)
    at_rest = still.landmarks.points[42:48, :2].mean(0) - still.landmarks.points[36:42, :2].mean(0)
    turned = np.degrees(np.arctan2(eyes[1], eyes[0]) - np.arctan2(at_rest[1], at_rest[0]))
    assert turned == pytest.approx(12.0, abs=3.0)


@pytest.mark.parametrize(
    ("domain", "expression"), [("rendered faces", "model"), ("photos", "free")]
)
def test_only_a_model_of_rendered_faces_is_held_to_their_expressions(
    act: Reenactor, source: Source, domain: str, expression: str
) -> None:
    act.manifest = replace(act.manifest, training=replace(act.manifest.training, domain=domain))
    assert act.retargeter(source).settings.expression == expression


def test_a_frozen_driver_gives_the_same_frame(
    act: Reenactor, source: Source, portrait: Portrait
) -> None:
    act.retargeter(source).calibrate([portrait[1]])
    frames = [act.reenact(portrait[1], source, i * 40_000_000).frame for i in range(4)]
    assert all(np.array_equal(frame, frames[0]) for frame in frames[1:])


def test_results_own_their_memory(act: Reenactor, source: Source) -> None:
    first = act.rest(source)
    kept = first.frame.copy(), first.crop.copy()
    act.render(nodding(source.landmarks, 20.0), source)
    assert np.array_equal(first.frame, kept[0]) and np.array_equal(first.crop, kept[1])
    first.frame[:] = 0
    assert np.array_equal(act.rest(source).frame, kept[0])


def test_the_bare_crop_is_the_frame_when_pasting_is_off(
    toy_bundle: Path, portrait: Portrait
) -> None:
    with Reenactor.load(toy_bundle, settings=Settings(paste=False, threads=1)) as act:
        result = act.rest(act.prepare(portrait[0], landmarks=portrait[1]))
    assert result.frame.shape == (32, 32, 3) and np.array_equal(result.frame, result.crop)


def test_pictures_go_through_the_tracker_and_missing_faces_hold(
    toy_bundle: Path, portrait: Portrait
) -> None:
    picture, face = portrait
    tracker = FakeTracker([face], [face, nodding(face, 15.0), None, face])
    settings = Settings(threads=1, smoothing=0.0)
    with Reenactor.load(toy_bundle, settings=settings, tracker=tracker) as act:
        source = act.prepare(picture)
        act.retargeter(source).calibrate([face])
        results = [act.reenact(picture, source, i * 40_000_000) for i in range(4)]
    assert [result.seen for result in results] == [True, True, False, True]
    assert list(results[0].times) == ["track", *STAGES]
    # The lost face holds its pose: the frame without one is the frame before it.
    held, before = results[2].landmarks.points[:, :2], results[1].landmarks.points[:, :2]
    np.testing.assert_allclose(held, before, atol=0.05)
    assert tracker.closed


def test_a_photo_on_a_model_of_rendered_faces_is_warned_of(
    toy_bundle: Path, portrait: Portrait, caplog: pytest.LogCaptureFixture
) -> None:
    picture, face = portrait
    with Reenactor.load(
        toy_bundle, settings=Settings(threads=1), tracker=FakeTracker([face])
    ) as act:
        with caplog.at_level(logging.WARNING, "diffusionact"):
            act.prepare(picture, landmarks=face)
            assert not caplog.records
            act.prepare(picture)
    assert len(caplog.records) == 1 and "rendered faces" in caplog.text


def test_one_of_several_faces_is_asked_for(toy_bundle: Path, portrait: Portrait) -> None:
    picture, face = portrait
    other = face.transformed(np.array([[0.5, 0.0, 30.0], [0.0, 0.5, 0.0]]))
    tracker = FakeTracker([face, other])
    with Reenactor.load(toy_bundle, settings=Settings(threads=1), tracker=tracker) as act:
        with pytest.raises(NoFace, match="--face N"):
            act.prepare(picture)
        chosen = act.prepare(picture, face=2)
        wanted = crop_matrix(other.points, 32, scale=act.manifest.crop.scale)
        wanted = on_whole_pixels(wanted, 32)
        np.testing.assert_array_equal(chosen.matrix, wanted)
        tracker.faces = []
        with pytest.raises(NoFace):
            act.prepare(picture)


def test_a_source_of_other_weights_is_refused(
    act: Reenactor, source: Source, portrait: Portrait
) -> None:
    other = replace(source, weights_sha256="cd" * 32)
    for use in (
        lambda: act.reenact(portrait[1], other),
        lambda: act.render(source.landmarks, other),
        lambda: act.rest(other),
    ):
        with pytest.raises(SettingsError, match="other weights|prepared with weights"):
            use()


def test_a_saved_source_renders_as_before(act: Reenactor, source: Source, tmp_path: Path) -> None:
    source.save(tmp_path / "me.npz")
    again = Source.load(tmp_path / "me.npz")
    assert np.array_equal(act.rest(again).frame, act.rest(source).frame)


def test_a_new_source_starts_a_new_session(
    act: Reenactor, source: Source, portrait: Portrait
) -> None:
    first = act.retargeter(source)
    assert act.retargeter(source) is first
    other = act.prepare(portrait[0], landmarks=portrait[1])
    assert act.retargeter(other) is not first


@pytest.mark.parametrize("picture", [None, np.zeros((5, 5), np.uint8)])
def test_what_is_no_picture_is_refused(
    act: Reenactor, source: Source, picture: UInt8Array, portrait: Portrait
) -> None:
    with pytest.raises(MediaError, match="portrait"):
        act.prepare(picture, landmarks=portrait[1])
    if picture is not None:
        with pytest.raises(MediaError, match="driver frame"):
            act.reenact(picture, source)


def test_wrong_settings_and_devices_are_named(toy_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="'abacus'"):
        Settings(backend="abacus")
    with pytest.raises(SettingsError, match="threads=-1"):
        Settings(threads=-1)
    with pytest.raises(SettingsError, match="smoothing"):
        Settings(smoothing=-0.5)
    with pytest.raises(SettingsError, match="steps=37"):
        Reenactor.load(toy_bundle, settings=Settings(steps=37))
    with pytest.raises(DeviceError, match="cuda"):
        Reenactor.load(toy_bundle, device="cuda")
    with pytest.raises(BundleError, match=r"none\.bundle"):
        Reenactor.load(tmp_path / "none.bundle")


def test_the_runtime_loads_no_torch_and_no_onnx(toy_bundle: Path) -> None:
    script = (
        "import sys; import diffusionact.runtime; early = set(sys.modules);"
        "from diffusionact.runtime.reenactor import Reenactor;"
        f"Reenactor.load({str(toy_bundle)!r});"
        "print([m for m in ('torch', 'onnx', 'mediapipe') if m in sys.modules],"
        "      [m for m in ('cv2', 'numpy', 'onnxruntime') if m in early])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0].replace("'", "").startswith("[] [")


def test_landmarks_that_are_no_face_are_refused_as_portrait_and_lost_as_driver(
    toy_bundle: Path, portrait: Portrait
) -> None:
    image, face = portrait
    blind = Landmarks(face.points, np.full((2, 2), np.nan, np.float32))
    with Reenactor.load(toy_bundle) as act:
        with pytest.raises(NoFace, match="both irises"):
            act.prepare(image, landmarks=blind)
        source = act.prepare(image, landmarks=face)
        result = act.reenact(blind, source)
    assert not result.seen
    assert np.isfinite(result.landmarks.points).all() and np.isfinite(result.landmarks.gaze).all()
