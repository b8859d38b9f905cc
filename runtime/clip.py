"""A whole clip: driver in, result out, of the same length and timing.

Two passes. The first keeps the landmarks of every frame and nothing else, because the neutral
face that motion is measured from is found in the whole clip; the second renders. Memory does not
grow with the pictures.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from diffusionact.errors import MediaError, NoFace, SettingsError
from diffusionact.landmarks import Landmarks, Track, invert_affine, sidecar_path
from diffusionact.progress import ProgressCallback, StageCallback
from diffusionact.runtime.media import (
    IMAGE_SUFFIXES,
    TRACK_SUFFIX,
    FolderReader,
    Frame,
    Reader,
    TrackReader,
    VideoReader,
    open_reader,
    read_image,
)
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.sidecar import Sidecar
from diffusionact.runtime.source import Source
from diffusionact.runtime.timing import StageTimes, StopWatch, summarise
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
    """A driver's track, for how long each of its frames shows, and what finding it took:
    times: per frame, stage -> nanoseconds, "read" and "track"."""

    track: Track
    spans_ns: tuple[int, ...]
    times: tuple[Mapping[str, int], ...]

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
    progress: StageCallback | None = None,
) -> ClipReport:
    """Return what was done; the portrait moved with the driver is in `output`.

    portrait: a picture; driver: picture, folder, video or landmark track; output: video, picture,
    folder or landmark track. Where NAME.landmarks.npz lies beside a portrait, or beside a driver
    that is one picture or a video, its landmarks are taken and no tracker is needed; the times are
    the driver's own. face: which of several in the portrait, from 1, the largest first.
    progress: of the stages "track" and "render".

    Raises: MediaError, also for landmarks that are of another file; NoFace when the portrait or
    the whole driver shows none; SettingsError, BackendMissing.
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
        motion = driver_motion(act, reader, progress and partial(progress, "track"))
        act.start_session(source, motion.track)
        times = render_motion(act, source, motion, writer, progress and partial(progress, "render"))
    spent_s = time.monotonic() - begun_s
    return ClipReport(Path(output), len(motion.spans_ns), motion.seen(), spent_s, summarise(times))


def prepare_portrait(act: Reenactor, portrait: PathLike, face: int | None = None) -> Source:
    """Return the source of a picture file.

    face: which of several, from 1; the landmarks beside the picture are those of the first.
    Raises: MediaError, NoFace, SettingsError, BackendMissing.
    """
    image = read_image(portrait)
    known = Sidecar.beside(portrait) if face in (None, 1) else None
    if known is None:
        return act.prepare(image, face)
    (landmarks,) = known.faces(1, (image.shape[1], image.shape[0]))
    return act.prepare(image, landmarks=landmarks)


def driver_motion(
    act: Reenactor, reader: Reader, progress: ProgressCallback | None = None
) -> Motion:
    """Return the landmarks of every frame of a driver, with the frames' own times: from a track
    beside its file, NAME.landmarks.npz, where there is one, else by the tracker.

    Raises: MediaError for a track of another file, NoFace when no frame has a face, BackendMissing.
    """
    file = _single_file(reader)
    known = None if file is None else Sidecar.beside(file)
    faces: list[Landmarks | None] = []
    pts_ns, spans_ns, times = [], [], []
    size = reader.track.size if isinstance(reader, TrackReader) else (0, 0)
    watch = StopWatch()
    for frame in reader:
        watch.lap("read")
        if frame.image_bgr is not None:
            size = (frame.image_bgr.shape[1], frame.image_bgr.shape[0])
        faces.append(None if known is not None else _find(act, frame))
        watch.lap("track")
        pts_ns.append(frame.pts_ns)
        spans_ns.append(frame.duration_ns)
        times.append(watch.times)
        if progress is not None:  # a file's header may promise another number
            progress(len(faces), reader.length and max(reader.length, len(faces)))
        watch = StopWatch()
    if progress is not None:
        progress(len(faces), len(faces))
    if known is not None:
        faces = known.faces(len(faces), size)
    motion = Motion(make_track(faces, pts_ns, size), tuple(spans_ns), tuple(times))
    if not motion.seen():
        raise NoFace(
            f"{reader.name}: no face in any of its {len(faces)} frames; wanted a face at least 60 "
            "pixels wide, seen from the front, or, in a landmark track, 68 points and both irises"
        )
    return motion


def _single_file(reader: Reader) -> Path | None:
    """The one file of a reader of pictures, beside which a track may lie."""
    if isinstance(reader, FolderReader) and len(reader.paths) == 1:
        return reader.paths[0]
    return reader.path if isinstance(reader, VideoReader) else None


def _find(act: Reenactor, frame: Frame) -> Landmarks | None:
    if frame.image_bgr is None:
        return frame.landmarks
    try:
        return act.tracker.track(frame.image_bgr)
    except NoFace:
        return None


def render_motion(
    act: Reenactor,
    source: Source,
    motion: Motion,
    writer: Writer,
    progress: ProgressCallback | None = None,
) -> list[Mapping[str, int]]:
    """Return the times of each frame, all stages; every frame of the driver is written."""
    to_portrait = invert_affine(source.matrix)
    track = motion.track
    times: list[Mapping[str, int]] = []
    for i, span_ns in enumerate(motion.spans_ns):
        pts_ns, watch, image = int(track.pts_ns[i]), StopWatch(), None
        if writer.wants_pictures:
            result = act.reenact(track[i], source, pts_ns)
            spent, image, moved = result.times, result.frame, result.landmarks
        else:
            target = act.target(track[i], source, pts_ns)
            moved = target.transformed(to_portrait) if act.settings.paste else target
            watch.lap("retarget")
            spent = watch.times
        watch = StopWatch()
        writer.write(image, pts_ns, span_ns, moved)
        watch.lap("write")
        times.append({**motion.times[i], **spent, **watch.times})
        if progress is not None:
            progress(i + 1, len(track))
    return times


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
    if isinstance(reader, FolderReader):
        inputs = [*inputs, *reader.paths]
    for path in inputs:
        if _same(output, path):
            raise MediaError(f"{output}: would overwrite the input {path}; name another with -o")
        if path.suffix.lower() != TRACK_SUFFIX and _same(output, sidecar_path(path)):
            raise MediaError(
                f"{output}: would be taken for the landmarks of the input {path}; name another "
                "with -o"
            )


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve() or (a.exists() and b.exists() and a.samefile(b))


def _result_size(act: Reenactor, source: Source) -> tuple[int, int]:
    height, width = (source.portrait if act.settings.paste else source.crop).shape[:2]
    return width, height
