"""One clip of real faces -> what shards keep of it, and why the rest was dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from diffusionact.errors import MediaError
from diffusionact.evaluation.expression import FaceFit
from diffusionact.evaluation.layouts import Footage
from diffusionact.image import bgr_to_rgb, resize_area, warp_crop
from diffusionact.landmarks import EYE_A, EYE_B, Landmarks, crop_matrix, invert_affine
from diffusionact.training.crossing import face_fit
from diffusionact.training.shard_files import Entry, record_dtype

U8 = npt.NDArray[np.uint8]
F64 = npt.NDArray[np.float64]

JPEG = (cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)  # fmt: skip
SHARPNESS_PX = 128  # side at which sharpness is measured, whatever the shards' size
SEVERAL = 0.5  # of the largest face's eye distance: a second face as large as this is one too many
OUTSIDE = 0.1  # share of the points that may lie off the picture
ELSEWHERE = 0.2  # intersection over union of a crop with the usual one of its take
REPEATED = 0.5  # grey levels that a crop differs from the last: less is the same picture again
CUT_PX = 32  # side of the thumbnails that tell a cut
CUT_LEVELS, CUT_TIMES = 20.0, 4.0  # grey levels between frames, and times what was usual before
SHAPE_FRAMES = 16  # of a take that tell its shape
FOREHEAD = 0.9  # from brows upwards, in distances from brows to eyes' line and nose's base
EXAMPLES_PX = 320

# Why a frame is not kept, in the order in which they are looked for.
REASONS = {
    "unreadable": "the picture cannot be decoded",
    "no face": "the tracker sees none",
    "several faces": "a second face has at least half the size of the largest",
    "outside": "more than a tenth of the landmarks lie off the picture",
    "too small": "the crop would be enlarged further than --least-side allows",
    "blurred": "the crop has less detail than --least-sharpness asks for",
    "repeated": "the same picture as the one kept before it",
    "elsewhere": "the face is in another place than in the rest of its take: another's, or none",
}


@dataclass(frozen=True)
class Request:
    """What decides the bytes of shards. rotate, scale: of the crop, as in a bundle's manifest;
    drawing: how the condition is drawn, likewise; least_side_px: of the crop in the picture;
    tracker, mask: who reads faces and tells them from the background, in words."""

    size: int
    frames_per_clip: int
    clips_per_shard: int
    least_side_px: float
    least_sharpness: float
    rotate: bool
    scale: float
    drawing: dict[str, Any]
    tracker: str
    mask: str
    codes: int = 0

    def dtype(self) -> np.dtype[np.void]:
        """Returns the dtype of the frames' records."""
        shape, expression = face_fit().sizes
        return record_dtype(shape, expression, self.codes)


class Reader(Protocol):
    """What the command lends: training may not know the runtime.

    length: frames of a clip, None where only reading tells; pictures: uint8 [H,W,3] BGR with their
    times in ns, None for one that cannot be decoded, MediaError for a clip that cannot be read;
    faces: those of a picture, px, the largest first, whatever came before it; drawn: the points
    that the runtime draws of such a face, canvas px, None where they are its own; mask: uint8 [S,S]
    of a crop, RGB, None where nothing better than the landmarks' hull is at hand.
    """

    def length(self, path: Path) -> int | None: ...
    def pictures(self, path: Path) -> Iterator[tuple[U8 | None, int]]: ...
    def faces(self, image_bgr: U8) -> list[Landmarks]: ...
    def drawn(self, face: Landmarks) -> Landmarks | None: ...
    def mask(self, crop: U8) -> U8 | None: ...
    def close(self) -> None: ...


