"""The 68-point face layout with two gaze points; tracks of it, alignment, the face crop.

Points 0-16 jaw, 17-21 and 22-26 brows, 27-35 nose, 36-41 and 42-47 eyes, 48-59 outer and
60-67 inner lips (iBUG order). Coordinates are pixel indices: the centre of the first pixel is
(0, 0), x to the right, y down, z away from the camera.
"""

from __future__ import annotations

import contextlib
import math
import os
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.errors import MediaError, NoFace, SettingsError

Float32Array: TypeAlias = npt.NDArray[np.float32]
FloatArray: TypeAlias = npt.NDArray[np.floating]

POINTS = 68
EYE_A, EYE_B = slice(36, 42), slice(42, 48)  # the picture's left and right eye
MOUTH_CORNERS = (48, 54)
DEFAULT_FPS = 25.0  # for tracks that carry no times
SIDECAR_SUFFIX = ".landmarks.npz"  # of a track that lies beside the picture or video it is of
FLAT = 0.01  # extent across over extent along, of points that lie on a line rather than on a face
LEAST_EXTENT_PX = 1e-3

# Vertices of the 478-point face mesh; two numbers mean their middle.
MESH_TO_POINTS: tuple[tuple[int, ...], ...] = (
    # jaw
    *((127,), (234,), (93,), (132, 58), (58, 172), (136,), (150,), (176,), (152,)),
    *((400,), (379,), (365,), (397, 288), (361, 288), (323,), (454,), (356,)),
    # brows
    *((70,), (63,), (105,), (66,), (107,), (336,), (296,), (334,), (293,), (300,)),
    # nose
    *((168, 6), (197, 195), (5,), (4,), (98,), (97,), (2,), (326,), (327,)),
    # eyes
    *((33,), (160,), (158,), (133,), (153,), (144,)),
    *((362,), (385,), (387,), (263,), (373,), (380,)),
    # outer, then inner lips
    *((61,), (39,), (37,), (0,), (267,), (269,), (291,), (321,), (314,), (17,), (84,), (91,)),
    *((78,), (82,), (13,), (312,), (308,), (317,), (14,), (87,)),
)
_MESH_FIRST = np.array([ids[0] for ids in MESH_TO_POINTS])
_MESH_SECOND = np.array([ids[-1] for ids in MESH_TO_POINTS])
MESH_IRISES = (468, 473)
MESH_POINTS = 478
TRACK_ARRAYS = frozenset({"landmarks", "gaze", "pts_ns", "size", "codes"})


@dataclass(frozen=True)
class Landmarks:
    """One face.

    points: float32 [68,3], px (z in the scale of x, NaN where unknown);
    gaze: float32 [2,2], px, the iris of eye 36-41, then of eye 42-47; score: 0..1.
    codes: float32 [C], what the published tracker read of the face (`runtime.published.codes`).

    Raises: SettingsError for other shapes.
    """

    points: Float32Array
    gaze: Float32Array
    score: float = 1.0
    codes: Float32Array | None = None

    def __post_init__(self) -> None:
        shapes = np.shape(self.points), np.shape(self.gaze)
        if shapes != ((POINTS, 3), (2, 2)):
            raise SettingsError(
                f"landmarks: points {list(shapes[0])}, gaze {list(shapes[1])}; wanted [68,3] with "
                "NaN for a depth that is not known, and [2,2]"
            )

    @property
    def is_face(self) -> bool:
        """Whether motion can be read from it: x, y and gaze are finite and span an area."""
        xy = np.asarray(self.points[:, :2], np.float64)
        if not (np.isfinite(xy).all() and np.isfinite(self.gaze).all()):
            return False
        along, across = np.linalg.svd(xy - xy.mean(axis=0), compute_uv=False)
        return bool(along > LEAST_EXTENT_PX and across > FLAT * along)

    def transformed(self, matrix: FloatArray) -> Landmarks:
        """Return the landmarks after an affine map [2,3] of x, y; z is scaled by its size."""
        linear, offset = np.asarray(matrix, np.float64)[:, :2], np.asarray(matrix)[:, 2]
        xy = self.points[:, :2] @ linear.T + offset
        z = self.points[:, 2:] * math.sqrt(abs(np.linalg.det(linear)))
        points = np.concatenate([xy, z], axis=1).astype(np.float32)
        gaze = (self.gaze @ linear.T + offset).astype(np.float32)
        return Landmarks(points, gaze, self.score, self.codes)


