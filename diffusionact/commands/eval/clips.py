"""The clips of every protocol, for the measures: rendered people, the user's clips, two folders.

Nothing is rendered or decoded before a measure asks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffusionact.commands.eval.methods import Method, Moment
from diffusionact.errors import MediaError, NoFace
from diffusionact.evaluation.compared import Clip, Frame, Image, Load
from diffusionact.evaluation.expression import ExpressionFit
from diffusionact.evaluation.layouts import VIDEO_SUFFIXES, Footage
from diffusionact.evaluation.pairing import Side, paired
from diffusionact.evaluation.protocols import Pair, far_apart
from diffusionact.evaluation.reading import Reading
from diffusionact.evaluation.rendered import Person, moved_landmarks
from diffusionact.image import bgr_to_rgb, warp_crop
from diffusionact.landmarks import Landmarks
from diffusionact.morphable import rendered_face

if TYPE_CHECKING:
    from diffusionact.runtime.motion import Motion
    from diffusionact.runtime.reenactor import Reenactor
    from diffusionact.runtime.source import Source

log = logging.getLogger("diffusionact")


def person_clips(
    people: Sequence[Person],
    method: Method,
    found: Reading | None = None,
    min_angle_deg: float = 0.0,
) -> Iterator[Clip]:
    """Yield one clip a person: the source's picture is to become the target's.

    found: what the answer shows, of one that is the same for all; min_angle_deg: only people
    whose two heads are at least that far apart.
    """
    fit = ExpressionFit(rendered_face())
    for person in people:
        if not far_apart(person.source.pose, person.target.pose, min_angle_deg):
            continue
        source, target = person.source, person.target
        moment = Moment(
            person.name, source.image, source.landmarks, target.landmarks, target.image,
            target.landmarks,
        )  # fmt: skip
        frame = Frame(
            "target", partial(method, moment), partial(_given, target.image), target.reading(fit),
            target.face, found,
        )  # fmt: skip
        load = partial(_given, source.image)
        yield Clip(person.name, person.name, [frame], load, follows=False)


def cross_person_clips(
    people: Sequence[Person], pairs: Sequence[Pair], method: Method, exact: bool
) -> Iterator[Clip]:
    """Yield one clip a pair: the source's picture with the pose and expression of the driver's
    target. There is no true picture; landmarks, pose and expression are known.

    exact: Eq. 8, the landmarks of the source's shape; else the driver's own, as detected.
    """
    fit, face = ExpressionFit(rendered_face()), rendered_face()
    for pair in pairs:
        source, driver = people[pair.source], people[pair.driver]
        due = moved_landmarks(source, driver.target, face)
        drawn = due if exact else driver.target.landmarks
        points = np.asarray(due.points[:, :2], np.float64)
        truth = Reading(
            points, np.asarray(due.gaze, np.float64), driver.target.reading(fit).pose, fit(points)
        )
        moment = Moment(source.name, source.source.image, source.source.landmarks, drawn)
        frame = Frame("target", partial(method, moment), None, truth)
        name = f"{source.name}_{driver.name}"
        load = partial(_given, source.source.image)
        yield Clip(name, source.name, [frame], load, follows=False)


@dataclass(frozen=True)
class Take:
    """A clip of the user's with its landmarks: what protocols on real footage start from."""

    footage: Footage
    motion: Motion
    source: Source
    first: int  # the frame that is the source: the first that shows a face

    def crop(self, image: Image) -> Image:
        """The picture in the source's own frame, BGR."""
        return warp_crop(image, self.source.matrix, len(self.source.crop))


@dataclass(frozen=True)
class Plan:
    """How clips are moved. limit: frames of each, None all; retarget: Eq. 8, the driver's motion
    on the source's face; else the landmarks as the tracker found them. A clip is tracked once,
    whoever moves it then."""

    limit: int | None = None
    retarget: bool = False
    min_angle_deg: float = 0.0
    motions: dict[Path, Motion] = field(default_factory=dict)  # of clips tracked so far