@dataclass
class ClipReport:
    """What became of a clip. takes: frames kept of each piece between two cuts; dropped: reason ->
    frames; error: why the clip could not be read."""

    clip: str
    person: str
    seen: int = 0
    takes: list[int] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Returns it for JSON."""
        return {**vars(self), "dropped": dict(self.dropped)}


@dataclass(frozen=True)
class Example:
    """A frame that was dropped: uint8 [H,W,3] BGR, small."""

    reason: str
    name: str
    image: U8


@dataclass(frozen=True)
class _Kept:
    face: Landmarks  # crop px
    drawn: Landmarks
    matrix: F64
    sharpness: float
    frame: int
    pts_ns: int
    picture: bytes
    mask: bytes
    size: int  # of the crop, px

    @property
    def side(self) -> float:
        """Of the crop in the picture, px."""
        return self.size / float(np.hypot(self.matrix[0, 0], self.matrix[1, 0]))

    @property
    def centre(self) -> F64:
        """Of the crop in the picture, px."""
        back = invert_affine(self.matrix)
        return np.asarray(back[:, :2] @ np.full(2, (self.size - 1) / 2.0) + back[:, 2])


def chosen_frames(total: int, wanted: int) -> set[int]:
    """Returns the numbers of at most `wanted` frames, evenly spread over `total`."""
    return set(np.linspace(0, total - 1, min(wanted, total)).round().astype(int).tolist())


def prepare_clip(
    reader: Reader, footage: Footage, number: int, request: Request, examples: list[Example]
) -> tuple[list[Entry], ClipReport]:
    """Returns the frames that are kept and the report. number: of the clip in the data set;
    examples: of what is dropped, one a reason, are added to."""
    report = ClipReport(footage.name, footage.identity)
    takes: list[list[_Kept]] = [[]]
    cuts, last = _Cuts(), np.empty(0, np.uint8)
    try:
        total = reader.length(footage.path) or sum(1 for _ in reader.pictures(footage.path))
        chosen = chosen_frames(total, request.frames_per_clip)
        for index, (image, pts_ns) in enumerate(reader.pictures(footage.path)):
            if image is not None and cuts(image):
                takes.append([])
            if index not in chosen:
                continue
            report.seen += 1
            found = _examined(reader, image, (index, pts_ns), request, last)
            if not isinstance(found, str):
                kept, last = found
                takes[-1].append(kept)
                continue
            report.dropped[found] += 1
            _add_example(examples, found, (number, index), image)
    except MediaError as error:
        report.error = str(error)
    entries: list[Entry] = []
    for take in filter(None, (_in_place(take, number, report, examples) for take in takes)):
        entries += _take_entries(take, footage, (number, len(report.takes)), request)
        report.takes.append(len(take))
    return entries, report


def _examined(
    reader: Reader, image: U8 | None, at: tuple[int, int], request: Request, last: U8
) -> tuple[_Kept, U8] | str:
    """The frame with its crop, or the reason why it is dropped; last: the crop that was kept before
    it, empty for the first."""
    if image is None:
        return "unreadable"
    faces = [face for face in reader.faces(image) if face.is_face]
    if not faces:
        return "no face"
    if len(faces) > 1 and _eye_distance(faces[1]) >= SEVERAL * _eye_distance(faces[0]):
        return "several faces"
    face, (height, width) = faces[0], image.shape[:2]
    xy = face.points[:, :2]
    off = (xy < 0).any(axis=1) | (xy > (width - 1, height - 1)).any(axis=1)
    if off.mean() > OUTSIDE:
        return "outside"
    matrix = crop_matrix(face.points, request.size, request.rotate, request.scale)
    if request.size / float(np.hypot(matrix[0, 0], matrix[1, 0])) < request.least_side_px:
        return "too small"
    crop = bgr_to_rgb(warp_crop(image, matrix, request.size))
    sharpness = sharpness_of(crop)
    if sharpness < request.least_sharpness:
        return "blurred"
    if last.size and cv2.norm(crop, last, cv2.NORM_L1) < REPEATED * crop.size:
        return "repeated"
    placed, drawn, mask = face.transformed(matrix), reader.drawn(face), reader.mask(crop)
    mask = hull_mask(placed, request.size) if mask is None else mask
    picture, encoded = _encoded(".jpg", crop[..., ::-1], JPEG), _encoded(".png", mask, ())
    return _Kept(placed, drawn or placed, matrix, sharpness, *at, picture, encoded,
                 request.size), crop  # fmt: skip


def _in_place(
    kept: Sequence[_Kept], number: int, report: ClipReport, examples: list[Example]
) -> list[_Kept]:
    """The frames of a take whose face is where it usually is. A tracker that looks at each frame
    alone now and then takes the largest face for one on a shirt, or a passer-by."""
    if not kept:
        return []
    sides = np.array([each.side for each in kept])
    centres = np.array([each.centre for each in kept])
    usual, middle = np.median(sides), np.median(centres, axis=0)
    ends = np.minimum(sides, usual)[:, None]
    both = (np.add.outer(sides, (usual, usual)) / 2.0 - np.abs(centres - middle)).clip(0.0, ends)
    shared = both.prod(axis=1)
    good = shared / (sides**2 + usual**2 - shared) >= ELSEWHERE
    if not good.all():
        report.dropped["elsewhere"] += int((~good).sum())
    for each in (kept[i] for i in np.flatnonzero(~good)[:1]):
        crop = cv2.imdecode(np.frombuffer(each.picture, np.uint8), cv2.IMREAD_COLOR)
        _add_example(examples, "elsewhere", (number, each.frame), np.asarray(crop, np.uint8))
    return [each for each, fits in zip(kept, good, strict=True) if fits]


def sharpness_of(crop: U8) -> float:
    """Returns the variance of the Laplacian of the luma at 128 px: about 50 for a small face of a
    webcam's video, 500 and more for a photograph."""
    grey = cv2.cvtColor(resize_area(crop, SHARPNESS_PX, SHARPNESS_PX), cv2.COLOR_RGB2GRAY)
    return float(cv2.Laplacian(grey, cv2.CV_64F).var())


