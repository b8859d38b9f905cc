"""A whole clip: driver in, result out, of the same length and timing.

Two passes. The first keeps the landmarks of every frame and nothing else, because the neutral
face that motion is measured from is found in the whole clip; the second renders. Memory does not
grow with the pictures.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from diffusionact.errors import MediaError, SettingsError
from diffusionact.landmarks import Landmarks, invert_affine, sidecar_path
from diffusionact.progress import ProgressCallback, StageCallback
from diffusionact.runtime.ahead import write_behind
from diffusionact.runtime.media import (
    IMAGE_SUFFIXES,
    TRACK_SUFFIX,
    FolderReader,
    Image,
    Reader,
    VideoReader,
    open_reader,
    read_image,
)
from diffusionact.runtime.motion import Motion, driver_motion
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.session import Session
from diffusionact.runtime.sidecar import Sidecar
from diffusionact.runtime.source import Source
from diffusionact.runtime.timing import StageTimes, StopWatch, summarise
from diffusionact.runtime.writer import Writer, open_writer

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
        session = act.session(source)
        session.start(motion.track)
        times = render_motion(
            act, session, motion, writer, progress and partial(progress, "render")
        )
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


def render_motion(
    act: Reenactor,
    session: Session,
    motion: Motion,
    writer: Writer,
    progress: ProgressCallback | None = None,
) -> list[Mapping[str, int]]:
    """Return the times of each frame, all stages; every frame of the driver is written, each
    while the next is rendered."""
    times: list[Mapping[str, int]] = []

    def write(made: _Made) -> None:
        watch = StopWatch()
        pts_ns, span_ns = int(motion.track.pts_ns[made.index]), motion.spans_ns[made.index]
        writer.write(made.image_bgr, pts_ns, span_ns, made.landmarks)
        watch.lap("write")
        times.append({**motion.times[made.index], **made.times, **watch.times})

    draw = _pictures if writer.wants_pictures else _landmarks
    write_behind(_counted(draw(act, session, motion), len(motion.track), progress), write)
    return times


@dataclass(frozen=True)
class _Made:
    """A frame on its way to the writer; image_bgr: None where only landmarks are wanted."""

    index: int
    image_bgr: Image | None
    landmarks: Landmarks
    times: Mapping[str, int]


def _pictures(act: Reenactor, session: Session, motion: Motion) -> Iterator[_Made]:
    track = motion.track
    for i in range(len(track)):
        result = act.reenact(track[i], session, int(track.pts_ns[i]))
        yield _Made(i, result.frame, result.landmarks, result.times)


def _landmarks(act: Reenactor, session: Session, motion: Motion) -> Iterator[_Made]:
    track = motion.track
    to_portrait = invert_affine(session.source.matrix)
    for i in range(len(track)):
        watch = StopWatch()
        target = session.target(track[i], int(track.pts_ns[i]))
        moved = target.transformed(to_portrait) if act.settings.paste else target
        watch.lap("retarget")
        yield _Made(i, None, moved, watch.times)


def _counted(
    frames: Iterable[_Made], total: int, progress: ProgressCallback | None
) -> Iterator[_Made]:
    for made in frames:
        yield made
        if progress is not None:
            progress(made.index + 1, total)


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
