"""A whole clip: driver in, result out, of the same length and timing.

Two passes. The first keeps the landmarks of every frame and nothing else, because the neutral
face that motion is measured from is found in the whole clip; the second renders. Memory does not
grow with the pictures.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from diffusionact.errors import MediaError, SettingsError
from diffusionact.image import resize_area
from diffusionact.landmarks import sidecar_path
from diffusionact.progress import TimedCallback, TimeLeft
from diffusionact.runtime.media import (
    IMAGE_SUFFIXES,
    TRACK_SUFFIX,
    FolderReader,
    Reader,
    VideoReader,
    open_reader,
    read_image,
)
from diffusionact.runtime.motion import driver_motion
from diffusionact.runtime.parts import Parts
from diffusionact.runtime.recipe import recipe_of
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.rendering import render_motion
from diffusionact.runtime.sidecar import Sidecar
from diffusionact.runtime.source import Source
from diffusionact.runtime.timing import StageTimes
from diffusionact.runtime.writer import Writer, open_writer

PathLike: TypeAlias = "str | Path"

PROBED_FROM = 20  # frames of a clip; a shorter one is not worth more of them
WARM_UP_S = 1.0  # of a frame; a slower one shows little of it


@dataclass(frozen=True)
class ClipReport:
    """output: what was written; frames: how many; seen: with a face in the driver; resumed: taken
    from an interrupted run; seconds: spent; times: percentiles a stage, of the frames rendered
    now."""

    output: Path
    frames: int
    seen: int
    resumed: int
    seconds: float
    times: Mapping[str, StageTimes]


def run_clip(
    act: Reenactor,
    portrait: PathLike,
    driver: PathLike,
    output: PathLike,
    *,
    face: int | None = None,
    progress: TimedCallback | None = None,
) -> ClipReport:
    """Return what was done; the portrait moved with the driver is in `output`.

    portrait: a picture; driver: picture, folder, video or landmark track; output: video, picture,
    folder or landmark track. Where NAME.landmarks.npz lies beside a portrait, or beside a driver
    that is one picture or a video, its landmarks are taken and no tracker is needed; the times are
    the driver's own. face: which of several in the portrait, from 1, the largest first.
    progress: of the stages "track" and "render", with the time that both leave.

    A clip that was killed goes on where it was when it is run again (`runtime.parts`).

    Raises: MediaError, also for landmarks that are of another file; NoFace when the portrait or
    the whole driver shows none; SettingsError, BackendMissing.
    """
    begun_s = time.monotonic()
    reader, output = open_reader(driver), Path(output)
    _check_output(reader, output, [Path(portrait), Path(driver)])
    left = TimeLeft(progress)
    with _parts(act, Path(portrait), reader, output, face) as parts:
        source = parts.source if parts else None
        if source is None:
            source = prepare_portrait(act, portrait, face)
            if parts:
                parts.keep_source(source)
        # Opened before the long work: what cannot be written fails now.
        with _open_writer(act, source, reader, output, parts) as writer:
            motion = parts.motion if parts else None
            if motion is None:
                left.expect("render", _probe_s(act, source, reader, writer, left))
                motion = driver_motion(act, reader, left.stage("track", total=reader.length))
                if parts:
                    parts.keep_motion(motion)
            session = act.session(source)
            session.start(motion.track)
            tally = render_motion(act, session, motion, writer, parts, left)
    done, spent_s = parts.done if parts else 0, time.monotonic() - begun_s
    return ClipReport(output, len(motion.spans_ns), motion.seen(), done, spent_s, tally.summary())


def prepare_portrait(
    act: Reenactor, portrait: PathLike, face: int | None = None, most_side: int | None = None
) -> Source:
    """Return the source of a picture file.

    face: which of several, from 1; the landmarks beside the picture are those of the first;
    most_side: px, a larger picture is made smaller: each frame is one of its size.
    Raises: MediaError, NoFace, SettingsError, BackendMissing.
    """
    image = read_image(portrait)
    known = Sidecar.beside(portrait) if face in (None, 1) else None
    landmarks = None
    height, width = image.shape[:2]
    if known is not None:
        (landmarks,) = known.faces(1, (width, height))
    if most_side is not None and max(height, width) > most_side:
        ratio = most_side / max(height, width)
        image = resize_area(image, max(round(ratio * width), 1), max(round(ratio * height), 1))
        if landmarks is not None:
            across, down = image.shape[1] / width, image.shape[0] / height
            shrunk = np.array(
                [[across, 0.0, (across - 1.0) / 2.0], [0.0, down, (down - 1.0) / 2.0]]
            )
            landmarks = landmarks.transformed(shrunk)
    if landmarks is None:
        return act.prepare(image, face)
    return act.prepare(image, landmarks=landmarks)


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


def _parts(
    act: Reenactor, portrait: Path, reader: Reader, output: Path, face: int | None
) -> AbstractContextManager[Parts | None]:
    """What a run keeps; nothing for a single picture."""
    if reader.length == 1:
        return nullcontext()
    return Parts(output, recipe_of(act, portrait, reader, face))


def _open_writer(
    act: Reenactor, source: Source, reader: Reader, output: Path, parts: Parts | None
) -> Writer:
    return open_writer(
        output,
        time_base=reader.time_base,
        audio_from=reader.path if isinstance(reader, VideoReader) else None,
        size=_result_size(act, source),
        workplace=parts.folder if parts else None,
    )


def _probe_s(
    act: Reenactor, source: Source, reader: Reader, writer: Writer, left: TimeLeft
) -> float | None:
    """The seconds that a frame of the second pass takes: some are rendered, where a clip is long
    enough to be worth it; None where not known."""
    if not writer.wants_pictures:
        return 0.0
    if not left.wanted or (reader.length or 0) < PROBED_FROM:
        return None
    first_s = _rest_s(act, source)
    if first_s > WARM_UP_S:
        return first_s
    # The first frame of all makes what the next ones find made.
    return (_rest_s(act, source) + _rest_s(act, source)) / 2.0


def _rest_s(act: Reenactor, source: Source) -> float:
    begun_s = time.monotonic()
    act.rest(source)
    return time.monotonic() - begun_s


def _result_size(act: Reenactor, source: Source) -> tuple[int, int]:
    height, width = (source.portrait if act.settings.paste else source.crop).shape[:2]
    return width, height