def take(act: Reenactor, footage: Footage, motions: dict[Path, Motion]) -> Take:
    """Return a clip with its landmarks and its first face prepared.

    Raises: MediaError, NoFace when it shows none at all, BackendMissing without a tracker.
    """
    from diffusionact.runtime.media import open_reader
    from diffusionact.runtime.motion import driver_motion

    reader = open_reader(footage.path)
    if footage.path not in motions:
        motions[footage.path] = driver_motion(act, reader)
    motion = motions[footage.path]
    for i, frame in enumerate(reader):
        face = motion.track[i]
        if face is not None and frame.image_bgr is not None:
            if i:
                log.warning("%s: no face before frame %d, which is the source", footage.name, i)
            x_T = np.zeros((1, 3, *[act.manifest.image_size] * 2), np.float32)
            source = act.prepare(frame.image_bgr, landmarks=face, x_T=x_T)  # a method inverts
            return Take(footage, motion, source, i)
    raise NoFace(f"{footage.name}: no frame with a face can be read")


def self_clips(
    act: Reenactor, footage: Sequence[Footage], method: Method, plan: Plan
) -> Iterator[Clip]:
    """Yield every clip: its first face is the source, its other frames are the targets."""
    for each in footage:
        try:
            made = take(act, each, plan.motions)
        except (MediaError, NoFace) as reason:
            yield Clip(each.name, each.identity, [], unusable=str(reason))
            continue
        yield _clip(act, made, made, each.name, method, plan)


def cross_clips(
    act: Reenactor, footage: Sequence[Footage], pairs: Sequence[Pair], method: Method, plan: Plan
) -> Iterator[Clip]:
    """Yield a clip for each pair: one's first face, moved by another's frames."""
    takes = cache(lambda index: take(act, footage[index], plan.motions))
    for pair in pairs:
        identity = footage[pair.source].identity
        name = f"{footage[pair.source].name}_{footage[pair.driver].name}"
        try:
            source, driver = takes(pair.source), takes(pair.driver)
        except (MediaError, NoFace) as reason:
            yield Clip(name, identity, [], unusable=str(reason))
            continue
        yield _clip(act, source, driver, name, method, plan)


def _clip(
    act: Reenactor, source: Take, driver: Take, name: str, method: Method, plan: Plan
) -> Clip:
    frames = _frames(act, source, driver, method, plan)
    crop = bgr_to_rgb(source.source.crop)
    return Clip(name, source.footage.identity, frames, partial(_given, crop))


def _frames(
    act: Reenactor, source: Take, driver: Take, method: Method, plan: Plan
) -> Iterator[Frame]:
    """The driver's frames. Of one's own clip the wanted picture is known: the frame itself, in the
    source's crop."""
    from diffusionact.runtime.media import open_reader

    own, track = source is driver, driver.motion.track
    session = act.session(source.source)
    session.start(track)
    held = source.source.landmarks
    rest = driver.source.landmarks
    count = 0
    for i, picture in enumerate(open_reader(driver.footage.path)):
        face = track[i] if i < len(track) else None
        if plan.retarget:
            held = session.target(face, int(track.pts_ns[min(i, len(track) - 1)]))
        elif face is not None:
            held = face.transformed(driver.source.matrix)
        if own and i == driver.first:
            continue
        if face is not None and not _far(rest, face, driver, plan.min_angle_deg):
            continue
        if count == plan.limit:
            return
        count += 1
        wanted = driver.crop(picture.image_bgr) if picture.image_bgr is not None else None
        true = face.transformed(driver.source.matrix) if face is not None else held
        crop = bgr_to_rgb(source.source.crop)
        moment = Moment(name_of(source), crop, source.source.landmarks, held,
                        wanted if own else None, true if own else None)  # fmt: skip
        reference = partial(_given, wanted) if own and wanted is not None else None
        truth = None if own or face is None else _driver_reading(true)
        yield Frame(str(i), partial(method, moment), reference, truth)