@dataclass(frozen=True)
class Track:
    """The landmarks of a clip.

    landmarks: float32 [N,68,3], px; gaze: float32 [N,2,2], px; both NaN where no face was
    found. pts_ns: int64 [N], rising; size: width and height of the pictures, px; codes: float32
    [N,C] where the published tracker found the faces.
    """

    landmarks: Float32Array
    gaze: Float32Array
    pts_ns: npt.NDArray[np.int64]
    size: tuple[int, int]
    codes: Float32Array | None = None

    def __len__(self) -> int:
        return len(self.landmarks)

    def __getitem__(self, index: int) -> Landmarks | None:
        codes = None if self.codes is None else self.codes[index]
        face = Landmarks(self.landmarks[index], self.gaze[index], codes=codes)
        return face if face.is_face else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Return nothing; the file is complete or not there at all."""
        save_npz(path, **self.arrays())

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return what `save` writes, by name."""
        return {
            "landmarks": self.landmarks,
            "gaze": self.gaze,
            "pts_ns": self.pts_ns,
            "size": np.array(self.size, np.int64),
            **({} if self.codes is None else {"codes": self.codes}),
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Track:
        """Return the track of an .npz file: [N,68,2|3] px, or a face mesh [N,478,3] normalised.

        Raises: MediaError when it is missing, no .npz, empty, of other shapes, or its times fall.
        """
        arrays = load_npz(path, "landmark track")
        if "landmarks" not in arrays or "size" not in arrays:
            raise MediaError(f"{path}: has {sorted(arrays)}; wanted the arrays landmarks and size")
        for name in TRACK_ARRAYS & arrays.keys():
            if arrays[name].dtype.kind not in "iuf":
                raise MediaError(f"{path}: {name} holds {arrays[name].dtype}; wanted numbers")
        raw, (width, height) = arrays["landmarks"], _track_size(path, arrays["size"])
        if raw.ndim != 3 or not len(raw):
            raise MediaError(f"{path}: landmarks {list(raw.shape)}; wanted [N,68,3], N > 0")
        if raw.shape[1:] == (MESH_POINTS, 3):
            faces = [from_mediapipe(mesh * (width, height, width)) for mesh in raw]
            points = np.stack([face.points for face in faces])
            gaze = np.stack([face.gaze for face in faces])
        elif raw.shape[1] == POINTS and raw.shape[2] in (2, 3) and "gaze" in arrays:
            depth = np.full((len(raw), POINTS, 3 - raw.shape[2]), np.nan)
            points = np.concatenate([raw, depth], axis=2).astype(np.float32)
            gaze = arrays["gaze"].astype(np.float32)
        else:
            raise MediaError(f"{path}: landmarks {list(raw.shape)}; wanted [N,68,3] with gaze")
        pts_ns = arrays.get("pts_ns", np.arange(len(raw)) * (1e9 / DEFAULT_FPS))
        if gaze.shape != (len(raw), 2, 2) or pts_ns.shape != (len(raw),):
            raise MediaError(
                f"{path}: gaze {list(gaze.shape)}, pts_ns {list(pts_ns.shape)} do not fit "
                f"landmarks {list(raw.shape)}"
            )
        if not (np.isfinite(pts_ns).all() and (np.diff(pts_ns.astype(np.int64)) > 0).all()):
            raise MediaError(
                f"{path}: pts_ns do not rise from frame to frame; wanted the frames in order, "
                "their times in nanoseconds. Without pts_ns the track plays at 25 frames a second"
            )
        codes = arrays.get("codes")
        if codes is not None and (codes.ndim != 2 or len(codes) != len(raw)):
            raise MediaError(f"{path}: codes {list(codes.shape)}; wanted [{len(raw)},C]")
        known = None if codes is None else codes.astype(np.float32)
        return cls(points, gaze, pts_ns.astype(np.int64), (width, height), known)


def sidecar_path(media: str | os.PathLike[str]) -> Path:
    """Return where the landmark track of a picture or video lies, beside it: NAME.landmarks.npz."""
    return Path(media).with_suffix(SIDECAR_SUFFIX)


def _track_size(path: str | os.PathLike[str], size: npt.NDArray[np.generic]) -> tuple[int, int]:
    numbers = np.asarray(size, np.float64)
    if numbers.shape != (2,) or not np.isfinite(numbers).all() or (numbers < 0).any():
        raise MediaError(f"{path}: size {size.tolist()}; wanted width and height, px")
    return int(numbers[0]), int(numbers[1])


def from_mediapipe(mesh: FloatArray) -> Landmarks:
    """Return the 68 points and both irises of a MediaPipe face mesh.

    mesh: [478,3], px (normalised x and z times the width, y times the height).
    Source: MediaPipe face mesh topology, iris refinement.
    """
    points = (mesh[_MESH_FIRST] + mesh[_MESH_SECOND]) / 2.0
    gaze = mesh[list(MESH_IRISES), :2]
    return Landmarks(points.astype(np.float32), gaze.astype(np.float32))


def gaze_points(points: FloatArray, pitch: float, yaw: float) -> Float32Array:
    """Return where both eyes look on the picture, float32 [2,2], px.

    points: [68,>=2], px; pitch, yaw: radians, of both eyes.
    Source: DiffusionAct, Eq. 9.
    """
    direction = np.array([math.sin(yaw) * math.cos(pitch), math.sin(pitch)])
    eyes = (points[EYE_A, :2], points[EYE_B, :2])
    centres = [eye.mean(axis=0) - np.ptp(eye, axis=0) / 2.0 * direction for eye in eyes]
    return np.asarray(centres, np.float32)


def fit_similarity(
    source: FloatArray, target: FloatArray
) -> tuple[float, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return (scale, rotation [D,D], translation [D]): target ~ scale source @ rotation.T + t.

    source, target: [N,D], D = 2 or 3, at least two different points. Least squares.
    Source: Umeyama 1991, Eq. 40-42.
    """
    a, b = np.asarray(source, np.float64), np.asarray(target, np.float64)
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    a, b = a - mean_a, b - mean_b
    u, spread, vt = np.linalg.svd(b.T @ a / len(a))
    signs = np.ones(a.shape[1])
    signs[-1] = np.sign(np.linalg.det(u) * np.linalg.det(vt))  # a rotation, never a mirror
    rotation = (u * signs) @ vt
    scale = float((spread * signs).sum() / (a**2).sum(axis=1).mean())
    return scale, rotation, mean_b - scale * rotation @ mean_a


def crop_matrix(
    points: FloatArray, side: int, rotate: bool = False, scale: float = 1.0
) -> npt.NDArray[np.float64]:
    """Return the face crop as a similarity [2,3], image px -> crop px.

    points: [68,>=2], px. Half the side is scale * max(2 eye distances, 1.8 eyes-to-mouth);
    the centre lies a tenth of the way from the eyes to the mouth. `rotate` levels the eyes, as
    published; without it the crop stays upright, so that the head's roll stays in the picture.

    Raises: NoFace when the points span no face. Source: FFHQ alignment (Karras et al. 2019).
    """
    xy = np.asarray(points, np.float64)[:, :2]
    eye_a, eye_b = xy[EYE_A].mean(axis=0), xy[EYE_B].mean(axis=0)
    eyes, across = (eye_a + eye_b) / 2.0, eye_b - eye_a
    down = xy[list(MOUTH_CORNERS)].mean(axis=0) - eyes
    half = scale * max(2.0 * float(np.hypot(*across)), 1.8 * float(np.hypot(*down)))
    if not half > 0.0 or not math.isfinite(half):
        raise NoFace("the landmarks span no face: eyes and mouth lie on one point, or are missing")
    axis = across + (down[1], -down[0]) if rotate else np.array([1.0, 0.0])
    axis_x = half * axis / np.hypot(*axis)
    axis_y = np.array([-axis_x[1], axis_x[0]])
    centre = eyes + 0.1 * down
    # crop px u holds the picture at first + (u + 0.5) / side * 2 axis_x, and v along axis_y
    inverse = np.stack([axis_x, axis_y], axis=1) * (2.0 / side)
    linear = np.linalg.inv(inverse)
    first = centre - axis_x - axis_y + inverse @ (0.5, 0.5)
    return np.concatenate([linear, (-linear @ first)[:, None]], axis=1)


def invert_affine(matrix: FloatArray) -> npt.NDArray[np.float64]:
    """Return the inverse of an affine map [2,3], as [2,3]."""
    linear = np.linalg.inv(np.asarray(matrix, np.float64)[:, :2])
    return np.concatenate([linear, -linear @ np.asarray(matrix, np.float64)[:, 2:]], axis=1)


def save_npz(path: str | os.PathLike[str], **arrays: npt.NDArray[np.generic]) -> None:
    """Return nothing; writes the arrays under a temporary name in the same folder, then renames.

    Raises: MediaError when the folder cannot be written.
    """
    target = Path(path)
    part = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}.part{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        os.replace(part, target)
    except OSError as error:
        raise MediaError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):  # gone after the rename; the folder may never have been
            part.unlink()


def load_npz(path: str | os.PathLike[str], what: str) -> Mapping[str, npt.NDArray[np.generic]]:
    """Return the arrays of an .npz file by name; pickled objects are refused.

    Raises: MediaError when it is missing or not such a file.
    """
    try:
        with open(path, "rb") as raw:
            if not zipfile.is_zipfile(raw):  # NumPy would advise to unpickle it
                raise zipfile.BadZipFile("another kind of file, or cut short")
            raw.seek(0)
            with np.load(raw, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file (wanted a {what}, .npz)") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise MediaError(f"{path}: cannot be read as a {what}, .npz ({error})") from error
