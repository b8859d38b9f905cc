"""Writers: a picture, a folder of pictures, a video with the driver's sound, a landmark track.

Every writer works under a temporary name beside the target and renames when it is closed without
an error, so the target is complete or not there at all.
"""

from __future__ import annotations

import csv
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import cv2
import numpy as np

from diffusionact.errors import MediaError
from diffusionact.landmarks import Float32Array, Landmarks, Track
from diffusionact.runtime.audio import AudioCopy
from diffusionact.runtime.media import (
    FRAME_NS,
    IMAGE_SUFFIXES,
    NS,
    TIMES_FILE,
    TRACK_SUFFIX,
    Image,
)

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv")
VIDEO_TIME_BASE = Fraction(1, 90_000)  # where the driver's own clock is unknown
MUXERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
BT709 = 1  # FFmpeg's number for the matrix, primaries and transfer
H264_OPTIONS = {"crf": "16", "preset": "veryfast", "bf": "0"}  # no B frames: times stay plain
MPEG4_OPTIONS = {"qscale": "3"}


class Writer(Protocol):
    """Where results go. Used with `with`: an error inside leaves nothing behind.

    wants_pictures: False for a landmark track, which needs no rendering.
    """

    @property
    def wants_pictures(self) -> bool: ...
    def write(
        self, image_bgr: Image | None, pts_ns: int, duration_ns: int, landmarks: Landmarks
    ) -> None: ...
    def __enter__(self) -> Writer: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_writer(
    path: str | Path,
    *,
    time_base: Fraction | None = None,
    audio_from: str | Path | None = None,
    size: tuple[int, int] = (0, 0),
    workplace: Path | None = None,
) -> Writer:
    """Return the writer for a path by its ending; no ending, or an existing folder: a folder.

    time_base: the driver's tick, s, so that its times are kept exactly; audio_from: the file
    whose sound a video keeps; size: width and height, px, noted in a landmark track; workplace:
    the folder of the unfinished file, on the same disk, instead of the target's own.

    Raises: MediaError when the ending is unknown or nothing can be written there.
    """
    target, suffix = Path(path), Path(path).suffix.lower()
    if not suffix or target.is_dir():
        return FolderWriter(target, workplace=workplace)
    if suffix in VIDEO_SUFFIXES:
        return VideoWriter(target, time_base or VIDEO_TIME_BASE, audio_from, workplace=workplace)
    if suffix in IMAGE_SUFFIXES:
        return ImageWriter(target, workplace=workplace)
    if suffix == TRACK_SUFFIX:
        return TrackWriter(target, size, workplace=workplace)
    raise MediaError(
        f"{target}: cannot write {suffix}. Wanted a video ({' '.join(VIDEO_SUFFIXES)}), a picture "
        f"({' '.join(IMAGE_SUFFIXES)}), a landmark track ({TRACK_SUFFIX}) or a folder (no ending)"
    )


class _Atomic:
    """The temporary name, and the rename that ends the work."""

    wants_pictures = True

    def __init__(
        self, target: Path, *, folder: bool = False, workplace: Path | None = None
    ) -> None:
        self.target = target
        self.count = 0
        self._closed = False
        name = f".{target.stem}.{uuid.uuid4().hex[:8]}.part{target.suffix}"
        self.part = (workplace or target.parent) / name
        try:
            target.absolute().parent.mkdir(parents=True, exist_ok=True)
            self.part.mkdir() if folder else self.part.touch()
        except OSError as error:
            raise MediaError(
                f"{target}: cannot be written ({error.strerror}); name another place"
            ) from error

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._closed:  # `stream` closes what it is given, perhaps inside a `with`
            return
        self._closed = True
        try:
            self.finish(complete=kind is None)
            if kind is None:
                if not self.count:
                    raise MediaError(f"{self.target}: not written, there were no frames")
                os.replace(self.part, self.target)
        except OSError as failure:
            raise MediaError(f"{self.target}: cannot be written ({failure})") from failure
        finally:
            remove = shutil.rmtree if self.part.is_dir() else Path.unlink
            if self.part.exists():
                remove(self.part)

    def finish(self, complete: bool) -> None:
        """Close what is open; `complete` is False after an error."""


