"""Whole clips through a toy bundle: length, timing, lost faces, and what is refused."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from diffusionact.errors import BundleError, MediaError, NoFace, SettingsError
from diffusionact.landmarks import Landmarks, Track, sidecar_path
from diffusionact.runtime.clip import prepare_portrait, run_clip
from diffusionact.runtime.media import FRAME_NS, VideoReader, open_reader, read_image
from diffusionact.runtime.motion import driver_motion
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.timing import StageTimes
from diffusionact.runtime.writer import make_track, open_writer
from tests.clips import ScriptedTracker, folder_of, moving, write_portrait

T = TypeVar("T")
UInt8Array = npt.NDArray[np.uint8]
GOLDEN = Path(__file__).parent / "golden"
TIMES_NS = (0, 20_000_000, 90_000_000, 110_000_000, 200_000_000)  # whole ticks of 1/90000 s
SLOW_MS = 2.0


class SlowTracker(ScriptedTracker):
    def track(self, image_bgr: UInt8Array) -> Landmarks:
        time.sleep(SLOW_MS / 1000)
        return super().track(image_bgr)


@pytest.fixture
def act(toy_bundle: Path) -> Iterator[Reenactor]:
    with Reenactor.load(toy_bundle) as made:
        yield made


@pytest.fixture
def portrait_file(tmp_path: Path, portrait: tuple[UInt8Array, Landmarks]) -> Path:
    """A portrait with its landmarks beside it."""
    return write_portrait(tmp_path / "portrait.png", *portrait)


def test_a_track_drives_a_video_of_its_length_and_timing(
    act: Reenactor, portrait_file: Path, tmp_path: Path
) -> None:
    driver = GOLDEN / "driver_gaps.npz"
    report = run_clip(act, portrait_file, driver, tmp_path / "out.mp4")
    track = Track.load(driver)
    frames = list(open_reader(tmp_path / "out.mp4"))
    assert report.frames == len(frames) == len(track)
    assert report.seen == sum(track[i] is not None for i in range(len(track)))
    # the track has no clock of its own: 1/90000 s is the video's
    worst = max(abs(f.pts_ns - int(t)) for f, t in zip(frames, track.pts_ns, strict=True))
    assert worst <= 1e9 / 90_000
    assert report.times["total"].count == len(track)


def serially(items: Iterable[T]) -> Generator[tuple[T, int], None, None]:
    for item in items:
        yield item, 1


def one_by_one(items: Iterable[T], write: Callable[[T], None]) -> None:
    for item in items:
        write(item)


@pytest.mark.parametrize("name", ["out.mp4", "out", "out.npz"])
def test_overlap_changes_no_bit(
    toy_bundle: Path,
    portrait_file: Path,
    face: Landmarks,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = moving(face, 40)
    script[20:25] = [None] * 5
    driver = folder_of(tmp_path / "driver", 40)

    def made(folder: str) -> dict[str, bytes]:
        with Reenactor.load(toy_bundle, tracker=ScriptedTracker(script)) as act:
            run_clip(act, portrait_file, driver, tmp_path / folder / name)
        files = [path for path in (tmp_path / folder).rglob("*") if path.is_file()]
        return {path.name: path.read_bytes() for path in files}

    overlapped = made("a")
    monkeypatch.setattr("diffusionact.runtime.motion.read_ahead", serially)
    monkeypatch.setattr("diffusionact.runtime.rendering.write_behind", one_by_one)
    assert made("b") == overlapped


def test_frames_at_once_are_those_one_at_a_time(
    toy_bundle: Path, portrait_file: Path, face: Landmarks, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("openvino", reason="no openvino; make dev has it")
    count, at_once = 42, 4
    script = moving(face, count)
    script[20:25] = [None] * 5
    driver = folder_of(tmp_path / "driver", count)
    sizes: list[int] = []
    real = Reenactor.reenact_together

    def together(act: Reenactor, drivers: Any, *rest: Any) -> Any:
        sizes.append(len(drivers))
        return real(act, drivers, *rest)

    monkeypatch.setattr(Reenactor, "reenact_together", together)

    def made(name: str, number: int) -> tuple[list[Any], list[Any], Mapping[str, StageTimes]]:
        told: list[Any] = []
        settings = Settings(backend="openvino", precision="fp32", at_once=number)
        with Reenactor.load(toy_bundle, settings=settings, tracker=ScriptedTracker(script)) as act:
            report = run_clip(
                act, portrait_file, driver, tmp_path / name,
                progress=lambda stage, done, total, left_s: told.append((stage, done, total)),
            )  # fmt: skip
        images = [frame.image_bgr for frame in open_reader(tmp_path / name)]
        return images, told, report.times

    due, told, times = made("alone", 1)
    assert not sizes
    seen, told_together, times_together = made("together", at_once)
    assert sizes == [at_once] * (count // at_once)
    for one, other in zip(seen, due, strict=True):
        apart = np.abs(one.astype(int) - other.astype(int))
        assert apart.max() <= 1 and apart.mean() < 0.01  # sums in another order, then rounded
    assert told_together == [*told[: count + 2], *told[count + 1 + at_once :]]  # the first as one
    assert list(times_together) == list(times)
    assert all(times_together[stage].count == count for stage in times)
    assert times_together["render"].p50_ms > 0


def test_a_network_that_admits_one_frame_is_no_reason_to_fail(
    toy_bundle: Path, portrait_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    pytest.importorskip("openvino", reason="no openvino; make dev has it")

    def refuse(*_: object) -> None:
        raise BundleError("unet_step.onnx: made for one frame at a time")

    settings = Settings(backend="openvino", precision="fp32", at_once=4)
    with (
        Reenactor.load(toy_bundle, settings=settings) as act,
        caplog.at_level(logging.INFO, "diffusionact"),
        monkeypatch.context() as patch,
    ):
        patch.setattr("diffusionact.runtime.openvino.check_wide", refuse)
        patch.setenv("DIFFUSIONACT_CACHE", str(tmp_path / "cache"))  # where it is not made yet
        report = run_clip(act, portrait_file, GOLDEN / "driver_nod.npz", tmp_path / "out")
    assert report.times["total"].count == report.frames
    assert "one frame at a time: unet_step.onnx" in caplog.text


def test_before_the_first_face_the_portrait_rests(
    act: Reenactor, portrait_file: Path, tmp_path: Path
) -> None:
    run_clip(act, portrait_file, GOLDEN / "driver_gaps.npz", tmp_path / "out")
    images = [frame.image_bgr for frame in open_reader(tmp_path / "out")]
    track = Track.load(GOLDEN / "driver_gaps.npz")
    first = next(i for i in range(len(track)) if track[i] is not None)
    assert all(np.array_equal(image, images[0]) for image in images[:first])
    assert not np.array_equal(images[-1], images[0])


@pytest.mark.parametrize("name", ["out.mp4", "out"])
def test_a_folder_of_pictures_drives(
    toy_bundle: Path, portrait_file: Path, face: Landmarks, tmp_path: Path, name: str
) -> None:
    script = moving(face, 5)
    script[2] = None
    driver = folder_of(tmp_path / "driver", 5)
    with Reenactor.load(toy_bundle, tracker=ScriptedTracker(script)) as act:
        report = run_clip(act, portrait_file, driver, tmp_path / name)
    assert (report.frames, report.seen) == (5, 4)
    assert [f.pts_ns for f in open_reader(tmp_path / name)] == [i * FRAME_NS for i in range(5)]


def test_a_picture_drives_a_picture(
    toy_bundle: Path, portrait_file: Path, face: Landmarks, tmp_path: Path
) -> None:
    cv2.imwrite(str(tmp_path / "open.png"), np.full((40, 40, 3), 9, np.uint8))
    with Reenactor.load(toy_bundle, tracker=ScriptedTracker(moving(face, 10))) as act:
        run_clip(act, portrait_file, tmp_path / "open.png", tmp_path / "out.png")
        source = act.prepare(read_image(portrait_file), landmarks=Track.load(
            sidecar_path(portrait_file))[0])  # fmt: skip
        rest = act.rest(source).frame
    moved = read_image(tmp_path / "out.png")
    assert moved.shape == rest.shape
    assert not np.array_equal(moved, rest)


def test_a_track_is_written_without_rendering(
    act: Reenactor, portrait_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("rendered")

    monkeypatch.setattr(act, "reenact", refuse)
    run_clip(act, portrait_file, GOLDEN / "driver_nod.npz", tmp_path / "out.npz")
    made, driver = Track.load(tmp_path / "out.npz"), Track.load(GOLDEN / "driver_nod.npz")
    assert len(made) == len(driver)
    np.testing.assert_array_equal(made.pts_ns, driver.pts_ns)
    image = read_image(portrait_file)
    assert made.size == (image.shape[1], image.shape[0])
    known = Track.load(sidecar_path(portrait_file)).landmarks[0]
    # in the portrait's pixels, and no further from its face than a face moves
    assert np.abs(made.landmarks[:, :, :2] - known[:, :2]).max() < 0.3 * np.ptp(known[:, 0])


def test_the_bare_crop_has_the_side_of_the_model(
    toy_bundle: Path, portrait_file: Path, tmp_path: Path
) -> None:
    with Reenactor.load(toy_bundle, settings=Settings(paste=False)) as act:
        run_clip(act, portrait_file, GOLDEN / "driver_nod.npz", tmp_path / "out")
        side = act.manifest.image_size
    assert read_image(tmp_path / "out" / "000001.png").shape == (side, side, 3)


def test_a_driver_without_any_face_is_refused(
    toy_bundle: Path, portrait_file: Path, tmp_path: Path
) -> None:
    driver = folder_of(tmp_path / "driver", 3)
    with (
        Reenactor.load(toy_bundle, tracker=ScriptedTracker([None] * 3)) as act,
        pytest.raises(NoFace, match="no face in any of its 3 frames"),
    ):
        run_clip(act, portrait_file, driver, tmp_path / "out.mp4")
    assert not list(tmp_path.glob("*out*"))


def test_what_cannot_be_done_is_refused_before_the_work(
    act: Reenactor, portrait_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    track = GOLDEN / "driver_nod.npz"

    def refuse(*_: object) -> None:
        raise AssertionError("worked")

    monkeypatch.setattr(act, "reenact", refuse)
    for driver, output, kind, word in (
        (track, tmp_path / "out.png", MediaError, "one frame"),
        (track, portrait_file, MediaError, "one frame"),
        ("0", tmp_path / "out.mp4", SettingsError, "never ends"),
        (tmp_path / "missing.mp4", tmp_path / "out.mp4", MediaError, "no such file"),
        (track, portrait_file / "out.mp4", MediaError, "cannot be written"),
        (portrait_file, portrait_file, MediaError, "overwrite"),
        (track, tmp_path / "sub" / ".." / "portrait.landmarks.npz", MediaError, "landmarks of"),
    ):
        with pytest.raises(kind, match=word):
            run_clip(act, portrait_file, driver, output)


def test_each_stage_has_its_own_progress_to_an_honest_end(
    toy_bundle: Path, portrait_file: Path, face: Landmarks, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int | None]] = []

    def note(stage: str, done: int, total: int | None, left_s: float | None) -> None:
        seen.append((stage, done, total))

    driver = folder_of(tmp_path / "driver", 6)
    with Reenactor.load(toy_bundle, tracker=ScriptedTracker(moving(face, 6))) as act:
        run_clip(act, portrait_file, driver, tmp_path / "out.mp4", progress=note)
    track = [("track", i, 6) for i in range(7)]
    assert seen == [*track, track[-1], *(("render", i, 6) for i in range(1, 7))]


def test_a_header_that_promises_too_little_does_not_break_the_bar(
    toy_bundle: Path, portrait_file: Path, face: Landmarks, tmp_path: Path
) -> None:
    seen: list[tuple[int, int | None]] = []
    reader = replace(VideoReader.probe(video(tmp_path / "driver.mp4", 5, face)), length=3)
    with Reenactor.load(toy_bundle, tracker=ScriptedTracker([face] * 256)) as act:
        driver_motion(act, reader, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3), (4, 4), (5, 5), (5, 5)]


@pytest.mark.parametrize("name", ["out.mp4", "out.npz"])
def test_the_table_shows_every_stage(
    toy_bundle: Path, portrait_file: Path, face: Landmarks, tmp_path: Path, name: str
) -> None:
    driver = folder_of(tmp_path / "driver", 3)
    with Reenactor.load(toy_bundle, tracker=SlowTracker([face] * 3)) as act:
        times = run_clip(act, portrait_file, driver, tmp_path / name).times
    stages = ["read", "track", "retarget", "condition", "encode", "render", "paste", "write"]
    if name == "out.npz":  # nothing is rendered
        stages = ["read", "track", "retarget", "write"]
    assert list(times) == [*stages, "total"]
    assert all(times[stage].count == 3 and times[stage].p50_ms > 0 for stage in times)
    assert times["track"].p50_ms >= SLOW_MS
    assert times["total"].p50_ms >= times["track"].p50_ms + times["read"].p50_ms


def video(path: Path, count: int, face: Landmarks, side: int = 32) -> Path:
    """A clip with times of its own."""
    with open_writer(path) as writer:
        for i in range(count):
            writer.write(np.zeros((side, side, 3), np.uint8), TIMES_NS[i], FRAME_NS, face)
    return path


def test_a_track_beside_a_video_gives_its_landmarks_and_nothing_else(
    act: Reenactor,
    portrait_file: Path,
    face: Landmarks,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    driver = video(tmp_path / "driver.mp4", 4, face)
    beside = tmp_path / "driver.landmarks.npz"
    make_track(moving(face, 4), [0, 1, 2, 3], (32, 32)).save(beside)
    act._tracker = ScriptedTracker([])  # an index error if it is asked
    with caplog.at_level(logging.INFO, "diffusionact"):
        report = run_clip(act, portrait_file, driver, tmp_path / "out.mp4")
    assert (report.frames, report.seen) == (4, 4)
    assert [f.pts_ns for f in open_reader(tmp_path / "out.mp4")] == list(TIMES_NS[:4])
    assert f"landmarks from {beside}" in caplog.text


@pytest.mark.parametrize(
    ("count", "size", "word"),
    [
        (3, (32, 32), "holds 3 frames of 32x32 px, but .*driver.mp4 is 4 frames"),
        (5, (32, 32), "holds 5 frames"),
        (4, (64, 32), "holds 4 frames of 64x32 px"),
    ],
)
def test_a_track_of_another_video_is_refused(
    act: Reenactor,
    portrait_file: Path,
    face: Landmarks,
    tmp_path: Path,
    count: int,
    size: tuple[int, int],
    word: str,
) -> None:
    driver = video(tmp_path / "driver.mp4", 4, face)
    track = make_track([face] * count, list(range(count)), size)
    track.save(sidecar_path(driver))
    with pytest.raises(MediaError, match=f"driver.landmarks.npz: {word}.*remove or rename"):
        run_clip(act, portrait_file, driver, tmp_path / "out.mp4")
    assert not list(tmp_path.glob("*out*"))


def test_a_track_without_any_face_is_refused_beside_media_too(
    act: Reenactor, portrait_file: Path, face: Landmarks, tmp_path: Path
) -> None:
    driver = video(tmp_path / "driver.mp4", 2, face)
    make_track([None, None], [0, 1], (32, 32)).save(sidecar_path(driver))
    with pytest.raises(NoFace, match=r"driver.landmarks.npz: no face"):
        run_clip(act, portrait_file, driver, tmp_path / "out.mp4")
    make_track([None], [0], (80, 90)).save(sidecar_path(portrait_file))
    with pytest.raises(NoFace, match=r"portrait.landmarks.npz: no face"):
        prepare_portrait(act, portrait_file)


def test_an_npz_of_the_same_name_is_no_sidecar(
    toy_bundle: Path, portrait_file: Path, face: Landmarks, tmp_path: Path
) -> None:
    driver = video(tmp_path / "driver.mp4", 4, face)
    make_track([face] * 2, [0, 1], (32, 32)).save(tmp_path / "driver.npz")
    with Reenactor.load(toy_bundle, tracker=ScriptedTracker([face] * 256)) as act:
        assert run_clip(act, portrait_file, driver, tmp_path / "out.mp4").frames == 4


def test_a_picture_drives_with_the_track_beside_it(
    act: Reenactor, portrait_file: Path, face: Landmarks, tmp_path: Path
) -> None:
    picture = tmp_path / "open.png"
    cv2.imwrite(str(picture), np.zeros((40, 40, 3), np.uint8))
    make_track(moving(face, 9)[8:], [0], (40, 40)).save(sidecar_path(picture))
    act._tracker = ScriptedTracker([])  # an index error if it is asked
    assert run_clip(act, portrait_file, picture, tmp_path / "out.png").seen == 1


def test_the_first_face_of_a_portrait_is_the_one_in_its_track(
    act: Reenactor, portrait_file: Path, face: Landmarks
) -> None:
    act._tracker = ScriptedTracker([])
    plain, first = prepare_portrait(act, portrait_file), prepare_portrait(act, portrait_file, 1)
    np.testing.assert_array_equal(plain.landmarks.points, first.landmarks.points)
    act._tracker = ScriptedTracker([face])
    with pytest.raises(SettingsError, match="--face 2: the portrait has 1"):
        prepare_portrait(act, portrait_file, 2)


def test_the_inputs_landmarks_are_inputs(
    act: Reenactor, portrait_file: Path, face: Landmarks, tmp_path: Path
) -> None:
    driver = video(tmp_path / "driver.mp4", 2, face)
    for output in (sidecar_path(portrait_file), sidecar_path(driver)):
        was_there = output.exists()
        with pytest.raises(MediaError, match="landmarks of the input"):
            run_clip(act, portrait_file, driver, output)
        assert output.exists() == was_there
