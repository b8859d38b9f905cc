"""The second pass over a clip: each frame of the driver's motion rendered, pasted and written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

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

TOGETHER_FROM = 30  # frames of a clip; opening a network for several takes as long as some save


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
    Frames that are rendered at once are written while the next ones are.
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

    def write_group(group: Sequence[_Made]) -> None:
        for made in group:
            write(made)

    groups = _landmarks(act, session, motion)
    if writer.wants_pictures:
        groups = _pictures(act, session, motion, parts.crops() if parts else iter(()))
    write_behind(_counted(groups, len(motion.track), left), write_group)
    return tally


def _pictures(
    act: Reenactor, session: Session, motion: Motion, kept: Iterator[Image]
) -> Iterator[list[_Made]]:
    count = len(motion.track)
    at_once = act.open_together() if count >= TOGETHER_FROM else 1
    for group in _grouped(count, at_once):
        crops = list(islice(kept, len(group)))
        if len(crops) == len(group):
            yield [_pasted(act, session, motion, i, c) for i, c in zip(group, crops, strict=True)]
        else:
            yield _rendered(act, session, motion, group, known=len(crops))


def _grouped(count: int, at_once: int) -> Iterator[range]:
    """The frames that are rendered at once; the last few one at a time.

    A frame's place depends on the clip alone and not on where a killed run goes on, so that its
    bytes do not either, whatever a backend's rounding owes to the place.
    """
    whole = count - count % at_once
    yield from (range(i, i + at_once) for i in range(0, whole, at_once))
    yield from (range(i, i + 1) for i in range(whole, count))


def _rendered(
    act: Reenactor, session: Session, motion: Motion, group: range, known: int
) -> list[_Made]:
    """A group that is rendered; the crops of the first `known` are kept already."""
    track = motion.track
    drivers, pts_ns = [track[i] for i in group], [int(track.pts_ns[i]) for i in group]
    if len(group) == 1:
        results = [act.reenact(drivers[0], session, pts_ns[0])]
    else:
        results = act.reenact_together(drivers, session, pts_ns)
    return [
        _Made(i, result.frame, None, result.landmarks, {})
        if i < group.start + known
        else _Made(i, result.frame, result.crop, result.landmarks, result.times)
        for i, result in zip(group, results, strict=True)
    ]


def _pasted(act: Reenactor, session: Session, motion: Motion, i: int, crop: Image) -> _Made:
    """A frame whose crop is kept."""
    # so that the session is where it was
    moved = session.target(motion.track[i], int(motion.track.pts_ns[i]))
    frame = session.source.paster.paste(crop) if act.settings.paste else crop
    return _Made(i, frame, None, moved, {})


def _landmarks(act: Reenactor, session: Session, motion: Motion) -> Iterator[list[_Made]]:
    track = motion.track
    to_portrait = invert_affine(session.source.matrix)
    for i in range(len(track)):
        watch = StopWatch()
        target = session.target(track[i], int(track.pts_ns[i]))
        moved = target.transformed(to_portrait) if act.settings.paste else target
        watch.lap("retarget")
        yield [_Made(i, None, None, moved, watch.times)]


def _counted(
    groups: Iterable[list[_Made]], total: int, left: TimeLeft | None
) -> Iterator[list[_Made]]:
    """The frames, told to the progress; those of an interrupted run are there when it begins."""
    show: ProgressCallback | None = None
    for group in groups:
        if show is not None:
            for made in group:
                show(made.index + 1, total)
        elif left is not None and any(made.times for made in group):
            # From here on: when work on these began is not known here.
            show = left.stage("render", group[-1].index + 1, total)
        yield group