class ImageWriter(_Atomic):
    """One picture; a second frame is an error that names the forms for many."""

    def write(
        self, image_bgr: Image | None, pts_ns: int, duration_ns: int, landmarks: Landmarks
    ) -> None:
        if self.count:
            raise MediaError(
                f"{self.target}: a picture holds one frame, the driver has more; name a video "
                "(.mp4) or a folder with -o"
            )
        _write_png(self.part, image_bgr)
        self.count = 1


class FolderWriter(_Atomic):
    """Numbered PNGs and their times."""

    def __init__(self, target: Path, *, workplace: Path | None = None) -> None:
        if target.is_dir() and any(target.iterdir()):
            raise MediaError(f"{target}: the folder is not empty; empty it or name a new one")
        if target.exists() and not target.is_dir():
            raise MediaError(f"{target}: is a file; name a folder, or a video ending in .mp4")
        super().__init__(target, folder=True, workplace=workplace)
        self._rows: list[tuple[str, int]] = []

    def write(
        self, image_bgr: Image | None, pts_ns: int, duration_ns: int, landmarks: Landmarks
    ) -> None:
        self.count += 1
        name = f"{self.count:06d}.png"
        _write_png(self.part / name, image_bgr)
        self._rows.append((name, pts_ns))

    def finish(self, complete: bool) -> None:
        if not complete:
            return
        with (self.part / TIMES_FILE).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("name", "pts_ns"), *self._rows])
        if self.target.is_dir():
            self.target.rmdir()  # empty, seen at the start; os.replace needs it gone on Windows


class TrackWriter(_Atomic):
    """The landmarks of the result, px of the picture that would have been written."""

    wants_pictures = False

    def __init__(
        self, target: Path, size: tuple[int, int], *, workplace: Path | None = None
    ) -> None:
        super().__init__(target, workplace=workplace)
        self._size = size
        self._faces: list[Landmarks] = []
        self._times: list[int] = []

    def write(
        self, image_bgr: Image | None, pts_ns: int, duration_ns: int, landmarks: Landmarks
    ) -> None:
        self.count += 1
        self._faces.append(landmarks)
        self._times.append(pts_ns)

    def finish(self, complete: bool) -> None:
        if complete and self._faces:
            make_track(self._faces, self._times, self._size).save(self.part)


def make_track(
    faces: list[Landmarks] | list[Landmarks | None], times_ns: list[int], size: tuple[int, int]
) -> Track:
    """Return a track of faces, NaN where there is None."""
    landmarks = np.full((len(faces), 68, 3), np.nan, np.float32)
    gaze = np.full((len(faces), 2, 2), np.nan, np.float32)
    for i, face in enumerate(faces):
        if face is not None:
            landmarks[i], gaze[i] = face.points, face.gaze
    pts_ns = np.array(times_ns, np.int64)
    return Track(landmarks, gaze, pts_ns, size, _codes(faces))


def _codes(faces: list[Landmarks] | list[Landmarks | None]) -> Float32Array | None:
    """What the published tracker read, [N,C], NaN where it saw none; None of another tracker."""
    known = [None if face is None else face.codes for face in faces]
    one = next((codes for codes in known if codes is not None), None)
    if one is None:
        return None
    return np.stack([np.full_like(one, np.nan) if codes is None else codes for codes in known])


