"""The second pass over a clip: each frame of the driver's motion rendered, pasted and written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from diffusionact.landmarks import Landmarks, invert_affine
from diffusionact.progress import ProgressCallback, TimeLeft
from diffusionact.runtime.ahead import write_behind
from diffusionact.runtime.media import Image
from diffusionact.runtime.motion import Motion
from diffusionact.runtime.parts import Parts
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.session import Session
from diffusionact.runtime.timing import StopWatch, Tally
from diffusionact.runtime.writer import Writer


@dataclass(frozen=True)
class _Made:
    """A frame on its way to the writer. image_bgr: None where only landmarks are wanted; crop:
    None where it is kept already; times: empty where nothing was rendered."""

    index: int
    image_bgr: Image | None
    crop: Image | None
    landmarks: Landmarks
    times: Mapping[str, int]


def render_motion(
    act: Reenactor,
    session: Session,
    motion: Motion,
    writer: Writer,
    parts: Parts | None = None,
    left: TimeLeft | None = None,
) -> Tally:
    """Return the times of the frames that were rendered, all stages; every frame of the driver is
    written, in order, each while the next is rendered.

    session: at its start; parts: the crops that are there already, and where new ones are kept.
    """
    tally = Tally()

    def write(made: _Made) -> None:
        watch = StopWatch()
        if parts is not None and made.crop is not None:
            parts.keep_crop(made.crop)
        pts_ns, span_ns = int(motion.track.pts_ns[made.index]), motion.spans_ns[made.index]
        writer.write(made.image_bgr, pts_ns, span_ns, made.landmarks)
        watch.lap("write")
        if made.times:
            found = {stage: int(values[made.index]) for stage, values in motion.times.items()}
            tally.add({**found, **made.times, **watch.times})

    frames = _landmarks(act, session, motion)
    if writer.wants_pictures:
        frames = _pictures(act, session, motion, parts.crops() if parts else iter(()))
    write_behind(_counted(frames, len(motion.track), left), write)
    return tally


def _pictures(
    act: Reenactor, session: Session, motion: Motion, kept: Iterator[Image]
) -> Iterator[_Made]:
    track, source = motion.track, session.source
    for i in range(len(track)):
        pts_ns = int(track.pts_ns[i])
        if (crop := next(kept, None)) is None:
            result = act.reenact(track[i], session, pts_ns)
            yield _Made(i, result.frame, result.crop, result.landmarks, result.times)
        else:
            moved = session.target(track[i], pts_ns)  # so that the session is where it was
            frame = source.paster.paste(crop) if act.settings.paste else crop
            yield _Made(i, frame, None, moved, {})


def _landmarks(act: Reenactor, session: Session, motion: Motion) -> Iterator[_Made]:
    track = motion.track
    to_portrait = invert_affine(session.source.matrix)
    for i in range(len(track)):
        watch = StopWatch()
        target = session.target(track[i], int(track.pts_ns[i]))
        moved = target.transformed(to_portrait) if act.settings.paste else target
        watch.lap("retarget")
        yield _Made(i, None, None, moved, watch.times)


def _counted(frames: Iterable[_Made], total: int, left: TimeLeft | None) -> Iterator[_Made]:
    """The frames, told to the progress; those of an interrupted run are there when it begins."""
    show: ProgressCallback | None = None
    for made in frames:
        if left is not None and show is None and made.times:
            show = left.stage("render", made.index, total)
        yield made
        if show is not None:
            show(made.index + 1, total)