def name_of(made: Take) -> str:
    """Return what is the same for all frames of one source."""
    return made.footage.name


def _driver_reading(landmarks: Landmarks) -> Reading:
    """Pose and expression of a driver of another shape: where points should be is not known."""
    fit, mean = ExpressionFit(rendered_face()), _mean_face()
    points = np.asarray(landmarks.points[:, :2], np.float64)
    pose = _pose(landmarks, mean)
    unknown = np.full((68, 2), np.nan)
    return Reading(unknown, np.full((2, 2), np.nan), pose, fit(points))


def _far(rest: Landmarks, face: Landmarks, driver: Take, least_deg: float) -> bool:
    if least_deg <= 0:
        return True
    mean = _mean_face()
    here = _pose(face.transformed(driver.source.matrix), mean)
    return far_apart(_pose(rest, mean), here, least_deg)


def _pose(face: Landmarks, mean: np.ndarray) -> np.ndarray:
    from diffusionact.morphable import angles
    from diffusionact.runtime.headpose import take_apart

    return np.asarray(angles(take_apart(face, mean).rotation), np.float64)


@cache
def _mean_face() -> np.ndarray:
    face = rendered_face()
    return np.asarray(face.landmarks(face.template), np.float64)


def pair_clips(reference: Path, result: Path, source: Load | None = None) -> Iterator[Clip]:
    """Yield the clips of two places: one clip of two folders of pictures, two videos or two
    pictures; of folders that hold folders or videos, one clip for each name of either side.

    Raises: MediaError.
    """
    if _holds_clips(reference) and _holds_clips(result):
        a, b = _clips_in(reference), _clips_in(result)
        for name in sorted({*a, *b}):
            places = [(a.get(name), reference), (b.get(name), result)]
            try:
                sides = [
                    Side(f"{root}/{name}", [], named=True) if place is None else _side(place)
                    for place, root in places
                ]
            except MediaError as reason:
                yield Clip(name, name, [], unusable=str(reason))
                continue
            yield Clip(name, name, _paired(*sides), source)
        return
    name = result.stem or str(result)
    yield Clip(name, name, _paired(_side(reference), _side(result)), source)


def _paired(reference: Side, result: Side) -> Iterator[Frame]:
    """The frames of both; of a clip that one side lacks altogether, all are counted."""
    if reference.entries == []:
        yield from (Frame(name, load, unpaired="extra") for name, load in result.entries)
    elif result.entries == []:
        yield from (Frame(name, None, load, unpaired="missing") for name, load in reference.entries)
    else:
        yield from paired(reference, result)


def _side(path: Path) -> Side:
    from diffusionact.runtime.media import FolderReader, VideoReader, open_reader, read_image

    reader = open_reader(path)
    if isinstance(reader, FolderReader):
        single = len(reader.paths) == 1 and not path.is_dir()
        entries = [
            ("0" if single else file.stem, partial(read_image, file)) for file in reader.paths
        ]
        return Side(str(path), entries, named=True)
    if not isinstance(reader, VideoReader):
        raise MediaError(f"{path}: holds no pictures; wanted a folder, a picture or a video")
    return Side(str(path), _streamed(path), named=False)


def _streamed(path: Path) -> Iterator[tuple[str, Callable[[], Image]]]:
    from diffusionact.runtime.media import open_reader

    for i, frame in enumerate(open_reader(path)):
        if frame.image_bgr is not None:
            yield str(i), partial(_given, frame.image_bgr)


def _holds_clips(place: Path) -> bool:
    return place.is_dir() and bool(_clips_in(place))


def _clips_in(place: Path) -> dict[str, Path]:
    from diffusionact.runtime.media import IMAGE_SUFFIXES

    if any(path.suffix.lower() in IMAGE_SUFFIXES for path in place.iterdir()):
        return {}
    return {
        path.stem: path
        for path in sorted(place.iterdir())
        if path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES
    }


def _given(image: Image) -> Image:
    return image