class VideoWriter(_Atomic):
    """H.264 (or MPEG-4 where libx264 is not built in), 4:2:0, at the times it is given.

    An odd last column or row is doubled: 4:2:0 has even sides.
    """

    def __init__(
        self,
        target: Path,
        time_base: Fraction,
        audio_from: str | Path | None,
        options: Mapping[str, str] | None = None,
        *,
        workplace: Path | None = None,
    ) -> None:
        """options: of x264, in place of the usual ones."""
        import av

        super().__init__(target, workplace=workplace)
        self._time_base = time_base
        self._waiting: tuple[Image, int, int] | None = None
        self._spans: dict[int, int] = {}
        self._stream: Any = None
        self._audio_from = audio_from
        self._audio: AudioCopy | None = None
        self._h264_options = H264_OPTIONS if options is None else options
        try:
            muxer = MUXERS[target.suffix.lower()]
            flags = {} if muxer == "matroska" else {"movflags": "+faststart"}
            with _ffmpeg_errors_named(target):
                self._container: Any = av.open(str(self.part), "w", format=muxer, options=flags)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def write(
        self, image_bgr: Image | None, pts_ns: int, duration_ns: int, landmarks: Landmarks
    ) -> None:
        if image_bgr is None:
            raise TypeError("a video is written from pictures")
        with _ffmpeg_errors_named(self.target):
            if self._stream is None:
                self._stream = self._open_stream(image_bgr)
            if self._waiting is not None:
                self._encode(*self._waiting[:2], pts_ns - self._waiting[1])
        self._waiting = (image_bgr, pts_ns, duration_ns or FRAME_NS)
        self.count += 1

    def finish(self, complete: bool) -> None:
        if not hasattr(self, "_container"):
            return
        with _ffmpeg_errors_named(self.target):
            try:
                if complete and self._waiting is not None:
                    self._encode(*self._waiting)
                    self._mux(self._stream.encode(None))
                    if self._audio is not None:
                        self._audio.copy_until(None)
            finally:
                if self._audio is not None:
                    self._audio.close()
                self._container.close()

    def _open_stream(self, image: Image) -> Any:
        import av

        h264 = "libx264" in av.codecs_available
        stream = self._container.add_stream("libx264" if h264 else "mpeg4", rate=25)
        stream.height, stream.width = (side + side % 2 for side in image.shape[:2])
        stream.pix_fmt = "yuv420p"
        # MPEG-4 has a 16-bit clock.
        self._time_base = self._time_base if h264 else Fraction(1, 60_000)
        codec = stream.codec_context
        stream.time_base = codec.time_base = self._time_base
        codec.options = dict(self._h264_options) if h264 else MPEG4_OPTIONS
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = 1  # 16..235
        if self._audio_from is not None:
            self._audio = AudioCopy.open(self._audio_from, self._container)
        return stream

    def _encode(self, image: Image, pts_ns: int, span_ns: int) -> None:
        import av

        pad = [(0, side % 2) for side in image.shape[:2]]
        if any(after for _, after in pad):
            image = np.pad(image, [*pad, (0, 0)], mode="edge")
        frame = av.VideoFrame.from_ndarray(image, format="bgr24").reformat(
            format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
        )
        frame.pts, frame.time_base = self._ticks(pts_ns), self._time_base
        self._spans[frame.pts] = max(self._ticks(pts_ns + span_ns) - frame.pts, 1)
        self._mux(self._stream.encode(frame))

    def _mux(self, packets: Any) -> None:
        for packet in packets:
            packet.duration = self._spans.pop(packet.pts, packet.duration)
            if self._audio is not None:
                self._audio.copy_until(packet.pts * self._time_base)
            self._container.mux(packet)

    def _ticks(self, pts_ns: int) -> int:
        return round(Fraction(pts_ns, NS) / self._time_base)


@contextmanager
def _ffmpeg_errors_named(target: Path) -> Iterator[None]:
    import av

    try:
        yield
    except av.FFmpegError as error:
        raise MediaError(f"{target}: cannot be written ({error})") from error


def _write_png(path: Path, image_bgr: Image | None) -> None:
    if image_bgr is None:
        raise TypeError("a picture file is written from a picture")
    suffix = path.suffix if path.suffix.lower() in IMAGE_SUFFIXES else ".png"
    _, data = cv2.imencode(suffix, image_bgr)
    _store(path, lambda file: file.write(data.tobytes()))


def _store(path: Path, put: Callable[[Any], object]) -> None:
    try:
        with path.open("wb") as file:
            put(file)
    except OSError as error:
        raise MediaError(f"{path.name}: cannot be written ({error.strerror})") from error
