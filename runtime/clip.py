"""A whole clip: driver in, result out, of the same length and timing.

Two passes. The first keeps the landmarks of every frame and nothing else, because the neutral
face that motion is measured from is found in the whole clip; the second renders. Memory does not
grow with the pictures.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from diffusionact.errors import MediaError, NoFace, SettingsError
from diffusionact.landmarks import Landmarks, Track, invert_affine
from diffusionact.progress import ProgressCallback
from diffusionact.runtime.media import (
    IMAGE_SUFFIXES,
    Reader,
    TrackReader,
    VideoReader,
    frame_spans,
    open_reader,
    read_image,
    sidecar_track,
)
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.source import Source
from diffusionact.runtime.timing import StageTimes, summarise
from diffusionact.runtime.writer import Writer, make_track, open_writer

PathLike: TypeAlias = "str | Path"


@dataclass(frozen=True)
class ClipReport:
    """output: what was written; frames: how many; seen: with a face in the driver; seconds: spent;
    times: percentiles a stage."""

    output: Path
    frames: int
    seen: int
    seconds: float
    times: Mapping[str, StageTimes]


@dataclass(frozen=True)
class Motion:
    """A driver's track, and for how long each of its frames shows."""

    track: Track
    spans_ns: tuple[int, ...]

    @classmethod
    def recorded(cls, track: Track) -> Motion:
        """The motion of a track that was made before."""
        return cls(track, tuple(frame_spans([int(pts) for pts in track.pts_ns])))

    def seen(self) -> int:
        """Return the number of frames that have a face."""
        return sum(self.track[i] is not None for i in range(len(self.track)))


def run_clip(
    act: Reenactor,
    portrait: PathLike,
    driver: PathLike,
    output: PathLike,
    *,
    face: int | None = None,
    progress: ProgressCallback | None = None,
) -> ClipReport:
    """Return what was done; the portrait moved with the driver is in `output`.

    portrait: a picture; driver: picture, folder, video or landmark track; output: video, picture,
    folder or landmark track. A landmark track under the name of portrait or driver, beside it,
    is taken in the tracker's place. face: which of several in the portrait, from 1.

    Raises: MediaError, NoFace when the driver shows none at all, SettingsError, BackendMissing.
    """
    begun_s = time.monotonic()
    reader = open_reader(driver)
    _check_output(reader, Path(output), [Path(portrait), Path(driver)])
    source = prepare_portrait(act, portrait, face)
    sound = reader.path if isinstance(reader, VideoReader) else None
    writer = open_writer(
        output, time_base=reader.time_base, audio_from=sound, size=_result_size(act, source)
    )
    with writer:  # opened before the long work: what cannot be written fails now
        pace = _Pace(act, source, writer, progress)
        track = sidecar_track(driver) if sound else None
        motion = track_driver(act, reader, pace) if track is None else Motion.recorded(track)
        start_session(act, source, motion.track)
        times = render_motion(act, source, motion, writer, pace)
    spent_s = time.monotonic() - begun_s
    return ClipReport(Path(output), len(motion.spans_ns), motion.seen(), spent_s, summarise(times))


def prepare_portrait(act: Reenactor, portrait: PathLike, face: int | None = None) -> Source:
    """Return the source of a picture file; its landmarks from a track beside it, if there."""
    image = read_image(portrait)
    known = sidecar_track(portrait) if face is None else None
    return act.prepare(image, face, known[0] if known is not None else None)


def track_driver(act: Reenactor, reader: Reader, pace: _Pace | None = None) -> Motion:
    """Return the landmarks of every frame of a driver.

    Raises: NoFace when there is no face in any of them.
    """
    if isinstance(reader, TrackReader):
        motion = Motion.recorded(reader.track)
    else:
        faces: list[Landmarks | None] = []
        times_ns, spans_ns, size = [], [], (0, 0)
        for frame in reader:
            if frame.image_bgr is None:
                raise TypeError("a driver of pictures has pictures")
            try:
                faces.append(act.tracker.track(frame.image_bgr))
            except NoFace:
                faces.append(None)
            times_ns.append(frame.pts_ns)
            spans_ns.append(frame.duration_ns)
            size = (frame.image_bgr.shape[1], frame.image_bgr.shape[0])
            if pace is not None:
                pace.tracked(len(faces), reader.length)
        motion = Motion(make_track(faces, times_ns, size), tuple(spans_ns))
    if not motion.seen():
        raise NoFace(
            f"{reader.name}: no face in any of its {len(motion.track)} frames; wanted a face at "
            "least 60 pixels wide, seen from the front. Crop it closer to the face and run again"
        )
    return motion


def start_session(act: Reenactor, source: Source, track: Track) -> None:
    """Return nothing; motion starts anew, measured from the neutral face of the track. A single
    picture has nothing to compare itself with: its pose and expression are taken as they are."""
    retargeter = act.retargeter(source)
    if len(track) > 1:
        retargeter.calibrate(track[i] for i in range(len(track)))
    else:
        retargeter.reset(forget_neutral=True)


def render_motion(
    act: Reenactor, source: Source, motion: Motion, writer: Writer, pace: _Pace | None = None
) -> list[Mapping[str, int]]:
    """Return the times of each frame; every frame of the driver is written."""
    retargeter = act.retargeter(source)
    to_portrait = invert_affine(source.matrix)
    track, times = motion.track, []
    for i, (pts, span_ns) in enumerate(zip(track.pts_ns, motion.spans_ns, strict=True)):
        pts_ns = int(pts)
        if writer.wants_pictures:
            result = act.reenact(track[i], source, pts_ns)
            times.append(result.times)
            writer.write(result.frame, pts_ns, span_ns, result.landmarks)
        else:
            target = retargeter.target(track[i], pts_ns)
            moved = target.transformed(to_portrait) if act.settings.paste else target
            writer.write(None, pts_ns, span_ns, moved)
        if pace is not None:
            pace.rendered(i + 1, len(track))
    return times


class _Pace:
    """Progress in frames done, both passes weighed by what they cost, so that the time left that
    a bar derives from it is true."""

    def __init__(
        self, act: Reenactor, source: Source, writer: Writer, progress: ProgressCallback | None
    ) -> None:
        self._progress = progress
        self._render_s = 0.0
        if progress is not None and writer.wants_pictures:
            act.rest(source)  # the first run of a network is slower than all that follow
            begun_s = time.monotonic()
            act.rest(source)
            self._render_s = time.monotonic() - begun_s
        self._begun_s = time.monotonic()
        self._share = 0.0  # of the whole work, what tracking is

    def tracked(self, done: int, total: int | None) -> None:
        if self._progress is not None:
            track_s = (time.monotonic() - self._begun_s) / done
            self._share = track_s / (track_s + self._render_s)
            self._progress(int(self._share * done), total)

    def rendered(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(int(self._share * total + (1.0 - self._share) * done), total)


def _check_output(reader: Reader, output: Path, inputs: list[Path]) -> None:
    if reader.live:
        raise SettingsError(
            f"{reader.name}: never ends; wanted a picture, folder, video or landmark track with -d"
        )
    many = reader.length is None or reader.length > 1
    if many and output.suffix.lower() in IMAGE_SUFFIXES and not output.is_dir():
        raise MediaError(
            f"{output}: a picture holds one frame, the driver {reader.name} has more; name a video "
            "(.mp4) or a folder with -o"
        )
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise MediaError(f"{output}: would overwrite the input {path}; name another with -o")


def _result_size(act: Reenactor, source: Source) -> tuple[int, int]:
    height, width = (source.portrait if act.settings.paste else source.crop).shape[:2]
    return width, height
