"""Readers and writers: exact times, kept sound, and nothing half-written."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from diffusionact.errors import MediaError
from diffusionact.landmarks import Landmarks
from diffusionact.runtime import media
from diffusionact.runtime.media import FRAME_NS, NS, open_reader, read_image
from diffusionact.runtime.writer import open_writer
from tests.clips import grey, times_of, write

# 8-bit video range and 4:2:0 rounding of one flat colour, grey levels.
COLOUR_TOLERANCE = 6


@pytest.mark.parametrize(
    ("content", "word"), [(None, "no such file"), (b"", "empty"), (b"no media at all" * 40, "read")]
)
@pytest.mark.parametrize("name", ["face.png", "clip.mp4", "motion.npz"])
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes | None, word: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=name) as caught:
        open_reader(path)
    assert word in str(caught.value) or "decoded" in str(caught.value)


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        cv2.imwrite(str(tmp_path / f"frame{number}.png"), grey(number))
    frames = list(open_reader(tmp_path))
    levels = [int(frame.image_bgr[0, 0, 0]) for frame in frames if frame.image_bgr is not None]
    assert levels == [1, 9, 10]
    assert [frame.pts_ns for frame in frames] == [0, FRAME_NS, 2 * FRAME_NS]
    assert [frame.duration_ns for frame in frames] == [FRAME_NS] * 3


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no pictures"):
        open_reader(tmp_path)


def test_a_folder_keeps_its_frame_times(tmp_path: Path, face: Landmarks) -> None:
    times = [0, 20_000_000, 90_000_001]
    write(tmp_path / "frames", [grey(i) for i in range(3)], times, face)
    assert times_of(tmp_path / "frames") == times


@pytest.mark.parametrize(
    ("time_base", "ticks"),
    [
        (Fraction(1, 25), range(5)),
        (Fraction(1001, 30_000), range(5)),
        (Fraction(1, 24_000), [0, 1001, 2002, 3003]),
        (Fraction(1, 1000), [0, 33, 67, 100, 290, 291]),  # variable
    ],
)
def test_video_times_are_exact(
    tmp_path: Path, face: Landmarks, time_base: Fraction, ticks: Sequence[int]
) -> None:
    times = [round(tick * time_base * NS) for tick in ticks]
    path = tmp_path / "clip.mp4"
    write(path, [grey(40 * i) for i in range(len(times))], times, face, time_base=time_base)
    assert times_of(path) == times
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.duration is not None and stream.time_base is not None
        # the last frame lasts as long as it is told to
        end = times[-1] + FRAME_NS
        assert abs(stream.duration * stream.time_base * NS - end) < NS * time_base


def test_a_file_that_starts_late_keeps_its_start(tmp_path: Path, face: Landmarks) -> None:
    times = [33_000_000, 73_000_000, 113_000_000]
    write(tmp_path / "clip.mp4", [grey(9)] * 3, times, face, time_base=Fraction(1, 1000))
    assert times_of(tmp_path / "clip.mp4") == times
    hour = [3_600_000_000_000 + pts_ns for pts_ns in times]
    write(tmp_path / "hour.mp4", [grey(9)] * 3, hour, face, time_base=Fraction(1, 1000))
    assert times_of(tmp_path / "hour.mp4") == [0, 40_000_000, 80_000_000]


def test_gif_times_come_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "clip.gif"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("gif", rate=Fraction(25, 2))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb8"
        for i in range(4):
            frame = av.VideoFrame.from_ndarray(grey(60 * i), format="bgr24")
            container.mux(stream.encode(frame.reformat(format="rgb8")))
        container.mux(stream.encode(None))
    assert times_of(path) == [0, 80_000_000, 160_000_000, 240_000_000]


def test_colours_and_odd_sizes_survive_a_video(tmp_path: Path, face: Landmarks) -> None:
    image = np.empty((47, 63, 3), np.uint8)
    image[:] = (40, 90, 210)
    write(tmp_path / "clip.mp4", [image] * 3, [0, FRAME_NS, 2 * FRAME_NS], face)
    back = next(iter(open_reader(tmp_path / "clip.mp4"))).image_bgr
    assert back is not None
    assert back.shape == (48, 64, 3)
    assert np.abs(back.astype(int) - image[0, 0]).max() <= COLOUR_TOLERANCE


def test_a_turned_phone_video_stands_upright() -> None:
    picture = np.zeros((2, 3, 3), np.uint8)
    picture[0, 2] = 255  # top right; a quarter turn counter-clockwise brings it to the top left
    frame = types.SimpleNamespace(rotation=90, to_ndarray=lambda format: picture)
    upright = media._upright(frame)
    assert upright.shape == (3, 2, 3)
    assert upright[0, 0, 0] == 255


def test_a_cut_off_video_gives_what_it_has(
    tmp_path: Path, face: Landmarks, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (48, 64, 3)).astype(np.uint8) for _ in range(10)]
    path = tmp_path / "clip.mp4"
    write(path, noise, [i * FRAME_NS for i in range(10)], face)
    path.write_bytes(path.read_bytes()[:-4000])
    count = len(times_of(path))
    assert 0 < count < 10


def test_a_missing_camera_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = types.SimpleNamespace(isOpened=lambda: False, release=lambda: None)
    monkeypatch.setattr(media.cv2, "VideoCapture", lambda index: closed)
    with pytest.raises(MediaError, match="camera 7 cannot be opened"):
        next(iter(open_reader("7")))


def test_a_track_round_trips(tmp_path: Path, face: Landmarks) -> None:
    path = tmp_path / "face.npz"
    with open_writer(path, size=(90, 80)) as writer:
        assert not writer.wants_pictures
        writer.write(None, 0, FRAME_NS, face)
        writer.write(None, 123_456_789, FRAME_NS, face)
    frames = list(open_reader(path))
    assert [frame.pts_ns for frame in frames] == [0, 123_456_789]
    assert frames[1].landmarks is not None and frames[1].image_bgr is None
    np.testing.assert_array_equal(frames[1].landmarks.points, face.points)


@pytest.mark.parametrize("name", ["out.mp4", "out.png", "out.npz", "out"])
def test_an_error_leaves_nothing_behind(tmp_path: Path, face: Landmarks, name: str) -> None:
    with pytest.raises(RuntimeError), open_writer(tmp_path / name) as writer:
        writer.write(grey(1), 0, FRAME_NS, face)
        raise RuntimeError("rendering failed")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out.mp4", "out.png", "out.npz", "out"])
def test_an_old_result_stays_until_the_new_one_is_whole(
    tmp_path: Path, face: Landmarks, name: str
) -> None:
    target = tmp_path / name
    if target.suffix:
        target.write_bytes(b"old")
    with open_writer(target) as writer:
        writer.write(grey(1), 0, FRAME_NS, face)
        assert not target.suffix or target.read_bytes() == b"old"
    assert target.is_dir() or target.read_bytes() != b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_writer_without_frames_says_so(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no frames"), open_writer(tmp_path / "out.mp4"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_picture_holds_one_frame(tmp_path: Path, face: Landmarks) -> None:
    with pytest.raises(MediaError, match="one frame"):
        write(tmp_path / "out.png", [grey(1), grey(2)], [0, FRAME_NS], face)
    write(tmp_path / "out.png", [grey(7)], [0], face)
    assert (read_image(tmp_path / "out.png") == 7).all()


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_bytes(b"x")
    for target, word in (
        (tmp_path / "file" / "out.mp4", "cannot be written"),
        (full, "not empty"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "out.xyz", "cannot write .xyz"),
    ):
        with pytest.raises(MediaError, match=word):
            open_writer(target)


def test_a_killed_process_leaves_no_result_under_the_final_name(tmp_path: Path) -> None:
    code = """
        import sys, time
        import numpy as np
        from diffusionact.landmarks import Landmarks
        from diffusionact.runtime.writer import open_writer
        face = Landmarks(np.zeros((68, 3), np.float32), np.zeros((2, 2), np.float32))
        with open_writer(sys.argv[1]) as writer:
            for i in range(100000):
                writer.write(np.full((64, 64, 3), i % 255, np.uint8), i * 40000000, 40000000, face)
                print(i, flush=True)
                time.sleep(0.01)
    """
    target = tmp_path / "out.mp4"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(target)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not target.exists()


def test_reading_holds_one_frame_at_a_time(tmp_path: Path, face: Landmarks) -> None:
    path = tmp_path / "clip.mp4"
    write(path, [grey(i) for i in range(30)], [i * FRAME_NS for i in range(30)], face)
    frames = iter(open_reader(path))
    first = next(frames)
    begun = time.monotonic()
    frames.close()  # type: ignore[attr-defined]
    assert first.pts_ns == 0 and time.monotonic() - begun < 1.0


@pytest.mark.parametrize("where", ["write", "close"])
def test_what_ffmpeg_cannot_write_is_named(
    tmp_path: Path, face: Landmarks, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def broken(*_: object) -> None:
        raise av.error.InvalidDataError(1094995529, "Invalid data")

    with pytest.raises(MediaError, match=r"out.mp4: cannot be written .*Invalid data"):
        with open_writer(tmp_path / "out.mp4") as writer:
            writer.write(grey(1), 0, FRAME_NS, face)
            if where == "write":
                monkeypatch.setattr(writer, "_encode", broken)
                writer.write(grey(1), FRAME_NS, FRAME_NS, face)
            monkeypatch.setattr(writer, "_mux", broken)
    assert list(tmp_path.iterdir()) == []


def test_packets_are_read_on_behind_what_cannot_be_demuxed() -> None:
    broken = av.error.InvalidDataError(1094995529, "Invalid data")

    def demuxer(*parts: object) -> Any:
        left = iter(parts)

        def demux(_stream: object) -> Iterator[object]:
            for part in left:
                if part is broken:
                    raise broken
                yield part

        return types.SimpleNamespace(demux=demux)

    assert list(media.demuxed(demuxer("a", broken, "b"), None)) == ["a", None, "b"]
    endless = demuxer(*[broken] * 2 * media.MAX_UNREADABLE)
    assert len(list(media.demuxed(endless, None))) == media.MAX_UNREADABLE
