"""The demo on a toy bundle and a short clip: three panels, a sheet, a table of times."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from diffusionact.errors import MediaError
from diffusionact.landmarks import Landmarks, Track, sidecar_path
from diffusionact.runtime.demo import MOMENTS, PANEL_PX, run_demo
from diffusionact.runtime.media import open_reader, read_image
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.sheet import fit_square, panels
from diffusionact.runtime.writer import make_track, open_writer

UInt8Array = npt.NDArray[np.uint8]
FRAMES = 10
LEVELS = 6  # grey levels, of a flat picture through 4:2:0 and H.264


@pytest.fixture
def media_files(tmp_path: Path, portrait: tuple[UInt8Array, Landmarks]) -> tuple[Path, Path]:
    """A portrait and a driving clip, both with their tracks beside them."""
    image, face = portrait
    still, clip = tmp_path / "face.png", tmp_path / "clip.mp4"
    cv2.imwrite(str(still), image)
    make_track([face], [0], (80, 90)).save(sidecar_path(still))
    times = [i * 40_000_000 for i in range(FRAMES)]
    with open_writer(clip) as writer:
        for i, pts_ns in enumerate(times):
            writer.write(np.full((64, 64, 3), 20 * i, np.uint8), pts_ns, 40_000_000, face)
    make_track([face] * FRAMES, times, (64, 64)).save(sidecar_path(clip))
    return still, clip


def test_the_demo_needs_no_tracker_and_shows_three_panels(
    toy_bundle: Path, media_files: tuple[Path, Path], tmp_path: Path
) -> None:
    seen: list[tuple[str, int]] = []
    with Reenactor.load(toy_bundle) as act:
        report = run_demo(
            act, tmp_path / "out", lambda stage, done, *_: seen.append((stage, done)),
            portrait=media_files[0], driver=media_files[1],
        )  # fmt: skip
        assert act._tracker is None
    assert report.frames == FRAMES
    assert [done for stage, done in seen if stage == "render"] == list(range(1, FRAMES + 1))
    assert list(report.times)[0] == "read" and list(report.times)[-1] == "total"
    frames = [f.image_bgr for f in open_reader(report.video)]
    assert len(frames) == FRAMES
    margin = (frames[0].shape[1] - 3 * PANEL_PX) // 4
    assert margin >= 0 and frames[0].shape[0] >= PANEL_PX
    left = 2 * margin + PANEL_PX  # the driver's panel, in the middle
    for i, frame in enumerate(frames):
        driver = frame[margin + 50 : margin + 300, left + 50 : left + 300]
        assert abs(float(driver.mean()) - 20 * i) < LEVELS
    sheet = read_image(report.sheet)
    assert sheet.shape[1] > sheet.shape[0] and MOMENTS <= FRAMES
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["demo.mp4", "demo.png"]


def test_a_track_of_another_length_is_refused(
    toy_bundle: Path, media_files: tuple[Path, Path], tmp_path: Path
) -> None:
    still, clip = media_files
    track = Track.load(sidecar_path(clip))
    for count in (FRAMES - 1, FRAMES + 1):
        keep = np.minimum(np.arange(count), FRAMES - 1)
        Track(track.landmarks[keep], track.gaze[keep], np.arange(count), track.size).save(
            sidecar_path(clip)
        )
        with Reenactor.load(toy_bundle) as act, pytest.raises(MediaError, match=f"{count}"):
            run_demo(act, tmp_path / "out", portrait=still, driver=clip)
        assert not (tmp_path / "out").exists()


def test_panels_are_equal_squares_with_even_sides() -> None:
    images = [np.full((10, 20, 3), level, np.uint8) for level in (50, 100, 150)]
    sheet = panels(images, ("a", "b", "c"), 64)
    assert sheet.shape[0] % 2 == 0 and sheet.shape[1] % 2 == 0
    for level in (50, 100, 150):
        assert (sheet == level).all(axis=2).sum() >= 64 * 64


def test_a_square_is_cut_from_the_middle() -> None:
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 200
    assert (fit_square(image, 10) == 200).all()
