"""Pictures, folders, videos, cameras and landmark tracks as one kind of reader.

Every reader yields frames with the times of its source, one at a time: a clip of any length needs
the memory of a few pictures. Iterating again starts again from the first frame.
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from diffusionact.errors import MediaError
from diffusionact.landmarks import DEFAULT_FPS, Landmarks, Track

Image: TypeAlias = npt.NDArray[np.uint8]

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
TRACK_SUFFIX = ".npz"
TIMES_FILE = "times.csv"  # beside the pictures of a folder: name, pts_ns
NS = 1_000_000_000
FRAME_NS = round(NS / DEFAULT_FPS)
LATE_START_US = 1_000_000
MAX_UNREADABLE = 1000  # failures of a demuxer, which may fail for ever


@dataclass(frozen=True)
class Frame:
    """One moment of a driver.

    image_bgr: uint8 [H,W,3], or None from a landmark track; pts_ns: its time in the source;
    duration_ns: how long it shows, 0 where unknown; landmarks: what a track holds for it, px.
    """

    image_bgr: Image | None
    pts_ns: int
    duration_ns: int = 0
    landmarks: Landmarks | None = None


class Reader(Protocol):
    """A source of frames.

    name: what the user called it; live: frames come by the clock and may be dropped;
    length: frames, None where only reading tells; time_base: tick of its times, s.
    """

    @property
    def name(self) -> str: ...
    @property
    def live(self) -> bool: ...
    @property
    def length(self) -> int | None: ...
    @property
    def time_base(self) -> Fraction | None: ...
    def __iter__(self) -> Iterator[Frame]: ...


def open_reader(spec: str | Path | int) -> Reader:
    """Return the reader for a camera number, or for a picture, folder, video or track by path.

    Raises: MediaError when it is missing, empty, or nothing that can be read.
    """
    if str(spec).isdecimal():
        from diffusionact.runtime.camera import open_camera  # which needs this module

        return open_camera(str(spec))
    path = require_file(str(spec))
    if path.is_dir():
        return FolderReader.scan(path)
    if path.suffix.lower() == TRACK_SUFFIX:
        return TrackReader(str(path), Track.load(path))
    if path.suffix.lower() in IMAGE_SUFFIXES:
        read_image(path)
        return FolderReader(str(path), (path,), (0,))
    return VideoReader.probe(path)


def require_file(spec: str | Path) -> Path:
    """Return the path of something that exists and is not empty. Raises: MediaError."""
    path = Path(spec)
    try:
        empty = path.is_file() and path.stat().st_size == 0
        missing = not path.exists()
    except OSError as error:
        raise MediaError(f"{path}: cannot be read ({error.strerror})") from error
    if missing:
        raise MediaError(
            f"{path}: no such file. Wanted a picture, a folder of pictures, a video, a landmark "
            "track (.npz) or a camera number; check the path with `ls`"
        )
    if empty:
        raise MediaError(f"{path}: the file is empty (0 bytes); copy or record it again")
    return path


def read_image(path: str | Path) -> Image:
    """Return a picture as uint8 [H,W,3] BGR, turned as its EXIF says.

    Raises: MediaError when it is missing or no picture.
    """
    path = require_file(path)
    try:
        data = np.fromfile(path, np.uint8)  # imread cannot open every path on Windows
    except OSError as error:
        raise MediaError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    except cv2.error:
        image = None
    if image is None:
        raise MediaError(
            f"{path}: not a picture that can be decoded (damaged, or another format than its "
            f"name says). Wanted one of {' '.join(IMAGE_SUFFIXES)}; open it in a viewer and "
            "save it as PNG"
        )
    return np.asarray(image, np.uint8)


@dataclass(frozen=True)
class FolderReader:
    """Pictures in the order of the numbers in their names; a single picture is a folder of one."""

    name: str
    paths: tuple[Path, ...]
    times_ns: tuple[int, ...]
    live: bool = False
    time_base: Fraction | None = None

    @classmethod
    def scan(cls, folder: Path) -> FolderReader:
        """Return the reader of a folder; times from its times.csv, else 25 frames a second."""
        paths = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES]
        if not paths:
            raise MediaError(
                f"{folder}: no pictures in this folder; wanted files ending in "
                + " ".join(IMAGE_SUFFIXES)
            )
        paths.sort(key=lambda path: _natural(path.name))
        known = _read_times(folder / TIMES_FILE)
        times = [known.get(path.name, i * FRAME_NS) for i, path in enumerate(paths)]
        if any(b <= a for a, b in zip(times, times[1:], strict=False)):
            times = [i * FRAME_NS for i in range(len(paths))]
        return cls(str(folder), tuple(paths), tuple(times))

    @property
    def length(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Frame]:
        yield from map(
            Frame, map(read_image, self.paths), self.times_ns, frame_spans(self.times_ns)
        )


@dataclass(frozen=True)
class TrackReader:
    """A recorded landmark track: frames without pictures."""

    name: str
    track: Track
    live: bool = False
    time_base: Fraction | None = None

    @property
    def length(self) -> int:
        return len(self.track)

    def __iter__(self) -> Iterator[Frame]:
        times = [int(pts) for pts in self.track.pts_ns]
        for i, (pts_ns, span_ns) in enumerate(zip(times, frame_spans(times), strict=True)):
            yield Frame(None, pts_ns, span_ns, self.track[i])


@dataclass(frozen=True)
class VideoReader:
    """A video file or GIF: every frame with the exact time its stream gives it."""

    name: str
    path: Path
    length: int | None
    time_base: Fraction | None
    live: bool = False

    @classmethod
    def probe(cls, path: Path) -> VideoReader:
        """Return the reader of a file that holds a video stream. Raises: MediaError."""
        with _open_container(path) as container:
            if not container.streams.video:
                raise MediaError(f"{path}: holds no video stream; wanted a video, GIF or picture")
            stream = container.streams.video[0]
            return cls(str(path), path, _frame_count(container, stream), stream.time_base)

    def __iter__(self) -> Iterator[Frame]:
        with _open_container(self.path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            step_ns = round(NS / (stream.average_rate or DEFAULT_FPS))
            start_ns = start_offset_ns(container)
            next_ns = 0
            for frame in _pictures(container, stream, self.path):
                pts_ns = next_ns
                if frame.pts is not None:
                    pts_ns = max(to_ns(frame.pts, frame.time_base) - start_ns, next_ns)
                span_ns = to_ns(frame.duration or 0, frame.time_base)
                next_ns = pts_ns + 1 if frame.pts is not None else pts_ns + (span_ns or step_ns)
                yield Frame(_upright(frame), pts_ns, span_ns or step_ns)


def to_ns(ticks: int, time_base: Fraction) -> int:
    """Return ticks of a stream's clock in whole nanoseconds, exactly rounded."""
    return round(ticks * time_base * NS)