def hull_mask(face: Landmarks, side: int) -> U8:
    """Returns uint8 [S,S], 255 in the hull of the landmarks and of a forehead above the brows. It
    leaves out hair, ears and neck: a stand-in for a parsing network, not its equal.

    face: crop px.
    """
    xy = np.asarray(face.points[:, :2], np.float64)
    eyes = (xy[EYE_A].mean(axis=0) + xy[EYE_B].mean(axis=0)) / 2.0
    up = FOREHEAD * (eyes - xy[33])  # as far above the brows as the nose's base is below the eyes
    outline = np.concatenate([xy, xy[17:27] + up])
    near = np.clip(outline, -side, 2 * side)
    mask = np.zeros((side, side), np.uint8)
    cv2.fillConvexPoly(mask, cv2.convexHull(np.rint(near).astype(np.int32)), 255)
    return mask


class _Cuts:
    """Tells whether a frame begins a new take: it is quite unlike the one before, and that one was
    like its own."""

    def __init__(self) -> None:
        self._before: npt.NDArray[np.float32] | None = None
        self._usual = 0.0

    def __call__(self, image: U8) -> bool:
        small = cv2.resize(image, (CUT_PX, CUT_PX), interpolation=cv2.INTER_AREA)
        now, before = small.astype(np.float32), self._before
        self._before = now
        if before is None:
            return False
        change = float(np.abs(now - before).mean())
        if change > CUT_LEVELS and change > CUT_TIMES * self._usual:
            self._usual = 0.0
            return True
        self._usual = max(0.8 * self._usual, change)
        return False


def _take_entries(
    kept: Sequence[_Kept], footage: Footage, place: tuple[int, int], request: Request
) -> list[Entry]:
    """The entries of a take. Its frames share one shape, the median of theirs."""
    fit, (clip, take) = face_fit(), place
    step = -(-len(kept) // SHAPE_FRAMES)
    points = [np.asarray(each.face.points, np.float64) for each in kept]
    shape = np.median([fit.fit(each).shape for each in points[::step]], axis=0)
    about = {"person": footage.identity, "clip": footage.name, "take": take}
    return [
        Entry(
            f"c{clip:06d}t{take:02d}f{each.frame:06d}",
            each.picture,
            each.mask,
            _record(each, fit.fit(at, shape), request),
            {**about, "frame": each.frame, "pts_ns": each.pts_ns},
        )
        for each, at in zip(kept, points, strict=True)
    ]


def _record(kept: _Kept, fit: FaceFit, request: Request) -> npt.NDArray[np.void]:
    record = np.zeros((), request.dtype())
    codes = kept.face.codes
    values = {
        "points": kept.face.points,
        "gaze": kept.face.gaze,
        "gaze_angles": np.full(2, np.nan) if codes is None else codes[-2:],
        "shape": fit.shape,
        "expression": fit.expression,
        "pose": fit.pose_deg,
        "camera": (fit.scale, *fit.offset),
        "drawn": np.concatenate([kept.drawn.points[:, :2], kept.drawn.gaze]),
        "codes": codes,
        "crop": kept.matrix,
        "sharpness": kept.sharpness,
        "side": kept.side,
        "frame": kept.frame,
        "pts_ns": kept.pts_ns,
    }
    for name in record.dtype.names or ():
        record[name] = values[name]
    return record


def _eye_distance(face: Landmarks) -> float:
    across = face.points[EYE_A, :2].mean(axis=0) - face.points[EYE_B, :2].mean(axis=0)
    return float(np.hypot(*across))


def _encoded(ending: str, image: npt.NDArray[np.uint8], how: tuple[int, ...]) -> bytes:
    return cv2.imencode(ending, np.ascontiguousarray(image), how)[1].tobytes()


def _add_example(
    examples: list[Example], reason: str, at: tuple[int, int], image: U8 | None
) -> None:
    """Keeps the first frame, of (clip, frame), that is dropped for a reason."""
    if image is not None and all(example.reason != reason for example in examples):
        examples.append(Example(reason, "c{:06d}f{:06d}".format(*at), _small(image)))


def _small(image: U8) -> U8:
    factor = min(EXAMPLES_PX / max(image.shape[:2]), 1.0)
    height, width = (max(round(factor * length), 1) for length in image.shape[:2])
    return resize_area(image, width, height)