def start_offset_ns(container: Any) -> int:
    """Return what is taken off a container's times: broadcasts start at any hour of their clock;
    a file that starts a little late keeps its start."""
    start_us = int(container.start_time or 0)
    return start_us * 1000 if start_us > LATE_START_US else 0


def frame_spans(times_ns: Sequence[int]) -> list[int]:
    """Return how long each frame shows: until the next, and the last as long as the one before."""
    spans = [b - a for a, b in zip(times_ns, times_ns[1:], strict=False)]
    return [*spans, spans[-1] if spans else FRAME_NS]


def _open_container(path: Path) -> Any:
    import av

    try:
        return av.open(str(path))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(
            f"{path}: cannot be read as a picture or video ({error}); the file may be damaged or "
            f"cut short, `ffprobe {path}` says more"
        ) from error


def demuxed(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the packets of a stream, the flush packet last; None for what cannot be read."""
    import av

    for _ in range(MAX_UNREADABLE):
        try:
            yield from container.demux(stream)
            return
        except av.EOFError:
            return
        except av.FFmpegError:
            yield None  # the next demux goes on behind it


def decoded(container: Any, stream: Any, name: str) -> Iterator[Any]:
    """Yield the decodable frames; what is damaged is skipped with one warning, as players do."""
    import av

    damaged = 0
    for packet in demuxed(container, stream):
        try:
            frames = None if packet is None else packet.decode()
        except av.EOFError:
            break
        except av.FFmpegError:
            frames = None
        damaged += frames is None
        yield from frames or ()
    warn_of_damage(name, damaged)


def warn_of_damage(name: str, damaged: int) -> None:
    """Return nothing; a warning says how many packets were left out, if any."""
    if damaged:
        log.warning("%s: %d damaged packets skipped", name, damaged)


def _pictures(container: Any, stream: Any, path: Path) -> Iterator[Any]:
    frame = None
    for frame in decoded(container, stream, str(path)):
        yield frame
    if frame is None:
        raise MediaError(f"{path}: holds no picture that can be decoded; export the video again")


def _upright(frame: Any) -> Image:
    image = frame.to_ndarray(format="bgr24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4  # counter-clockwise, as a phone held
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else np.asarray(image, np.uint8)


def _frame_count(container: Any, stream: Any) -> int | None:
    """Frames the headers promise: for a progress bar, never for timing."""
    if stream.frames:
        return int(stream.frames)
    if container.duration and stream.average_rate:
        return max(int(container.duration / 1_000_000 * stream.average_rate + 0.5), 1)
    return None


def _natural(name: str) -> list[tuple[int, int | str]]:
    parts = re.split(r"(\d+)", name)
    return [(1, int(part)) if part.isdecimal() else (0, part) for part in parts]


def _read_times(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {row["name"]: int(row["pts_ns"]) for row in csv.DictReader(file)}
    except (KeyError, TypeError, ValueError) as error:
        raise MediaError(f"{path}: wanted lines `name,pts_ns`; mend or delete the file") from error
